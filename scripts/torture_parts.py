"""The parts of `scripts/torture`: what is done to a run, and what must hold afterwards."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torture_kit as kit
from torture_kit import Bench, Tally, command, in_child

LOOKS = ("status", "report", "verify")  # commands that change nothing


# ------------------------------------------------------------------------------------------------------------
# Damage to every file, and hostile folders


def damages(path: Path, bench: Bench, rng: random.Random) -> dict[str, Callable[[], None]]:
    """Ways to damage one file of a run."""
    content = path.read_bytes()

    def flipped() -> None:
        place = rng.randrange(max(len(content), 1))
        changed = bytes([content[place] ^ (1 << rng.randrange(8))]) if content else b"x"
        path.write_bytes(content[:place] + changed + content[place + 1 :])

    def digit() -> None:
        """One digit of a number becomes another, as a hand or a disk may do."""
        places = [n for n, byte in enumerate(content) if 48 <= byte <= 57] or [0]
        place = rng.choice(places)
        path.write_bytes(content[:place] + b"%d" % rng.randrange(10) + content[place + 1 :])

    def replaced(make: Callable[[], None]) -> Callable[[], None]:
        def replace() -> None:
            path.unlink()
            make()

        return replace

    return {
        "flip": flipped,
        "digit": digit,
        "empty": lambda: path.write_bytes(b"") and None,
        "half": lambda: path.write_bytes(content[: len(content) // 2]) and None,
        "longer": lambda: path.write_bytes(content + b"\0" * 17) and None,
        "garbage": lambda: path.write_bytes(rng.randbytes(max(len(content), 64))) and None,
        "gone": path.unlink,
        "folder": replaced(path.mkdir),
        "link": replaced(lambda: path.symlink_to(bench.outside / "precious.json")),
        "dangling": replaced(lambda: path.symlink_to(bench.root / "nowhere")),
        "pipe": replaced(lambda: os.mkfifo(path)),
        "device": replaced(lambda: path.symlink_to("/dev/zero")),
        "deep": lambda: path.write_text("[" * 5000) and None,
        "digits": lambda: path.write_text('{"schema": ' + "9" * 6000 + "}") and None,
        "nan": lambda: path.write_text('{"schema": NaN}') and None,
        "list": lambda: path.write_text("[1, 2]") and None,
        "sparse": lambda: os.truncate(path, 1 << 33),
    }


def damage(bench: Bench, rng: random.Random, most: int) -> Tally:
    """Every file × every damage × every command, in random order, up to `most` folders."""
    tally = Tally(f"damage, {bench.name}")
    runs = {"finished": bench.finished(), "stopped": bench.stopped()}
    truth = {name: reference(bench, run) for name, run in runs.items()}
    files = [path.name for path in sorted(runs["stopped"].iterdir()) if path.is_file()]
    cases = [
        (which, file, kind, verb)
        for which in runs
        for file in files
        for kind in damages(runs["stopped"] / files[0], bench, rng)
        for verb in (*LOOKS, "eval", "sample", "export", "train", "page")
    ]
    rng.shuffle(cases)
    for which, file, kind, verb in cases[:most]:
        run = bench.copy(runs[which])
        victims = [path for path in run.iterdir() if path.name.startswith(file.partition(".")[0])]
        if not victims or not victims[0].is_file():
            continue
        damages(victims[0], bench, rng)[kind]()
        tally.check(
            f"{verb} of a {which} run, {victims[0].name} {kind}", after(bench, run, verb, truth[which])
        )
    return tally


def reference(bench: Bench, run: Path) -> dict[str, Any]:
    """What an undamaged run gives: the digest at its end, and its evaluation now."""
    copied = bench.copy(run)
    evaluated = in_child(command("eval", str(copied), "--json"), bench.root)
    assert evaluated.code == 0, evaluated.err
    ended = in_child(command(*bench.arguments(copied)), bench.root, 300)
    assert ended.code == 0, ended.err
    return {"digest": kit.digest_of(copied), "eval": json.loads(evaluated.out)}


def after(bench: Bench, run: Path, verb: str, truth: dict[str, Any]) -> str | None:
    """Runs a command on a damaged folder. Returns what is wrong with what it did, or None."""
    out = bench.root / "written"
    kit.remove(out)
    arguments = {
        "train": bench.arguments(run),
        "sample": ["sample", str(run), "--out", str(out), "--tokens", "2", "--num", "1"],
        "export": ["export", str(run), str(out)],
        "eval": ["eval", str(run), "--json"],
        "page": ["report", str(run), "--html", str(out)],
    }.get(verb, [verb, str(run), "--json"])
    outside, inside = kit.snapshot(bench.outside), kit.snapshot(run)
    outcome = in_child(command(*arguments), bench.root)
    found = outcome.problem()
    told = verb == "verify" and outcome.code == 1 and kit.loaded_json(outcome.out) is not None
    if found and not told:  # `verify` says on stdout what is damaged
        return f"{found}; {outcome.err.strip()[-300:]}"
    if kit.snapshot(bench.outside) != outside:
        return "a file outside the folder was changed"
    now = kit.snapshot(run)
    if now.get("mine.safetensors") != inside["mine.safetensors"]:
        return "a file that is not the run's was changed"
    if verb != "train" and now != inside:
        return f"a command that only looks changed {sorted(set(now.items()) ^ set(inside.items()))[:2]}"
    if outcome.code == 0 and verb == "train" and kit.digest_of(run) != truth["digest"]:
        return "exit code 0 and another digest"
    if outcome.code == 0 and verb == "eval" and json.loads(outcome.out) != truth["eval"]:
        return "exit code 0 and another evaluation"
    return None


# ------------------------------------------------------------------------------------------------------------
# Kills and faults at every file operation


class Operations:
    """Counts the file operations of this process below `folder`, and acts at one of them."""

    def __init__(self, folder: Path, at: int | None, act: str) -> None:
        self.count, self._folder, self._at, self._act = 0, str(folder), at, act
        self._lock = threading.Lock()

    def install(self) -> None:
        for name in ("open", "fsync", "replace", "unlink", "mkdir", "pwrite"):
            setattr(os, name, self._wrapped(getattr(os, name)))
        plain, operations = io.FileIO, self

        class File(plain):  # type: ignore[misc,valid-type]
            def write(self, data: Any) -> Any:
                return operations.run(lambda: plain.write(self, data), lambda: plain.write(self, data[:512]))

        io.FileIO = File  # type: ignore[misc]

    def _wrapped(self, function: Any) -> Any:
        def operation(*arguments: Any, **options: Any) -> Any:
            inside = isinstance(arguments[0], int) or self._folder in os.fspath(arguments[0])
            return (
                self.run(lambda: function(*arguments, **options))
                if inside
                else function(*arguments, **options)
            )

        return operation

    def run(self, whole: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        with self._lock:
            mine = self.count == self._at
            self.count += 1
        if not mine:
            return whole()
        if self._act in errno.errorcode.values():
            number = getattr(errno, self._act)
            raise OSError(number, os.strerror(number))
        if self._act == "half" and half is not None:
            half()
        if self._act == "after":
            whole()
        os.kill(os.getpid(), signal.SIGKILL)
        return None


def trained(bench: Bench, run: Path, operations: Any) -> Callable[[], int]:
    """A child that trains in `run`; with `operations` it counts them, or is hit by one."""

    def call() -> int:
        if operations is not None:
            operations.install()
        code = 0
        try:
            command(*bench.arguments(run))()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        if isinstance(operations, Operations) and operations._at is None:
            (bench.root / "count").write_text(str(operations.count))
        return code

    return call


def prepared(bench: Bench) -> Path:
    """A folder with a plan alone: planning takes a second, and has no part in what is tortured here."""
    run, planned = bench.root / "case", bench.root / f"planned-{bench.name}"
    if not planned.exists():
        first = bench.finished()
        planned.mkdir()
        (planned / "plan.json").write_bytes((first / "plan.json").read_bytes())
    kit.remove(run)
    run.mkdir()
    (run / "plan.json").write_bytes((planned / "plan.json").read_bytes())
    return run


def struck(bench: Bench, rng: random.Random, acts: tuple[str, ...], most: int, name: str) -> Tally:
    """Each act at every file operation of a run; the run then goes on by the same command."""
    tally, wanted = Tally(f"{name}, {bench.name}"), kit.digest_of(bench.finished())
    outcome = in_child(trained(bench, prepared(bench), Operations(bench.root / "case", None, "")), bench.root)
    assert outcome.code == 0, outcome.err
    total = int((bench.root / "count").read_text())
    cases = [(at, act) for at in range(total) for act in acts]
    rng.shuffle(cases)
    for at, act in cases[:most]:
        run = prepared(bench)
        (run / "mine.safetensors").write_bytes(b"a user's own file")
        mine = kit.snapshot(run)["mine.safetensors"]
        first = in_child(trained(bench, run, Operations(run, at, act)), bench.root)
        found = None if first.code == -signal.SIGKILL else first.problem()
        if found is None:
            again = in_child(command(*bench.arguments(run)), bench.root)
            found = again.problem() or (
                f"the next command: {again.err.strip()[-200:]}" if again.code else None
            )
        if found is None and kit.digest_of(run) != wanted:
            found = "another digest"
        if found is None and kit.snapshot(run).get("mine.safetensors") != mine:
            found = "a file that is not the run's was changed"
        tally.check(f"{act} at operation {at} of {total}", found)
    return tally


def kills(bench: Bench, rng: random.Random, most: int) -> Tally:
    return struck(bench, rng, ("before", "half", "after"), most, "kill -9")


def faults(bench: Bench, rng: random.Random, most: int) -> Tally:
    return struck(bench, rng, ("ENOSPC", "EIO", "EACCES"), most, "disk faults")


def two_at_once(bench: Bench, rng: random.Random, most: int) -> Tally:
    """A second process in the same folder, while the first is between two steps."""
    tally, wanted = Tally(f"two processes, {bench.name}"), kit.digest_of(bench.finished())
    for _ in range(most):
        run, stop_at = prepared(bench), rng.randrange(1, 6)

        def first(run: Path = run, stop_at: int = stop_at) -> int:
            from lowmem import job

            def second(record: dict[str, Any]) -> None:
                if record["event"] == "visit" and record["visit"] == stop_at:
                    other = in_child(command(*bench.arguments(run)), bench.root)
                    assert other.code == 2 and "another process is training" in other.err, other
                    looked = in_child(command("status", str(run), "--json"), bench.root)
                    assert looked.code == 0 and json.loads(looked.out)["state"] == "running", looked

            job.train(bench.recipe, "cpu-4gib", run, bench.settings, [second])
            return 0

        outcome = in_child(first, bench.root)
        found = None if outcome.code == 0 else f"{outcome.code} {outcome.err[-300:]}"
        tally.check(
            f"at visit {stop_at}", found or (None if kit.digest_of(run) == wanted else "another digest")
        )
    return tally


# ------------------------------------------------------------------------------------------------------------
# Recipes, profiles and overrides that nobody would write


def generated(bench: Bench, seed: int, most: int) -> Tally:
    """Recipes, profiles and `--set` values from hypothesis: each is taken, or refused in one line."""
    import yaml
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    from lowmem.errors import LowmemError
    from lowmem.machine.profile import load_profile, profile_from_dict
    from lowmem.recipe import load_recipe, recipe_from_dict

    tally = Tally("generated recipes, profiles and --set")
    recipe = load_recipe("stdlib-causal").to_dict()
    profile = load_profile("rtx-4060-laptop-8gb").model_dump(mode="json", by_alias=True)
    scalars = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**30), 10**30),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from(["auto", "1e400", "0x10", "1:30", "010", "\x1b[2J", "../../etc", "~", ".nan", "<<"]),
    )
    values = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
        max_leaves=6,
    )

    def paths(raw: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        for key, value in raw.items():
            yield (*at, key)
            if isinstance(value, dict):
                yield from paths(value, (*at, key))

    def changed(raw: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
        copied = json.loads(json.dumps(raw))
        inner = copied
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return copied

    def refused_well(what: str, call: Callable[[], Any]) -> None:
        found = None
        try:
            call()
        except LowmemError as error:
            text = str(error)
            if "\n" in text or len(text) > kit.MOST_LINE or not text.isprintable():
                found = f"not one printable line: {text[:120]!r}"
        except Exception as error:
            found = f"{type(error).__name__}: {str(error)[:120]}"
        tally.check(what, found)

    options = {"max_examples": most // 3, "deadline": None, "database": None}
    quiet = settings(**options, suppress_health_check=list(HealthCheck))

    @seeded(seed)
    @quiet
    @given(st.sampled_from(sorted(paths(recipe))), values)
    def recipes(path: tuple[str, ...], value: Any) -> None:
        refused_well(
            f"recipe {'.'.join(path)}", lambda: recipe_from_dict(changed(recipe, path, value), "recipe x")
        )

    @seeded(seed)
    @quiet
    @given(st.sampled_from(sorted(paths(profile))), values)
    def profiles(path: tuple[str, ...], value: Any) -> None:
        refused_well(
            f"profile {'.'.join(path)}", lambda: profile_from_dict(changed(profile, path, value), "profile x")
        )

    @seeded(seed)
    @quiet
    @given(
        st.sampled_from(sorted(paths(recipe))),
        st.one_of(st.text(max_size=30), values.map(lambda v: yaml.safe_dump(v))),
    )
    def overrides(path: tuple[str, ...], text: str) -> None:
        refused_well(
            f"--set {'.'.join(path)}", lambda: load_recipe("stdlib-causal", [f"{'.'.join(path)}={text}"])
        )

    for part in (recipes, profiles, overrides):
        part()
    return tally
