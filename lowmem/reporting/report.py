"""Reports what a run took and achieved: predicted memory against measured, time, traffic, metrics.

The report is a function of the run folder alone. It reads `plan.json` and `state.json`, and loads neither
torch nor weights.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.blocks.order import BlockQueue
from lowmem.blocks.run_dir import RunDir, RunState
from lowmem.blocks.traffic import Traffic
from lowmem.errors import StoreError
from lowmem.reporting.moving import WAYS, moving_figures
from lowmem.reporting.records import BASE, read_run
from lowmem.reporting.tables import as_html, fitted, text_table
from lowmem.reporting.telemetry import read_records
from lowmem.schema import parse
from lowmem.units import arithmetic_text, counted, format_bytes, format_seconds

EXTRA_METRICS = (
    "value_std_error",
    "joint_accuracy",
    "sigma_max_ce",
    "cross_entropy",
    "perplexity",
    "class_accuracy",
    "frechet_train_test",
)
PREDICTED = ("device_peak_bytes", "host_peak_bytes", "disk_bytes", "by_category", "host_by_category")
# the last is the device's peak during evaluation, after training
MEASURED = ("device_peak_bytes", "host_peak_bytes", "disk_bytes", "evaluation_peak_bytes")
ENDURANCE_BYTES = 600 * 10**12  # that a common drive of one terabyte is made to have written (its TBW)
TIMES = ("total_s", "compute_s", "exposed_transfer_s", "commit_s")
MEMORY_COLUMNS = ("memory", "budget", "predicted", "measured", "difference")
BLOCK_COLUMNS = ("block", "visits", "steps", "loss", "predicted peak", "measured peak")
RANK_COLUMNS = ("rank", "device peak", "host peak", "sent to other ranks")
COMPARISON_COLUMNS = (
    "run",
    "method",
    "result",
    "steps",
    "predicted peak",
    "measured peak",
    "time",
    "exposed",
    "written",
)


# ------------------------------------------------------------------------------------------------------------
# Reading a run folder


def read_report(run_dir: str | os.PathLike[str]) -> Report:
    """The report of a run. Raises ResumeError if the folder holds no run, StoreError if its plan or state is
    not readable.
    """
    run = RunDir(run_dir)
    plan, state = read_run(run)
    recipe, settings, predicted = plan["recipe"], plan["settings"], plan["predicted"]
    if state.micro_batch_size is not None:
        settings = {**settings, "micro_batch_size": state.micro_batch_size}
    queue = BlockQueue.of(recipe, settings["num_blocks"])
    content = {
        "method": recipe["method"],
        "recipe": recipe,
        "profile": plan["profile"],
        "device_type": plan["profile"]["device"]["type"],
        "settings": settings,
        "num_parameters": plan["num_parameters"],
        "budget": plan["budget"],
        "predicted": {
            **{name: predicted[name] for name in PREDICTED},
            "traffic": _unbroken_traffic(run, predicted.get("traffic"), queue),
            "time": predicted.get("time"),
            "evaluation": predicted.get("evaluation"),
        },
        "measured": {name: state.measured.get(name, 0) for name in MEASURED},
        "blocks": [
            {**record.model_dump(), "predicted_peak_bytes": predicted["block_peak_bytes"][record.block]}
            for record in state.blocks
        ],
        "ranks": [record.model_dump() for record in state.ranks],
        "time": {name: state.time.get(name, 0.0) for name in TIMES},
        "traffic": state.traffic.model_dump(),
        "stream": moving_figures(plan, state),
        "first_metrics": state.first_metrics,
        "metrics": state.metrics,
        "is_evaluated": plan.get("data") is not None,  # batches that Python gives are not
        "progress": {
            "visits_done": state.visits_done,
            "visits_total": queue.num_visits,
            "steps_done": _steps_done(recipe["method"], state),
            "num_steps": queue.num_steps,
        },
        "digest": digest(state),
    }
    return Report(content)


def _steps_done(method: str, state: RunState) -> int:
    """Optimizer steps over all blocks; a step of a model trained end to end is a step of every block."""
    steps = [block.steps for block in state.blocks]
    return max(steps, default=0) if method == "end_to_end" else sum(steps)


def read_status(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Where a run stands: committed progress, whether a process trains in it now, the last telemetry record.

    Raises as `read_report`.
    """
    run = RunDir(run_dir)
    report = read_report(run_dir).content
    last: dict[str, Any] = {}
    failure: str | None = None  # that the last process ended with, and would meet again
    records = read_records(run.telemetry_path, report["settings"]["num_blocks"])
    for record in records:
        last = record
        if record["event"] in ("open", "failed"):
            failure = record.get("message") if record["event"] == "failed" else None
    visits_done, visits_total = report["progress"]["visits_done"], report["progress"]["visits_total"]
    if run.is_locked():
        state = "evaluating" if last.get("event") == "evaluating" else "running"
    elif visits_done == visits_total and (report["metrics"] or not report["is_evaluated"]):
        state = "finished"
    else:
        state = "stopped"
    return {
        "run": str(Path(run_dir)),
        "state": state,
        **{k: report[k] for k in ("method", "progress", "blocks", "measured", "budget", "metrics")},
        "advice": report["stream"]["advice"],
        "last": last,
        "failure": failure if state == "stopped" else None,
        "skipped_records": records.skipped,
    }


def digest(state: RunState) -> str | None:
    """The sha256 of all weights and optimizer state, None before the first commit.

    It is taken over the digests of the files' data sections: block 0, block 1, ..., the shared part,
    and the frozen base of a run that trains an adapter.
    """
    if not state.files:
        return None
    blocks = (key for key in state.files if key not in ("shared", BASE))
    keys = sorted(blocks, key=lambda key: int(key.partition("-")[2]))
    others = [key for key in ("shared", BASE) if key in state.files]
    return hashlib.sha256("".join(state.files[key].digest for key in [*keys, *others]).encode()).hexdigest()


def _unbroken_traffic(
    run: RunDir, planned: dict[str, Any] | None, queue: BlockQueue
) -> dict[str, int] | None:
    """The traffic that the plan predicts for a run that one process makes from start to end.

    None where the plan predicts none: it does so for models that are trained end to end and stream.
    """
    if planned is None:
        return None
    if planned.get("whole") is not None:  # steps differ
        where = f"{run.plan_path}: predicted.traffic.whole"
        found: Traffic = parse(Traffic, planned["whole"], where, StoreError)
        return found.model_dump()
    start, step, commit = (
        parse(Traffic, planned[part], f"{run.plan_path}: predicted.traffic.{part}", StoreError)
        for part in ("start", "step", "commit")
    )
    where = f"{run.plan_path}: predicted.traffic.before"
    before = parse(Traffic, planned.get("before", {}), where, StoreError)
    sweeps = (queue.num_steps - queue.grow_steps) // int(planned.get("sweep_steps", 1))
    whole: Traffic = before + start + step * sweeps + commit * (queue.num_visits - queue.grow_visits)
    return whole.model_dump()


# ------------------------------------------------------------------------------------------------------------
# One run as text


@dataclass(frozen=True)
class Report:
    """The report of a run. `content` is the JSON object that `lowmem report --json` prints."""

    content: dict[str, Any]

    def _repr_html_(self) -> str:
        return as_html(self.table())

    def table(self) -> str:
        """The report as text: memory, categories, blocks, and closing lines."""
        categories = [
            (name.replace("_", " "), format_bytes(num_bytes))
            for name, num_bytes in self.content["predicted"]["by_category"].items()
        ]
        parts = [
            text_table(f"report: {self.summary()}", MEMORY_COLUMNS, self.memory_rows()),
            text_table("predicted on the device, by category", ("category", "bytes"), categories),
            text_table("blocks", BLOCK_COLUMNS, self.block_rows()),
            *([text_table("ranks", RANK_COLUMNS, self.rank_rows())] if self.content["ranks"] else []),
            "\n".join(fitted(f"{name:<10} {text}", 11) for name, text in self.closing_rows()),
        ]
        return "\n\n".join(parts)

    def summary(self) -> str:
        """One line: method, model, machine and the settings that matter."""
        content, settings = self.content, self.content["settings"]
        return ", ".join(
            [
                content["method"],
                content["recipe"]["model"]["name"],
                f"{content['num_parameters'] / 1e6:.2f} million parameters",
                f"profile {content['profile']['name']}",
                settings["optimizer"],
                self._arithmetic(),
                f"tier {settings['tier']}",
                f"micro-batch {settings['micro_batch_size']}",
                f"recompute {'on' if settings['recompute'] else 'off'}",
            ]
        )

    def _arithmetic(self) -> str:
        recipe = self.content["recipe"]
        scale = recipe.get("optimizer", {}).get("loss_scale", 1.0)
        accumulates = recipe["train"].get("fp16_accumulation", False)
        return arithmetic_text(self.content["settings"]["precision"], scale, accumulates)

    def memory_rows(self) -> list[tuple[str, ...]]:
        """Rows under MEMORY_COLUMNS."""
        content = self.content
        budget, predicted, measured = content["budget"], content["predicted"], content["measured"]
        return [
            (
                name,
                format_bytes(budget[f"{pool}_bytes"]) if budget[f"{pool}_bytes"] is not None else "unknown",
                format_bytes(predicted[key]),
                format_bytes(measured[key]) if measured[key] else "-",
                f"{measured[key] / predicted[key] - 1:+.1%}" if measured[key] else "-",
            )
            for name, pool, key in (
                ("device peak", "device", "device_peak_bytes"),
                ("host peak", "host", "host_peak_bytes"),
                ("disk", "disk", "disk_bytes"),
            )
        ]

    def block_rows(self) -> list[tuple[str, ...]]:
        """Rows under BLOCK_COLUMNS."""
        return [
            (
                str(block["block"]),
                str(block["visits"]),
                str(block["steps"]),
                "-" if block["loss"] is None else f"{block['loss']:.4f}",
                format_bytes(block["predicted_peak_bytes"]),
                format_bytes(block["measured_peak_bytes"]) if block["measured_peak_bytes"] else "-",
            )
            for block in self.content["blocks"]
        ]

    def rank_rows(self) -> list[tuple[str, ...]]:
        """Rows under RANK_COLUMNS, of the last launch."""
        return [
            (
                f"rank {rank['rank']}",
                format_bytes(rank["device_peak_bytes"]),
                format_bytes(rank["host_peak_bytes"]),
                format_bytes(rank["traffic"]["exchanged_bytes"]),
            )
            for rank in self.content["ranks"]
        ]

    def closing_rows(self) -> list[tuple[str, str]]:
        """(name, text): progress, time, traffic, stream, result and digest, as far as the run has them."""
        content = self.content
        rows = [
            ("progress", _progress_text(content)),
            ("time", _time_text(content["time"])),
        ]
        expected, planned = content["predicted"]["time"], content["predicted"]["traffic"]
        if expected:
            run, exposed = format_seconds(expected["run_s"]), format_seconds(expected["exposed_s"])
            rows.append(("expected", f"{run} training, {exposed} exposed in a visit (by the plan)"))
        rows.append(("traffic", _traffic_text(content["traffic"])))
        rows.append(("drive", _wear_text(content["traffic"]["disk_written_bytes"])))
        if planned:
            rows.append(("planned", f"{_traffic_text(planned)} (one process, to the end)"))
        if content["stream"]["exposed_share"] is not None:
            rows.append(("stream", _stream_text(content["stream"])))
        if content["stream"]["advice"]:
            rows.append(("advice", content["stream"]["advice"]))
        evaluation = content["measured"]["evaluation_peak_bytes"]
        if evaluation:
            said = content["predicted"].get("evaluation")
            by_plan = f" ({format_bytes(said['peak_bytes'])} by the plan)" if said else ""
            rows.append(
                ("evaluation", f"peak {format_bytes(evaluation)} on the device, after training{by_plan}")
            )
        if content.get("first_metrics"):
            rows.append(("at first", _result_text(content["first_metrics"])))
        if content["metrics"]:
            rows.append(("result", _result_text(content["metrics"])))
        return [*rows, ("digest", content["digest"] or "-")]


def _progress_text(content: dict[str, Any]) -> str:
    """Steps are counted as the recipe counts them: those of each block."""
    progress, blocks = content["progress"], content["settings"]["num_blocks"]
    each, of_each = steps_of_each(content["method"], progress["steps_done"], blocks)
    visits = counted(progress["visits_total"], "visit")
    return f"{progress['visits_done']} of {visits}, {each} of {progress['num_steps']} steps{of_each}"


def steps_of_each(method: str, steps_done: int, num_blocks: int) -> tuple[int, str]:
    """(steps as `train.num_steps` counts them, the words that say so), from the steps over all blocks."""
    if method == "end_to_end" or num_blocks == 1:
        return steps_done, ""
    return steps_done // num_blocks, f" of each of {num_blocks} blocks"


def _time_text(time: dict[str, float]) -> str:
    total, compute, exposed, commits = (format_seconds(time[name]) for name in TIMES)
    return f"{total} training: compute {compute}, exposed transfer {exposed}, commits {commits}"


def _traffic_text(traffic: dict[str, int]) -> str:
    into, out, read, written = (format_bytes(traffic[f"{way}_bytes"]) for way in WAYS)
    return f"link in {into}, out {out}; disk read {read}, written {written}"


def _wear_text(written_bytes: int) -> str:
    share = written_bytes / ENDURANCE_BYTES
    words = f"{share:.2%}" if share >= 1e-4 else "less than 0.01%"
    return f"{format_bytes(written_bytes)} written, {words} of what a drive of 600 TBW is made for"


def _stream_text(stream: dict[str, Any]) -> str:
    rates = [
        f"{way.replace('_', ' ')} {format_bytes(stream[f'{way}_bytes_per_s'])}/s"
        for way in WAYS
        if stream[f"{way}_bytes_per_s"] is not None
    ]
    wear = format_bytes(stream["disk_written_bytes_per_step"] or 0)
    moved = ", ".join(rates) or "nothing moved"
    return f"{stream['exposed_share']:.1%} of compute spent waiting; {moved}; drive wear {wear} a step"


def _result_text(metrics: dict[str, Any]) -> str:
    extra = [
        f"{name.replace('_', ' ')} {metrics[name]:.4f}"
        for name in EXTRA_METRICS
        if isinstance(metrics.get(name), int | float)
    ]
    return f"{metrics['metric']} {metrics['value']:.4f}" + (f" ({', '.join(extra)})" if extra else "")


# ------------------------------------------------------------------------------------------------------------
# Several runs side by side


def comparison_rows(names: Sequence[str], reports: Sequence[Report]) -> list[tuple[str, ...]]:
    """One row under COMPARISON_COLUMNS for each run."""
    return [_comparison_row(name, report.content) for name, report in zip(names, reports, strict=True)]


def _comparison_row(name: str, content: dict[str, Any]) -> tuple[str, ...]:
    metrics, measured = content["metrics"], content["measured"]["device_peak_bytes"]
    return (
        name,
        content["method"],
        f"{metrics['metric']} {metrics['value']:.4f}" if metrics else "-",
        f"{content['progress']['steps_done']:,}",
        format_bytes(content["predicted"]["device_peak_bytes"]),
        format_bytes(measured) if measured else "-",
        format_seconds(content["time"]["total_s"]),
        format_seconds(content["time"]["exposed_transfer_s"]),
        format_bytes(content["traffic"]["disk_written_bytes"]),
    )


def comparison_table(names: Sequence[str], reports: Sequence[Report]) -> str:
    """The comparison as text, with one column for each run."""
    rows = comparison_rows(names, reports)
    turned = [(column, *cells) for column, *cells in zip(COMPARISON_COLUMNS, *rows, strict=True)]
    return text_table(f"{len(rows)} runs", turned[0], turned[1:])
