"""Freed tensors go back to the system: measured in processes of their own, since the setting is the whole
process's.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import sys, psutil, torch
from lowmem.machine.heap import give_back_freed
from lowmem.machine.monitor import anonymous_bytes
told = sys.argv[1] == "told" and give_back_freed()
process = psutil.Process()
torch.zeros(1).add(1)
def touch(number, num_bytes):
    return [torch.ones(num_bytes // 4) for _ in range(number)]
del touch(1, 24 << 20)[0]  # where the threshold moves by itself, it has moved now
before = anonymous_bytes(process)
kept = []
for part in touch(8, 20 << 20):
    kept.append(torch.ones(64))  # small ones between, that hold the heap's end
    del part
print(int(told), anonymous_bytes(process) - before)
"""


def left_bytes(mode: str) -> tuple[bool, int]:
    told, left = subprocess.run(
        [sys.executable, "-c", CHILD, mode], capture_output=True, text=True, check=True
    ).stdout.split()
    return bool(int(told)), int(left)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_freed_tensors_are_given_back_to_the_system() -> None:
    told, left = left_bytes("told")
    assert told
    assert left < 4 << 20  # of 160 MiB touched
