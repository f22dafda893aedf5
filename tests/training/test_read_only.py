"""To look at a run needs no write: its folder may be read-only, or somebody else's."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run_short

from lowmem.blocks.verify import verify_run
from lowmem.errors import ResumeError
from lowmem.inference.evaluate import evaluate_run
from lowmem.reporting.report import read_report, read_status

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes the system refuse every write below a folder, also to root, whom permissions do not stop."""

    def make(folder: Path) -> None:
        real_open = os.open

        def refusing(path: Any, flags: int, *args: Any, **named: Any) -> int:
            if flags & WRITES and str(path).startswith(str(folder)):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return real_open(path, flags, *args, **named)

        monkeypatch.setattr(os, "open", refusing)

    return make


def test_looking_at_a_run_writes_nothing_and_training_in_it_is_refused_in_one_line(
    tmp_path: Path, read_only: Callable[[Path], None]
) -> None:
    folder = tmp_path / "run"
    run_short(folder)
    (folder / "lock").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    read_only(folder)
    assert read_status(folder)["state"] == "finished"
    assert read_report(folder).content["progress"]["visits_done"] == 9
    assert evaluate_run(folder)["metric"] == "accuracy"
    assert verify_run(folder)["whole"]
    with pytest.raises(ResumeError, match="Read-only file system.*only read") as caught:
        run_short(folder)
    assert "\n" not in str(caught.value)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
