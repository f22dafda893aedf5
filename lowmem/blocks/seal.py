"""The seal of a run: what `state.json` holds beside the state itself, so that no change goes unseen.

    run            the run's identity, which also stands in plan.json and in the name of every block file
    plan_digests   sha256 of plan.json; two of them while plan.json is being replaced
    checksum       sha256 over everything else in state.json

It is a checksum against damage and mistakes. It does not stop whoever means to forge a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem.errors import LowmemError, ResumeError, StoreError
from lowmem.files import json_object, printable
from lowmem.units import finite

SCHEMA = 2  # of a run folder
BACK = (
    "restore it from a copy, go back one commit with `lowmem recover`, or begin again in another --run-dir; "
    "nothing was overwritten"
)


def plan_digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sealed(state: Mapping[str, Any], identity: str, plan_digests: Sequence[str]) -> bytes:
    """The bytes of state.json."""
    content = {**finite(state), "run": identity, "plan_digests": list(plan_digests)}
    return json.dumps({**content, "checksum": _checksum(content)}, indent=1).encode()


def unsealed(content: bytes, path: Path, identity: str, plan: bytes) -> dict[str, Any]:
    """The state in the bytes of state.json, with its seal checked against the run's identity and plan.json.

    Raises StoreError where the seal does not fit, ResumeError for a folder of another schema.
    """
    raw = json_object(content, path, StoreError, BACK)
    check_schema(raw.get("schema"), path)
    checksum = raw.pop("checksum", None)
    if checksum != _checksum(raw):
        raise StoreError(f"{printable(path)}: changed since it was written (its checksum differs); {BACK}")
    digests = raw.pop("plan_digests", None)
    if raw.pop("run", None) != identity:
        raise StoreError(f"{printable(path)}: of another run than plan.json; {BACK}")
    if not isinstance(digests, list) or plan_digest(plan) not in digests:
        raise StoreError(
            f"{printable(path.with_name('plan.json'))}: changed since it was written (its checksum differs); "
            "restore it from a copy, or begin again in another --run-dir; nothing was overwritten"
        )
    return raw


def check_schema(found: Any, path: Path, error: type[LowmemError] = ResumeError) -> None:
    if found != SCHEMA:
        raise error(
            f"{printable(path)}: a run folder of schema {str(found)[:20]}; this version reads schema "
            f"{SCHEMA}; go on with the version that made it, or begin again in another --run-dir"
        )


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
