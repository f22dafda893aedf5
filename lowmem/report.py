"""What a run took and gave: a pure function of its folder. Loads neither torch nor weights."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.run_dir import RunDir, RunState
from lowmem.tables import text_table
from lowmem.telemetry import read_records
from lowmem.units import format_bytes, format_seconds

EXTRA_METRICS = ("value_std_error", "joint_accuracy", "sigma_max_ce", "cross_entropy", "perplexity", "class_accuracy", "frechet_train_test")


@dataclass(frozen=True)
class Report:
    """`content` is the JSON object of `lowmem report --json`."""

    content: dict[str, Any]

    def table(self) -> str:
        return _table(self.content)


def read_report(run_dir: str | os.PathLike[str]) -> Report:
    """Raises ResumeError if the folder holds no run, StoreError if its plan or state is not readable."""
    run = RunDir(run_dir)
    plan, state = run.read_plan(), run.read_state() or RunState()
    recipe, settings, predicted = plan["recipe"], plan["settings"], plan["predicted"]
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
            **{name: predicted[name] for name in ("device_peak_bytes", "host_peak_bytes", "disk_bytes", "by_category", "host_by_category")},
            "traffic": unbroken_traffic(predicted.get("traffic"), recipe, visits_total),
        },
        "measured": {name: state.measured.get(name, 0) for name in ("device_peak_bytes", "host_peak_bytes", "disk_bytes")},
        "blocks": [{**record.model_dump(), "predicted_peak_bytes": predicted["block_peak_bytes"][record.block]} for record in state.blocks],
        "time": {name: state.time.get(name, 0.0) for name in ("total_s", "compute_s", "exposed_transfer_s", "commit_s")},
        "traffic": {
            name: state.traffic.get(name, 0) for name in ("host_to_device_bytes", "device_to_host_bytes", "disk_read_bytes", "disk_written_bytes")
        },
        "metrics": state.metrics,
        "progress": {
            "visits_done": state.visits_done,
            "visits_total": visits_total,
            "steps_done": sum(b.steps for b in state.blocks) if recipe["method"] != "end_to_end" else max((b.steps for b in state.blocks), default=0),
        },
        "digest": digest(state),
    }
    return Report(content)


def read_status(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Where a run stands: its committed progress, whether a process trains in it now, and its last telemetry record."""
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
        "last": last,
    }


def unbroken_traffic(traffic: dict[str, Any] | None, recipe: dict[str, Any], visits: int) -> dict[str, int] | None:
    """What the plan of a model that streams says of a whole run made by one process; None for other runs."""
    if traffic is None:
        return None
    steps = recipe["train"]["num_steps"]
    return {name: start + steps * traffic["step"][name] + visits * traffic["commit"][name] for name, start in traffic["start"].items()}


def digest(state: RunState) -> str | None:
    """sha256 over all weights and optimizer state: over the digests of the data sections of block 0, 1, ... and the shared part."""
    if not state.files:
        return None
    keys = sorted((key for key in state.files if key != "shared"), key=lambda key: int(key.partition("-")[2]))
    return hashlib.sha256("".join(state.files[key].sha256 for key in [*keys, "shared"]).encode()).hexdigest()


def queue_totals(plan: dict[str, Any]) -> tuple[int, int]:
    """(visits, optimizer steps) of the whole run, from a frozen plan."""
    from lowmem.block_queue import BlockQueue

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


def _table(content: dict[str, Any]) -> str:
    progress, measured, predicted, budget = (content[name] for name in ("progress", "measured", "predicted", "budget"))
    settings, time, traffic = content["settings"], content["time"], content["traffic"]
    head = (
        f"report: {content['method']}, {content['recipe']['model']['name']}, {content['num_parameters'] / 1e6:.2f} million parameters, "
        f"profile {content['profile']['name']}, {settings['optimizer']}, {settings['precision']}, tier {settings['tier']}, "
        f"micro-batch {settings['micro_batch_size']}, recompute {'on' if settings['recompute'] else 'off'}"
    )
    memory = [
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
    parts = [text_table(head, ("memory", "budget", "predicted", "measured", "difference"), memory)]
    categories = [(name.replace("_", " "), format_bytes(num_bytes)) for name, num_bytes in predicted["by_category"].items()]
    parts.append(text_table("predicted on the device, by category", ("category", "bytes"), categories))
    blocks = [
        (
            str(block["block"]),
            str(block["visits"]),
            str(block["steps"]),
            "-" if block["loss"] is None else f"{block['loss']:.4f}",
            format_bytes(block["predicted_peak_bytes"]),
            format_bytes(block["measured_peak_bytes"]) if block["measured_peak_bytes"] else "-",
        )
        for block in content["blocks"]
    ]
    parts.append(text_table("blocks", ("block", "visits", "steps", "loss", "predicted peak", "measured peak"), blocks))
    lines = [
        f"progress  {progress['visits_done']} of {progress['visits_total']} visits, {progress['steps_done']} steps",
        f"time      {format_seconds(time['total_s'])} training: compute {format_seconds(time['compute_s'])}, "
        f"exposed transfer {format_seconds(time['exposed_transfer_s'])}, commits {format_seconds(time['commit_s'])}",
        f"traffic   link in {format_bytes(traffic['host_to_device_bytes'])}, out {format_bytes(traffic['device_to_host_bytes'])}; "
        f"disk read {format_bytes(traffic['disk_read_bytes'])}, written {format_bytes(traffic['disk_written_bytes'])}",
    ]
    planned = predicted["traffic"]
    if planned:
        lines.append(
            f"planned   link in {format_bytes(planned['host_to_device_bytes'])}, out {format_bytes(planned['device_to_host_bytes'])}; "
            f"disk read {format_bytes(planned['disk_read_bytes'])}, written {format_bytes(planned['disk_written_bytes'])} (one process, to the end)"
        )
    metrics = content["metrics"]
    if metrics:
        extra = [f"{name.replace('_', ' ')} {metrics[name]:.4f}" for name in EXTRA_METRICS if metrics.get(name) is not None]
        lines.append(f"result    {metrics['metric']} {metrics['value']:.4f}" + (f" ({', '.join(extra)})" if extra else ""))
    lines.append(f"digest    {content['digest'] or '-'}")
    return "\n\n".join(parts) + "\n\n" + "\n".join(lines)
