"""Decoders with random weights, as folders that the library would write, and rows to train them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowmem.models.huggingface.families import config_of, family_of
from lowmem.models.huggingface.folder import CONFIG, SINGLE


def make_model(folder: Path, shape: dict[str, Any]) -> int:
    """Writes a model with the content of a config.json, and a tokenizer of bytes.

    Returns the number of parameters.
    """
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(shape))
    with torch.device("meta"):
        model = family_of(shape, "here").model_class()(config_of(shape, "here"))
    torch.manual_seed(0)
    weights = {
        name: torch.ones(p.shape, dtype=torch.bfloat16)
        if p.ndim == 1
        else torch.empty(p.shape, dtype=torch.bfloat16).normal_(std=0.02)
        for name, p in model.named_parameters()
    }
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(folder)
    return sum(weight.numel() for weight in weights.values())


def make_rows(path: Path) -> None:
    """Texts of more than 330 bytes, so that rows of 256 tokens are full."""
    rows = ({"text": " ".join(str(n * k % 97) for k in range(120))} for n in range(1, 41))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
