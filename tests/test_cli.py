"""The command line: exit codes, one-line errors, one JSON object, and nothing heavy loaded for the light
verbs.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import as_overrides

from lowmem import __version__, cli

REPORT_FIELDS = {
    "": ["method", "recipe", "profile", "device_type", "metrics", "digest"],
    "budget": ["device_bytes", "host_bytes", "disk_bytes"],
    "predicted": ["device_peak_bytes", "host_peak_bytes", "disk_bytes", "by_category"],
    "measured": ["device_peak_bytes", "host_peak_bytes", "disk_bytes"],
    "time": ["total_s", "compute_s", "exposed_transfer_s", "commit_s"],
    "traffic": ["host_to_device_bytes", "device_to_host_bytes", "disk_read_bytes", "disk_written_bytes"],
    "stream": [
        "compute_s",
        "exposed_s",
        "exposed_share",
        "disk_read_bytes_per_s",
        "disk_written_bytes_per_s",
        "disk_written_bytes_per_step",
        "advice",
    ],
    "progress": ["visits_done", "visits_total", "steps_done"],
}


def lowmem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["lowmem", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: lowmem(monkeypatch, capsys, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["profiles"], ["recipes"], ["status", "RUN"], ["report", "RUN"]],
)
def test_light_verbs_answer_without_loading_torch(arguments: list[str], trained: Path) -> None:
    lines = ["import sys", "from lowmem import cli", "try: cli.main()"]
    lines += ["except SystemExit as e: assert not e.code, e.code", "assert 'torch' not in sys.modules"]
    program = "\n".join(lines)
    command = [
        sys.executable,
        "-c",
        program,
        *(str(trained) if word == "RUN" else word for word in arguments),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("did you mean 'digits-vit'", ["train", "digit-vit"]),
        ("did you mean 'rtx-4060-laptop-8gb'", ["train", "digits-vit", "--profile", "rtx4060"]),
        ("did you mean 'lr'", ["train", "digits-vit", "--set", "train.lrr=1"]),
        ("train.lr: found 'fast'", ["plan", "digits-vit", "--set", "train.lr=fast"]),
        ("unknown key 'data.pth'", ["train", "digits-vit", "--set", "data.pth=x"]),
        ("did you mean 'vit'", ["train", "digits-vit", "--set", "model.name=vti"]),
        ("did you mean 'patch_size'", ["train", "digits-vit", "--set", "model.patchsize=2"]),
        ("leaves no core", ["train", "stdlib-recurrent", "--set", "model.num_layers=1"]),
        ("allowed without model.image_drop: 1", ["train", "digits-vit", "--set", "eval.guidance=2"]),
        ("model.num_layers: found 0", ["train", "digits-vit", "--set", "model.num_layers=0"]),
        ("blocks.num_blocks: found 9", ["train", "digits-vit", "--set", "blocks.num_blocks=9"]),
        ("did you mean 'trackio'", ["train", "digits-vit", "--log-to", "trackyo"]),
        ("scikit-learn, which is not installed; install the extra", ["train", "digits-vit"]),
        ("transformers, which is not installed; install the extra", ["finetune", "model", "rows.jsonl"]),
    ],
)
def test_mistakes_and_missing_packages_are_told_before_torch_is_loaded(
    words: str, arguments: list[str]
) -> None:
    """Counts what the command has imported: no module of torch, and none that takes long."""
    absent = ["sklearn", "transformers"] if "not installed" in words else []
    lines = ["import sys", "from lowmem import cli"]
    lines += [f"sys.modules['{name}'] = None" for name in absent]
    lines += ["try: cli.main()", "except SystemExit as e: assert e.code == 2, e.code"]
    lines += ["heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'pandas', 'matplotlib', 'PIL'}"]
    lines += ["loaded = {name for name, module in sys.modules.items() if module is not None}"]
    lines += ["print(sorted(heavy & loaded), len(loaded))"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", "\n".join(lines), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr
    heavy, count = done.stdout.rsplit(maxsplit=1)
    assert heavy == "[]" and int(count) < 1000, done.stdout


def test_dry_run_prints_the_plan_and_writes_nothing(run: Any, tmp_path: Path) -> None:
    code, out, _ = run("train", "digits-vit", "--profile", "cpu-4gib", "--dry-run")
    assert code == 0
    assert "activations" in out and "fits" in out
    assert list(tmp_path.iterdir()) == []


def test_a_budget_too_small_exits_3_with_the_table_the_largest_part_and_the_cure(
    run: Any, tmp_path: Path
) -> None:
    code, out, err = run(
        "train",
        "digits-vit",
        "--profile",
        "gtx-1650-4gb",
        "--set",
        "model.dim=4096",
        "--set",
        "train.recompute=false",
    )
    assert code == 3
    assert "DOES NOT FIT" in out and "optimizer state" in out
    assert "Largest part: " in err and "Try " in err and len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "digit-vit"], "did you mean 'digits-vit'?"),
        (["train", "digits-vit", "--profile", "cpu-4gb"], "did you mean 'cpu-4gib'?"),
        (
            ["train", "digits-vit", "--profile", "cpu-4gib", "--set", "train.lrr=1.0"],
            "unknown key 'train.lrr'; did you mean 'lr'?",
        ),
        (
            ["train", "digits-vit", "--profile", "cpu-4gib", "--set", "train.precision=bf16"],
            "did you mean 'bfloat16'?",
        ),
        (
            ["train", "digits-vit", "--profile", "cpu-4gib", "--set", "optimizer.name=adam8bit"],
            "did you mean 'adamw8bit'?",
        ),
        (
            ["train", "digits-vit", "--profile", "cpu-4gib", "--set", "train.lr='3e-4'"],
            "write the number 3.0e-4",
        ),
        (["train", "digits-vit", "--profile", "rtx4060"], "did you mean 'rtx-4060-laptop-8gb'?"),
        (["train", "digits-vit", "--set", "data.path=notes.txt"], "as in --set data.name=text"),
        (["train", "digits-vit", "--profile", "rtx-3060-12gb"], "needs a CUDA device"),
        (
            [
                "train",
                "digits-vit-end-to-end",
                "--profile",
                "cpu-4gib",
                "--set",
                "offload.tier=disk",
                "--set",
                "blocks.num_blocks=1",
            ],
            "allowed with method end_to_end and blocks.num_blocks 1: device",
        ),
        (
            ["train", "digits-vit", "--profile", "cpu-4gib", "--set", "optimizer.clip=global"],
            "allowed with method diffusion_blocks: block",
        ),
        (["report", "nowhere"], "no plan.json"),
        (["status", "nowhere"], "no plan.json"),
        (["eval", "nowhere"], "no plan.json"),
    ],
)
def test_bad_input_exits_2_with_one_line_and_writes_nothing(
    run: Any, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, out, err = run(*arguments)
    if message == "needs a CUDA device":
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has the device")
    assert code == 2
    assert message in err and err.startswith("error: ") and len(err.strip().splitlines()) == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_verb_or_option_exits_2(run: Any) -> None:
    assert run("trian")[0] == 2
    assert run("train", "digits-vit", "--profil", "x")[0] == 2


def test_the_bare_command_shows_the_help_and_the_version_is_an_option(run: Any) -> None:
    code, out, err = run()
    assert code == 0 and "Usage: lowmem" in out and "finetune" in out and err == ""
    assert run("--version") == (0, f"lowmem {__version__}\n", "")


def test_a_reader_that_goes_after_the_first_line_makes_no_error() -> None:
    """As `lowmem recipes | head -1` does, also where each line is written at once."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "lowmem", "recipes"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (0, b"")


@pytest.mark.parametrize(
    ("words", "found"),
    [("lowmem train digits-v", "digits-vit"), ("lowmem plan digits-vit --profile cpu-4", "cpu-4gib")],
)
def test_a_shell_completes_names_of_recipes_and_machines(words: str, found: str) -> None:
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    environment = {
        **os.environ,
        **asked,
        "_LOWMEM_COMPLETE": "complete_bash",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    program = "import sys; sys.argv[0] = 'lowmem'; from lowmem.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60
    )
    assert found in done.stdout.split(), done.stderr


def test_report_json_has_every_field_of_the_contract(run: Any, trained: Path) -> None:
    code, out, _ = run("report", str(trained), "--json")
    content = json.loads(out)
    assert code == 0
    for section, names in REPORT_FIELDS.items():
        assert all(name in (content[section] if section else content) for name in names)
    assert {"block", "visits", "steps", "loss", "predicted_peak_bytes", "measured_peak_bytes"} <= content[
        "blocks"
    ][0].keys()
    assert sum(content["predicted"]["by_category"].values()) == content["predicted"]["device_peak_bytes"]
    assert content["metrics"]["value"] > 0.9


def test_plan_json_has_budget_predicted_and_fits(run: Any) -> None:
    code, out, _ = run("plan", "digits-vit", "--profile", "cpu-4gib", "--json")
    content = json.loads(out)
    assert code == 0 and content["fits"] is True
    assert content["budget"]["device_bytes"] == 3 * 1024**3
    assert content["predicted"]["device_peak_bytes"] > 0


def test_eval_json_has_the_metric_each_block_and_each_level_with_true_and_shuffled_input(
    run: Any, trained: Path
) -> None:
    code, out, _ = run("eval", str(trained), "--json")
    content = json.loads(out)
    assert code == 0
    assert content["metric"] == "accuracy" and 0.9 < content["value"] <= 1
    assert len(content["per_block"]) == 3
    assert content["sigma_max_ce"] > 0
    assert all({"sigma", "ce", "ce_shuffled"} <= level.keys() for level in content["levels"])


def test_the_same_command_on_a_finished_run_says_so_and_exits_0(run: Any, trained: Path) -> None:
    overrides = [word for setting in as_overrides(offload__tier="disk") for word in ("--set", setting)]
    code, _, err = run("train", "digits-vit", "--profile", "cpu-4gib", "--run-dir", str(trained), *overrides)
    assert code == 0
    assert "this run is finished" in err
    code, _, err = run("train", "digits-vit", "--run-dir", str(trained))
    assert code == 2 and "made with" in err


def test_a_truncated_block_exits_1_naming_file_and_sizes(run: Any, trained: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(trained, tmp_path / "copy")
    block = next((tmp_path / "copy").glob("block-0001*"))
    size = block.stat().st_size
    with open(block, "r+b") as file:
        file.truncate(size // 2)
    code, _, err = run("eval", str(tmp_path / "copy"))
    assert code == 1
    assert (
        block.name in err
        and f"expected {size} bytes, found {size // 2} bytes" in err
        and len(err.strip().splitlines()) == 1
    )


def test_status_shows_blocks_and_memory_of_a_finished_run(run: Any, trained: Path) -> None:
    code, out, _ = run("status", str(trained))
    assert code == 0
    assert "finished" in out and len(re.findall(r"block \d", out)) == 3 and "memory" in out
    assert json.loads(run("status", str(trained), "--json")[1])["state"] == "finished"


SWALLOWING = """
import os, signal, sys, weakref
import lowmem.training.attempt
record_step = lowmem.training.attempt.Attempt.record_step

class Thing:
    pass

def swallow(_):
    os.kill(os.getpid(), signal.SIGINT)  # arrives in a callback whose exceptions Python prints and drops

def once(self, visit, step, *rest):
    if visit.index == 1 and step == visit.first_step:
        thing = Thing()
        reference = weakref.ref(thing, swallow)
        del thing
    record_step(self, visit, step, *rest)

lowmem.training.attempt.Attempt.record_step = once
from lowmem.cli import main
main()
"""


def test_an_interrupt_that_python_drops_in_a_callback_stops_the_run_all_the_same(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        SWALLOWING,
        "train",
        "digits-vit",
        "--profile",
        "cpu-4gib",
        "--run-dir",
        str(tmp_path / "run"),
        "--quiet",
    ]
    command += ["--set", "blocks.visit_steps=5", "--set", "optimizer.name=adamw"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert "Exception ignored" in done.stderr
    assert done.returncode == 130
    assert json.loads((tmp_path / "run" / "state.json").read_text())["visits_done"] == 1


def test_ctrl_c_keeps_what_is_committed_and_exits_130(tmp_path: Path) -> None:
    import signal

    command = [
        sys.executable,
        "-m",
        "lowmem",
        "train",
        "digits-vit",
        "--profile",
        "cpu-4gib",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    command += ["--set", "blocks.visit_steps=5", "--set", "optimizer.name=adamw"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        for _ in range(600):
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                state = tmp_path / "run" / "state.json"
                if state.exists() and json.loads(state.read_text())["visits_done"] >= 2:
                    break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again" in err and "Traceback" not in err
    assert json.loads((tmp_path / "run" / "state.json").read_text())["visits_done"] >= 2


def test_profiles_and_recipes_are_listed_and_shown(run: Any) -> None:
    assert "cpu-4gib" in run("profiles")[1]
    assert "memory_gib" in run("profiles", "cpu-4gib")[1]
    assert "digits-vit" in run("recipes")[1]
    assert "diffusion_blocks" in run("recipes", "digits-vit")[1]


def test_env_and_detect_describe_this_machine(run: Any, tmp_path: Path) -> None:
    assert json.loads(run("env", "--json")[1])["packages"]["torch"]
    assert run("detect", "--out", str(tmp_path / "mine.yaml"))[0] == 0
    assert "detected" in run("profiles", str(tmp_path / "mine.yaml"))[1]
    assert run("detect", "--out", str(tmp_path / "mine.yaml"))[0] == 2


def test_the_handlers_of_signals_are_put_back_when_a_command_ends(run: Any) -> None:
    def own(*_: Any) -> None: ...

    before = {number: signal.signal(number, own) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for arguments in (["profiles"], ["plan", "no-such-recipe"], ["--no-such-option"]):
            run(*arguments)
            assert [signal.getsignal(number) for number in before] == [own, own], arguments
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_verify_and_recover_say_what_they_found_and_exit_as_documented(run: Any, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    for verb in ("verify", "recover"):
        code, _, err = run(verb, str(tmp_path))
        assert code == 2 and "this version reads schema 2" in err
