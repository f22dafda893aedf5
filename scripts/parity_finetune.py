"""The arms of `scripts/parity finetune`: a small decoder learns one text, then another in several ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from random_decoder import make_model

from lowmem.models.huggingface.folder import CONFIG

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 257,  # the bytes, and the end of a text
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
LAYERS, NUM_BLOCKS = SHAPE["num_hidden_layers"], 3
ROW = SHAPE["max_position_embeddings"] - 1  # characters: a byte each, mostly, and the end
STEPS, BATCH_SIZE, SEQ_LEN, WARMUP_STEPS = 1200, 16, SHAPE["max_position_embeddings"], 50
FIRST_LR, LR = 3e-3, 1e-3  # of the first text, and of the second
LATER = 8  # batches that one update gathers, or one sweep holds at most
GATHERED = f"{LATER} batches an update"
FEWER = [
    f"train.batch_size={LATER * BATCH_SIZE}",
    f"train.num_steps={STEPS // LATER}",
    f"train.warmup_steps={WARMUP_STEPS // LATER}",
]
ARMS = {
    "end to end": [],
    **{f"sweeps of {k}": [f"blocks.sweep_steps={k}"] for k in (2, 4, LATER)},
    GATHERED: FEWER,
    f"{GATHERED}, {LATER**0.5:.1f} times the rate": [*FEWER, f"train.lr={LR * LATER**0.5:.6f}"],
    "last block and head": [f"model.trainable={LAYERS // NUM_BLOCKS}", "blocks.num_blocks=2"],
}  # what each sets


def write_rows(text: Path, path: Path) -> None:
    """A row of JSONL for every `ROW` characters of a text."""
    letters = text.read_text(encoding="utf-8")
    rows = (letters[at : at + ROW] for at in range(0, len(letters), ROW))
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows if row.strip()))


def recipe_of(model: Path, weights: str, rows: Path, lr: float) -> dict[str, Any]:
    return {
        "schema": 1,
        "method": "end_to_end",
        "model": {"name": "huggingface", "path": str(model), "weights": weights},
        "blocks": {"num_blocks": NUM_BLOCKS},
        "data": {"name": "chat", "path": str(rows), "tokenizer": str(model)},
        "train": {
            "num_steps": STEPS,
            "batch_size": BATCH_SIZE,
            "seq_len": SEQ_LEN,
            "lr": lr,
            "warmup_steps": WARMUP_STEPS,
        },
        "optimizer": {"betas": [0.9, 0.95], "weight_decay": 0.01},
        "eval": {"batch_size": 64, "num_batches": 32},
    }


def write_recipes(folder: Path, texts: tuple[Path, Path]) -> tuple[Path, Path, Path, Path]:
    """(recipe of the first text, its run folder, the model exported from it, recipe of the second text).

    A model with the same weights is made anew only where there is none.
    """
    shape, base = folder / "shape", folder / "base"
    if not (shape / CONFIG).exists():
        make_model(shape, SHAPE)
    recipes, rows = (folder / "first.yaml", folder / "second.yaml"), (folder / "1.jsonl", folder / "2.jsonl")
    for text, path in zip(texts, rows, strict=True):
        write_rows(text, path)
    made = (shape, "random", rows[0], FIRST_LR), (base, "pretrained", rows[1], LR)
    for path, wanted in zip(recipes, made, strict=True):
        path.write_text(yaml.safe_dump(recipe_of(*wanted), sort_keys=False))
    return recipes[0], folder / "first", base, recipes[1]
