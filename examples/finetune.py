"""Trains a model from a Hugging Face folder further, on rows of questions and answers, and asks it.

    python examples/finetune.py ./SmolLM2-135M-Instruct rows.jsonl
    python examples/finetune.py ./Qwen3-4B rows.jsonl --adapter lora --profile rtx-4060-laptop-8gb

A row is {"prompt": "...", "completion": "..."}, or has `messages` or `text`. Nothing is fetched from a
network. Kill the script and run it again: it goes on where it stood.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lowmem


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="with config.json, safetensors and a tokenizer")
    parser.add_argument("rows", type=Path, help="JSONL, CSV or parquet")
    parser.add_argument("--adapter", choices=["lora"], help="train matrices beside frozen weights")
    parser.add_argument("--profile", help="a machine, see `lowmem profiles`; left out: this one")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--ask", default="What did you learn?")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="keys of the recipe")
    given = parser.parse_args()

    with lowmem.live_view(given.run_dir) as view:
        lowmem.finetune(
            given.folder,
            given.rows,
            given.profile,
            given.run_dir,
            overrides=given.set,
            adapter=given.adapter,
            listeners=[view],
        )
    report = lowmem.read_report(given.run_dir)
    print(report.table())
    before, after = report.content["first_metrics"]["value"], report.content["metrics"]["value"]
    print(f"held-out loss {before:.3f} before, {after:.3f} after")
    print(f"{given.ask}\n{lowmem.chat_run(given.run_dir, given.ask, num_tokens=40)}")
    out = given.run_dir.with_name(given.run_dir.name + "-out")
    if not out.exists():
        lowmem.export_run(given.run_dir, out)
    print(f"{out}: for from_pretrained, or for peft where an adapter was trained")


if __name__ == "__main__":
    main()
