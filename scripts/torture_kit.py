"""What `scripts/torture` shares: small runs, commands in forked children, and what must hold after each of
them.

The parent imports everything once and computes nothing, so a child starts in milliseconds and has no threads
to lose.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import pkgutil
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lowmem
from lowmem import cli, job
from lowmem.blocks.run_dir import RunDir
from lowmem.planning.plan import Plan
from lowmem.reporting.report import digest

LIMIT_S = 60.0  # a command that takes longer hangs
MOST_LINE = 800  # characters of a message
EXIT_CODES = (0, 1, 2, 3, 130)
BLOCKS, STEPS = 2, 3
SETTINGS = [
    "model={name: causal_lm, num_layers: 2, dim: 16, num_heads: 2, noisy_input: none}",
    f"blocks={{num_blocks: {BLOCKS}, visit_steps: 1}}",
    f"train={{num_steps: {STEPS}, batch_size: 2, seq_len: 8, lr: 1.0e-3}}",
    "train.precision=float32",
    "train.recompute=false",
    "optimizer={name: adamw}",
    "eval={batch_size: 4, num_batches: 1}",
]

# What a command imports on its way: in the parent, once, because it takes a child longer than its training.
LATE_IMPORTS = ("torch._dynamo", "torch._inductor")


def import_all() -> None:
    for module in pkgutil.walk_packages(lowmem.__path__, "lowmem."):
        if module.name != "lowmem.__main__":
            importlib.import_module(module.name)
    for name in LATE_IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


@dataclass
class Outcome:
    code: int  # 124: it hung
    out: str
    err: str

    def problem(self) -> str | None:
        """What no command may do, whatever it is given."""
        if self.code == 124:
            return "hangs"
        if self.code < 0:
            return f"dies of signal {-self.code}"
        if "Traceback (most recent call last)" in self.out + self.err:
            return "traceback"
        if "does not foresee" in self.err:  # the last resort of the command line: a traceback in a file
            return "an exception that is not foreseen"
        if self.code not in EXIT_CODES:
            return f"exit code {self.code}"
        lines = self.err.strip().splitlines()
        if self.code and not (lines and lines[-1].startswith(("error:", "interrupted", "Error"))):
            return f"exit code {self.code} without a line that says why"
        if self.code and len(lines[-1]) > MOST_LINE:
            return f"a message of {len(lines[-1])} characters"
        return None


@dataclass
class Tally:
    """Cases and faults of one part."""

    name: str
    cases: int = 0
    faults: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    taken_s: float | None = None

    def check(self, what: str, found: str | None) -> None:
        self.cases += 1
        if found:
            self.faults.append(f"{what}: {found}")

    def row(self) -> dict[str, Any]:
        """Called when the part has ended, and again for the file."""
        if self.taken_s is None:
            self.taken_s = round(time.monotonic() - self.started, 1)
        return {"part": self.name, "cases": self.cases, "faults": len(self.faults), "wall_s": self.taken_s}


def in_child(call: Callable[[], int], folder: Path, limit_s: float = LIMIT_S) -> Outcome:
    """Runs `call` in a forked child whose output goes to files. Returns its exit code and output."""
    names = [folder / f"{os.getpid()}.{way}" for way in ("out", "err")]
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            for handle, name in zip((1, 2), names, strict=True):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), handle)
            sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0, closefd=False), write_through=True)
            sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0, closefd=False), write_through=True)
            code = call()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code & 0xFF)
    code = _waited(child, limit_s)
    out, err = (name.read_text(errors="replace") if name.exists() else "" for name in names)
    return Outcome(code, out, err)


def _waited(child: int, limit_s: float) -> int:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 124


def command(*arguments: str) -> Callable[[], int]:
    def call() -> int:
        import torch

        torch.set_num_threads(1)
        sys.argv = ["lowmem", *arguments]
        cli.main()

    return call


class Bench:
    """A folder to work in: a text, a finished run, a stopped run, and things that no command may touch."""

    def __init__(self, root: Path, method: str = "diffusion_blocks", tier: str = "disk") -> None:
        import_all()
        self.root, self.outside = root, root / "outside"
        self.outside.mkdir(parents=True, exist_ok=True)
        (self.outside / "precious.safetensors").write_bytes(os.urandom(100))
        (self.outside / "precious.json").write_text("{}")
        self.text = root / "text.txt"
        if not self.text.exists():
            self.text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
        self.recipe = "stdlib-causal" if method == "diffusion_blocks" else "stdlib-causal-end-to-end"
        data = f"data={{name: text, path: {self.text}, tokenizer: bytes}}"
        # Of two layers that stream end to end, one stays in memory.
        self.settings = [*SETTINGS, data, f"offload={{tier: {tier}, resident_layers: 1}}"]
        self.name = f"{method}-{tier}"

    def arguments(self, run: Path) -> list[str]:
        sets = [part for setting in self.settings for part in ("--set", setting)]
        return ["train", self.recipe, "--profile", "cpu-4gib", "--quiet", "--run-dir", str(run), *sets]

    def plan(self) -> Plan:
        return job.plan_recipe(self.recipe, "cpu-4gib", self.settings)

    def finished(self) -> Path:
        run = self.root / f"finished-{self.name}"
        if not run.exists():
            outcome = in_child(command(*self.arguments(run)), self.root, 300)
            assert outcome.code == 0, outcome.err
        return run

    def stopped(self, visits: int = 3) -> Path:
        """A run that was interrupted after some commits."""
        run = self.root / f"stopped-{self.name}"
        if run.exists():
            return run

        def stop(record: dict[str, Any]) -> None:
            if record["event"] == "visit" and record["visit"] == visits:
                raise KeyboardInterrupt

        def call() -> int:
            import torch

            torch.set_num_threads(1)
            with contextlib.suppress(KeyboardInterrupt):
                job.train(self.recipe, "cpu-4gib", run, self.settings, [stop])
            return 0

        assert in_child(call, self.root, 300).code == 0
        return run

    def copy(self, run: Path) -> Path:
        copied = self.root / "case"
        remove(copied)
        shutil.copytree(run, copied, symlinks=True)
        (copied / "mine.safetensors").write_bytes(b"a user's own file")
        return copied


def remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        for folder, _, _ in os.walk(path):
            os.chmod(folder, 0o700)
        shutil.rmtree(path)


def digest_of(run: Path) -> str | None:
    state = RunDir(run).read_state()
    return None if state is None else digest(state)


def snapshot(folder: Path, left_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Every file's name and content, links as links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(left_out) and left_out:
            continue
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file() and path.stat().st_size < 1 << 24:
            with contextlib.suppress(OSError):
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def loaded_json(text: str) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(text, parse_constant=lambda name: _refused(name))
    return None


def _refused(name: str) -> Iterator[None]:
    raise ValueError(f"{name} is not JSON")
