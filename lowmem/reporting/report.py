"""What a run took and gave: a pure function of its folder. Loads neither torch nor weights."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.blocks.run_dir import RunDir, RunState
from lowmem.reporting.tables import text_table
from lowmem.reporting.telemetry import read_records
from lowmem.units import format_bytes, format_seconds

EXTRA_METRICS = (
    "value_std_error",
    "joint_accuracy",
    "sigma_max_ce",
    "cross_entropy",
    "perplexity",
    "class_accuracy",
    "frechet_train_test",
)
HIDDEN_SHARE = 0.01  # of compute: less waiting than this is not worth a change
MEASURED = (
    "device_peak_bytes",
    "host_peak_bytes",
    "disk_bytes",
    "evaluation_peak_bytes",
)  # the last on the device, after training
WAYS = ("host_to_device", "device_to_host", "disk_read", "disk_written")
MEMORY_COLUMNS = ("memory", "budget", "predicted", "measured", "difference")
BLOCK_COLUMNS = ("block", "visits", "steps", "loss", "predicted peak", "measured peak")


@dataclass(frozen=True)
class Report:
    """`content` is the JSON object of `lowmem report --json`."""

    content: dict[str, Any]

    def table(self) -> str:
        categories = [
            (name.replace("_", " "), format_bytes(num_bytes))
            for name, num_bytes in self.content["predicted"]["by_category"].items()
        ]
        parts = [
            text_table(f"report: {self.summary()}", MEMORY_COLUMNS, self.memory_rows()),
            text_table("predicted on the device, by category", ("category", "bytes"), categories),
            text_table("blocks", BLOCK_COLUMNS, self.block_rows()),
            "\n".join(f"{name:<10}{text}" for name, text in self.closing_rows()),
        ]
        return "\n\n".join(parts)

    def summary(self) -> str:
        content = self.content
        settings = content["settings"]
        return (
            f"{content['method']}, {content['recipe']['model']['name']}, {content['num_parameters'] / 1e6:.2f} million parameters, "
            f"profile {content['profile']['name']}, {settings['optimizer']}, {settings['precision']}, tier {settings['tier']}, "
            f"micro-batch {settings['micro_batch_size']}, recompute {'on' if settings['recompute'] else 'off'}"
        )

    def memory_rows(self) -> list[tuple[str, ...]]:
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

    def closing_rows(self) -> list[tuple[str, str]]:
        content = self.content
        progress, time, traffic = content["progress"], content["time"], content["traffic"]
        rows = [
            (
                "progress",
                f"{progress['visits_done']} of {progress['visits_total']} visits, {progress['steps_done']} steps",
            ),
            (
                "time",
                f"{format_seconds(time['total_s'])} training: compute {format_seconds(time['compute_s'])}, "
                f"exposed transfer {format_seconds(time['exposed_transfer_s'])}, commits {format_seconds(time['commit_s'])}",
            ),
        ]
        expected = content["predicted"]["time"]
        if expected:
            rows.append(
                (
                    "expected",
                    f"{format_seconds(expected['run_s'])} training, {format_seconds(expected['exposed_s'])} exposed in a visit (by the plan)",
                )
            )
        rows.append(("traffic", _traffic_text(traffic)))
        planned = content["predicted"]["traffic"]
        if planned:
            rows.append(("planned", f"{_traffic_text(planned)} (one process, to the end)"))
        rows += _stream_rows(content["stream"])
        metrics = content["metrics"]
        if content["measured"]["evaluation_peak_bytes"]:
            rows.append(
                (
                    "evaluation",
                    f" peak {format_bytes(content['measured']['evaluation_peak_bytes'])} on the device, after training",
                )
            )
        if metrics:
            extra = [
                f"{name.replace('_', ' ')} {metrics[name]:.4f}"
                for name in EXTRA_METRICS
                if metrics.get(name) is not None
            ]
            rows.append(
                (
                    "result",
                    f"{metrics['metric']} {metrics['value']:.4f}"
                    + (f" ({', '.join(extra)})" if extra else ""),
                )
            )
        return [*rows, ("digest", content["digest"] or "-")]


def read_report(run_dir: str | os.PathLike[str]) -> Report:
    """Raises ResumeError if the folder holds no run, StoreError if its plan or state is not readable."""
    run = RunDir(run_dir)
    plan, state = run.read_plan(), run.read_state() or RunState()
    recipe, settings, predicted = plan["recipe"], plan["settings"], plan["predicted"]
    if state.micro_batch_size is not None:
        settings = {**settings, "micro_batch_size": state.micro_batch_size}
    visits_total, _ = queue_totals(plan)
    content = {
        "method": recipe["method"],
        "recipe": recipe,
        "profile": plan["profile"],
        "device_type": plan["profile"]["device"]["type"],
        "settings": settings,
        "num_parameters": plan["num_parameters"],
        "budget": plan["budget"],
        "predicted": {
            **{
                name: predicted[name]
                for name in (
                    "device_peak_bytes",
                    "host_peak_bytes",
                    "disk_bytes",
                    "by_category",
                    "host_by_category",
                )
            },
            "traffic": unbroken_traffic(predicted.get("traffic"), recipe, visits_total),
            "time": predicted.get("time"),
        },
        "measured": {name: state.measured.get(name, 0) for name in MEASURED},
        "blocks": [
            {**record.model_dump(), "predicted_peak_bytes": predicted["block_peak_bytes"][record.block]}
            for record in state.blocks
        ],
        "time": {
            name: state.time.get(name, 0.0)
            for name in ("total_s", "compute_s", "exposed_transfer_s", "commit_s")
        },
        "traffic": {f"{way}_bytes": state.traffic.get(f"{way}_bytes", 0) for way in WAYS},
        "stream": _stream(plan, state),
        "metrics": state.metrics,
        "progress": {
            "visits_done": state.visits_done,
            "visits_total": visits_total,
            "steps_done": sum(b.steps for b in state.blocks)
            if recipe["method"] != "end_to_end"
            else max((b.steps for b in state.blocks), default=0),
        },
        "digest": digest(state),
    }
    return Report(content)


def read_status(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Where a run stands: its committed progress, whether a process trains in it now, and its last telemetry
    record.
    """
    run = RunDir(run_dir)
    report = read_report(run_dir).content
    last: dict[str, Any] = {}
    for record in read_records(run.telemetry_path):
        last = record
    visits_done, visits_total = report["progress"]["visits_done"], report["progress"]["visits_total"]
    if run.is_locked():
        state = "running"
    elif visits_done == visits_total:
        state = "finished"
    else:
        state = "stopped"
    return {
        "run": str(Path(run_dir)),
        "state": state,
        **{k: report[k] for k in ("method", "progress", "blocks", "measured", "budget", "metrics")},
        "advice": report["stream"]["advice"],
        "last": last,
    }


def unbroken_traffic(
    traffic: dict[str, Any] | None, recipe: dict[str, Any], visits: int
) -> dict[str, int] | None:
    """What the plan of a model that streams says of a whole run made by one process; None for other runs."""
    if traffic is None:
        return None
    steps = recipe["train"]["num_steps"]
    return {
        name: start + steps * traffic["step"][name] + visits * traffic["commit"][name]
        for name, start in traffic["start"].items()
    }


def digest(state: RunState) -> str | None:
    """sha256 over all weights and optimizer state: over the digests of the data sections of block 0, 1, ...
    and the shared part.
    """
    if not state.files:
        return None
    keys = sorted((key for key in state.files if key != "shared"), key=lambda key: int(key.partition("-")[2]))
    return hashlib.sha256("".join(state.files[key].digest for key in [*keys, "shared"]).encode()).hexdigest()


def queue_totals(plan: dict[str, Any]) -> tuple[int, int]:
    """(visits, optimizer steps) of the whole run, from a frozen plan."""
    from lowmem.blocks.order import BlockQueue

    recipe = plan["recipe"]
    queue = BlockQueue(
        recipe["method"],
        plan["settings"]["num_blocks"],
        recipe["train"]["num_steps"],
        recipe["blocks"]["visit_steps"],
        recipe["blocks"]["order"],
        recipe["train"]["seed"],
    )
    return queue.num_visits, queue.total_steps


def _stream(plan: dict[str, Any], state: RunState) -> dict[str, Any]:
    """How well moving blocks hid behind compute: waiting against compute, what the link and the disk gave,
    and what to change.
    """
    steps = sum(block.steps for block in state.blocks)
    moved = {
        way: (state.traffic.get(f"{way}_bytes", 0), state.transfer_s.get(f"{way}_s", 0.0)) for way in WAYS
    }
    compute_s = state.time.get("compute_s", 0.0)
    exposed_s = state.time.get("exposed_transfer_s", 0.0) + state.time.get("commit_s", 0.0)
    share = exposed_s / compute_s if compute_s else None
    return {
        "compute_s": compute_s,
        "exposed_s": exposed_s,  # waiting for blocks to arrive, and for the last ones to be written
        "exposed_share": share,
        **{
            f"{way}_bytes_per_s": num_bytes / seconds if seconds else None
            for way, (num_bytes, seconds) in moved.items()
        },
        "link_bytes_per_step": (moved["host_to_device"][0] + moved["device_to_host"][0]) / steps
        if steps
        else None,
        "disk_read_bytes_per_step": moved["disk_read"][0] / steps if steps else None,
        "disk_written_bytes_per_step": moved["disk_written"][0] / steps if steps else None,  # wears the drive
        "advice": None
        if share is None
        else _advice(plan, state, share, sum(seconds for _, seconds in moved.values()) / compute_s),
    }


def _advice(plan: dict[str, Any], state: RunState, share: float, moving: float) -> str:
    """One sentence. `share`: waiting, `moving`: moving blocks at all, each over compute."""
    recipe, settings = plan["recipe"], plan["settings"]
    if share <= HIDDEN_SHARE:
        return f"nothing to change: waiting is {share:.1%} of compute"
    if settings["write_back"] == "wait" and recipe["method"] != "end_to_end":
        return f"waiting is {share:.1%} of compute: set offload.write_back: beside, so that a block is written while the next one trains"
    if settings["tier"] != "device" and not recipe["offload"]["prefetch"]:
        return f"waiting is {share:.1%} of compute: set offload.prefetch: true, so that a block is read while the last one trains"
    steps = recipe["blocks"]["visit_steps"]
    cures = [
        f"raise blocks.visit_steps from {steps} to {max(steps + 1, math.ceil(steps * moving))}, or the tokens of a step as much"
    ]
    on_cpu = plan["profile"]["device"]["type"] == "cpu"
    if settings["optimizer"] == "adamw" and not on_cpu:  # on a CPU 8-bit state costs more time than it saves
        cures.append("take optimizer.name: adamw8bit (half the bytes of a block)")
    room = plan["budget"]["host_bytes"] - plan["predicted"]["host_peak_bytes"]
    if settings["tier"] == "disk" and room > sum(record.num_bytes for record in state.files.values()):
        cures.append(f"keep blocks in RAM (offload.tier: {'device' if on_cpu else 'host'})")
    return f"waiting is {share:.1%} of compute: {'; or '.join(cures)}"


def _traffic_text(traffic: dict[str, int]) -> str:
    into, out, read, written = (format_bytes(traffic[f"{way}_bytes"]) for way in WAYS)
    return f"link in {into}, out {out}; disk read {read}, written {written}"


def _stream_rows(stream: dict[str, Any]) -> list[tuple[str, str]]:
    rates = [
        f"{way.replace('_', ' ')} {format_bytes(stream[f'{way}_bytes_per_s'])}/s"
        for way in WAYS
        if stream[f"{way}_bytes_per_s"] is not None
    ]
    if stream["exposed_share"] is None:
        return []
    wear = format_bytes(stream["disk_written_bytes_per_step"] or 0)
    return [
        (
            "stream",
            f"{stream['exposed_share']:.1%} of compute spent waiting; {', '.join(rates) or 'nothing moved'}; drive wear {wear} a step",
        ),
        ("advice", stream["advice"]),
    ]


def comparison_rows(
    names: Sequence[str], reports: Sequence[Report]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(columns, one row a run): what people compare runs by."""
    rows: list[tuple[str, ...]] = []
    for name, report in zip(names, reports, strict=True):
        content = report.content
        metrics, measured, traffic = content["metrics"], content["measured"], content["traffic"]
        rows.append(
            (
                name,
                content["method"],
                f"{metrics['metric']} {metrics['value']:.4f}" if metrics else "-",
                f"{content['progress']['steps_done']:,}",
                format_bytes(content["predicted"]["device_peak_bytes"]),
                format_bytes(measured["device_peak_bytes"]) if measured["device_peak_bytes"] else "-",
                format_seconds(content["time"]["total_s"]),
                format_seconds(content["time"]["exposed_transfer_s"]),
                format_bytes(traffic["disk_written_bytes"]),
            )
        )
    return (
        "run",
        "method",
        "result",
        "steps",
        "predicted peak",
        "measured peak",
        "time",
        "exposed",
        "written",
    ), rows


def comparison_table(names: Sequence[str], reports: Sequence[Report]) -> str:
    """The same as text: a column a run."""
    columns, rows = comparison_rows(names, reports)
    turned = [(column, *cells) for column, *cells in zip(columns, *rows, strict=True)]
    return text_table(f"{len(rows)} runs", turned[0], turned[1:])
