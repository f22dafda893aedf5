"""What the runtime and its libraries take is measured with the packages here, and kept for this build."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from lowmem.machine.floor import Library, measured_floor_bytes, measured_library_bytes
from lowmem.planning.footprint import LIBRARY_BYTES
from lowmem.units import MIB

SAID = 123 * MIB - 5


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The probes that were started; each says SAID."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        calls.append(command[3:])
        return subprocess.CompletedProcess(command, 0, str(SAID).encode())

    monkeypatch.setattr(subprocess, "run", run)
    forget()
    return calls


def forget() -> None:
    """As in a new process."""
    measured_floor_bytes.cache_clear()
    measured_library_bytes.cache_clear()


def test_a_figure_is_measured_once_and_then_read(tmp_path: Path, asked: list[list[str]]) -> None:
    for _ in range(3):
        forget()
        assert measured_floor_bytes("cpu", tmp_path) == 123 * MIB
        assert measured_library_bytes("peft", tmp_path) == 123 * MIB
        assert measured_library_bytes("compiler", tmp_path) == 123 * MIB
    assert asked == [["cpu"], ["cpu", "peft"], ["cpu", "compiler"]]


def test_two_installations_do_not_forget_each_others_figures(
    tmp_path: Path, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for executable in ("one", "other", "one", "other"):
        forget()
        monkeypatch.setattr(sys, "executable", executable)
        assert measured_floor_bytes("cpu", tmp_path) == 123 * MIB
    assert len(asked) == 2


@pytest.mark.parametrize("damage", ["version", "text", "number", "sign"])
def test_a_figure_of_another_build_or_a_damaged_one_is_measured_anew(
    tmp_path: Path, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    measured_library_bytes("transformers", tmp_path)
    (kept,) = tmp_path.iterdir()
    if damage == "version":
        monkeypatch.setattr("importlib.metadata.version", lambda name: f"0 of {name}")
    elif damage == "text":
        kept.write_text("{")
    else:
        found = {"number": 1 << 40, "sign": -1}[damage]
        kept.write_text(json.dumps({**json.loads(kept.read_text()), "floor_bytes": found}))
    forget()
    assert measured_library_bytes("transformers", tmp_path) == 123 * MIB
    assert len(asked) == 2


def test_each_library_has_a_figure_for_where_it_is_not_installed() -> None:
    assert set(LIBRARY_BYTES) == set(get_args(Library))


def test_a_library_that_is_not_installed_has_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bitsandbytes.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    assert measured_library_bytes("bitsandbytes", tmp_path / "kept") is None
    assert not (tmp_path / "kept").exists()


def test_what_a_library_takes_is_what_its_import_takes(tmp_path: Path) -> None:
    """Beside torch with its kernels at work, and measured by other code than the probe's."""
    forget()
    code = """
import sys, torch
def held():
    lines = open('/proc/self/smaps_rollup').read().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith('Anonymous:'))
(torch.randn(64, 64, requires_grad=True) @ torch.randn(64, 64)).sum().backward()
import lowmem.job
before = held()
import torch._dynamo
print(held() - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("smaps is Linux's")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = measured_library_bytes("compiler", tmp_path)
    assert found is not None
    assert abs(found - int(done.stdout)) < 12 * MIB
