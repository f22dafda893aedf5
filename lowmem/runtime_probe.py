"""Prints how many bytes torch and the driver take of a device before the first tensor, for `lowmem detect`.

    python -m lowmem.runtime_probe FOLDER

It trains a small model in FOLDER, in a process of its own, and prints the measured peak less what the plan
counts for tensors.
"""

from __future__ import annotations

import sys
import tempfile

from lowmem import job
from lowmem.reporting.report import read_report

SMALL = [
    "model.num_layers=2",
    "model.dim=384",
    "model.num_heads=6",
    "blocks.num_blocks=2",
    "blocks.visit_steps=1",
    "optimizer.name=adamw",
    "train.num_steps=2",
    "train.batch_size=8",
    "train.micro_batch_size=8",
    "train.seq_len=128",
    "train.warmup_steps=0",
    "train.precision=float32",
    "eval.num_batches=1",
    "eval.batch_size=1",
]


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
        content = read_report(job.train("stdlib-causal", None, f"{folder}/run", SMALL)).content
    predicted = content["predicted"]
    tensors_bytes = predicted["device_peak_bytes"] - predicted["by_category"]["runtime_floor"]
    print(content["measured"]["device_peak_bytes"] - tensors_bytes)


if __name__ == "__main__":
    main()
