"""Calls in a forked child: what comes back, what falls back, and what a process that trains is spared."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem import errors
from lowmem.errors import BudgetError, LowmemError
from lowmem.machine import child
from lowmem.machine.child import LEFT_BEHIND, in_child

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it forks on Linux alone")
ERRORS = [
    error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, LowmemError)
]


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not imported what others here have, and whose only thread is this one."""
    monkeypatch.delitem(sys.modules, LEFT_BEHIND, raising=False)
    monkeypatch.setattr(threading, "active_count", lambda: 1)


def test_the_result_comes_back_from_another_process(forks: None) -> None:
    pid, value = in_child(lambda: (os.getpid(), {"a": [1, 2.5, None], "b": b"\0" * 300_000}))
    assert pid != os.getpid()
    assert value == {"a": [1, 2.5, None], "b": b"\0" * 300_000}
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # it was waited for


def test_what_the_call_imports_and_changes_ends_with_the_child(forks: None) -> None:
    changed = list[int]()

    def call() -> bool:
        import this_module_is_made_up  # type: ignore[import-not-found]

        changed.append(1)
        return this_module_is_made_up is sys

    def with_module() -> bool:
        sys.modules["this_module_is_made_up"] = sys
        return call()

    assert in_child(with_module)
    assert changed == [] and "this_module_is_made_up" not in sys.modules


@pytest.mark.parametrize("error", ERRORS)
def test_errors_of_lowmem_come_back_as_they_are(forks: None, error: type[LowmemError]) -> None:
    message = "recipe.yaml: model.dim\\n: found 7 \x1b; " + "long " * 300

    def call() -> None:
        raise error(message) if error is not BudgetError else BudgetError(message, "a\ntable")

    calls = list[int]()
    with pytest.raises(error) as caught:
        in_child(lambda: (calls.append(1), call()))
    assert type(caught.value) is error and str(caught.value) == str(error(message))
    assert calls == [], "it was not called again here"
    if isinstance(caught.value, BudgetError):
        assert caught.value.table == "a\ntable"


def crashes() -> dict[str, Callable[[], Any]]:
    return {
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "exits": lambda: os._exit(3),
        "raises": lambda: 1 // 0,
        "leaves": lambda: sys.exit(2),
        "no pickle": lambda: lambda: None,
    }


@pytest.mark.parametrize("crash", crashes())
def test_a_child_that_fails_in_any_other_way_makes_the_call_be_repeated_here(forks: None, crash: str) -> None:
    here = os.getpid()

    def call() -> Any:
        return "made here" if os.getpid() == here else crashes()[crash]()

    assert in_child(call) == "made here"


def test_an_error_that_is_no_lowmem_error_shows_itself_with_its_traceback(forks: None) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        in_child(crashes()["raises"])
    assert caught.traceback[-1].path == Path(__file__)


def test_a_child_killed_within_its_answer_makes_the_call_be_repeated_here(
    forks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = os.getpid()

    def torn(_: Callable[[], Any], writing: int) -> None:
        os.write(writing, b"\x80\x04torn")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(child, "_answer", torn)
    assert in_child(os.getpid) == here


def test_a_child_computes_after_its_parent_has_started_a_team_of_threads() -> None:
    """A team is not copied, and OpenMP would wait for it for ever."""
    code = "; ".join(
        [
            "import torch",
            "from lowmem.machine.child import in_child",
            "torch.set_num_threads(4)",
            "torch.ones(1 << 20).add_(1)",
            "print(in_child(lambda: float(torch.ones(1 << 20).add_(1).sum())))",
        ]
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("OMP_NUM_THREADS", None)
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            answer, _ = process.communicate(timeout=30)
        finally:  # a child that waits would outlive its parent
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert answer == f"{float(2 << 20)}\n"


def test_with_another_thread_alive_nothing_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, LEFT_BEHIND, raising=False)
    ends = threading.Event()
    thread = threading.Thread(target=ends.wait)
    thread.start()
    try:
        assert in_child(os.getpid) == os.getpid()
    finally:
        ends.set()
        thread.join()


def test_where_the_compiler_is_imported_already_nothing_is_forked(
    forks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, LEFT_BEHIND, torch)
    assert in_child(os.getpid) == os.getpid()


def test_where_cuda_has_begun_nothing_is_forked(forks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert in_child(os.getpid) == os.getpid()


@pytest.mark.parametrize("recipe", ["stdlib-causal", "stdlib-causal-end-to-end"])
def test_a_process_that_plans_and_trains_from_disk_never_imports_torchs_compiler(
    tmp_path: Path, recipe: str
) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("light_child.py"), recipe, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\n", done.stdout
