"""To look at a run needs no write: its folder may be read-only, or somebody else's."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import as_overrides, run_short

from lowmem import cli
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


# ------------------------------------------------------------------------------------------------------------
# Somebody else's folder, as the system itself guards it

NOBODY = 65534
LOOKS = (["status", "RUN"], ["report", "RUN"], ["verify", "RUN"], ["eval", "RUN", "--json"])
AS_OWNER = "to become another user takes root's rights"


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and what was printed, of the command line run in this process."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["lowmem", *arguments])
                cli.main()
        except SystemExit as ended:
            return int(ended.code or 0), printed.getvalue()


def as_nobody(commands: list[list[str]], answer: Path) -> list[tuple[int, str]]:
    """What each command gives in a child that has become nobody. It writes that to the file `answer`."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            answer.write_text(json.dumps([command(*arguments) for arguments in commands]))
        finally:
            os._exit(0)  # nor do the parent's fixtures end here
    os.waitpid(child, 0)
    return [(code, printed) for code, printed in json.loads(answer.read_text())]


def all_of(folder: Path) -> dict[str, tuple[bytes, int, int, int]]:
    """Content, time, mode and owner of everything in a folder, and of the folder."""
    facts = {path: path.stat() for path in (folder, *folder.iterdir())}
    return {
        path.name: (b"" if path == folder else path.read_bytes(), at.st_mtime_ns, at.st_mode, at.st_uid)
        for path, at in facts.items()
    }


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A folder that every user reaches; pytest's own are root's alone."""
    with tempfile.TemporaryDirectory(prefix="lowmem-test-") as name:
        Path(name).chmod(0o755)
        closed = [folder for folder in Path(name).parents if not folder.stat().st_mode & stat.S_IXOTH]
        if closed:
            pytest.skip(f"{closed[0]} is closed to other users")
        yield Path(name)


@pytest.fixture(scope="module")
def text_run(shared: Path) -> tuple[Path, list[str]]:
    """A run on a text that root trained in a folder that all may enter, and the command that trains it."""
    (shared / "own.txt").write_text("abcde" * 200)
    data = {"name": "text", "path": str(shared / "own.txt")}
    keys = {"train__num_steps": 4, "train__batch_size": 16, "train__warmup_steps": 0, "train__seq_len": 16}
    model = {"model__num_layers": 3, "model__dim": 16, "model__num_heads": 2, "blocks__visit_steps": 4}
    sets = [*as_overrides(**keys, **model), f"data={json.dumps(data)}"]
    train = ["train", "stdlib-masked", "--profile", "cpu-4gib", "--run-dir", str(shared / "run"), "--quiet"]
    train += [word for override in sets for word in ("--set", override)]
    assert command(*train)[0] == 0
    return shared / "run", train


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason=AS_OWNER)
@pytest.mark.parametrize("whose", ["another user's", "the reader's own, read-only"])
def test_another_user_looks_at_a_run_and_changes_nothing_and_cannot_train_in_it(
    text_run: tuple[Path, list[str]], shared: Path, whose: str
) -> None:
    (folder, train), own = text_run, folder_of_nobody(shared)
    if whose != "another user's":
        for path in (*folder.iterdir(), folder):
            os.chown(path, NOBODY, NOBODY)
            path.chmod(0o555 if path == folder else 0o444)
    sample = ["sample", str(folder), "--out", str(own / "samples.txt"), "--num", "1"]
    looks = [[str(folder) if word == "RUN" else word for word in words] for words in LOOKS]
    for words in (*looks, sample):  # so that nothing is left to import, which nobody may not be able to read
        assert command(*words)[0] == 0
    (own / "samples.txt").unlink()
    before = all_of(folder)
    *seen, (code, refusal) = as_nobody([*looks, sample, train], own / "answer.json")
    assert [code for code, _ in seen] == [0] * 5, seen
    evaluated = json.loads(seen[3][1][seen[3][1].index("{") :])  # progress comes before it
    assert "finished" in seen[0][1] and "whole" in seen[2][1] and "metric" in evaluated
    assert (own / "samples.txt").read_text().startswith("--- sample 0")
    assert code == 2 and "Permission denied; " in refusal and "only read" in refusal
    assert refusal.count("error: ") == 1 and refusal.splitlines()[-1].startswith("error: ")
    assert all_of(folder) == before


def folder_of_nobody(parent: Path) -> Path:
    own = Path(tempfile.mkdtemp(dir=parent))
    os.chown(own, NOBODY, NOBODY)
    return own
