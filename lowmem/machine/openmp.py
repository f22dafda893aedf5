"""How long OpenMP's threads keep a core busy while they wait for their next work.

Torch computes with a team of threads. Between two operations GNU's OpenMP, which torch's builds for Linux
bring, lets them turn for some milliseconds before they sleep. While blocks stream, that takes the core from
the threads that read, write and check. Some ten microseconds are enough to bridge two operations. Measured on
two cores: the same steps a second, for 0.8 to 0.9 of the processor time.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

VARIABLE, TURNS = "GOMP_SPINCOUNT", 3000
USERS_OWN = (VARIABLE, "OMP_WAIT_POLICY", "OMP_PROC_BIND")  # who sets one of them has decided


def rest_between_operations(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets the threads sleep soon. It must be called before torch is imported, and changes no result.

    `environment`: of this process, or of a child that will be started.
    """
    if not any(name in environment for name in USERS_OWN):
        environment[VARIABLE] = str(TURNS)
