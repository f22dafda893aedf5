"""Tiny folders of every family of decoders, with random weights, as transformers writes them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from lowmem.models.huggingface.families import FAMILIES, config_of

VOCAB, LENGTH = 61, 24
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large enough that every part has an effect
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GPT = {key: value for key, value in COMMON.items() if key not in ("num_key_value_heads", "pad_token_id")}
LISTED = ["sliding_attention", "full_attention", "sliding_attention"]
SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral": {"sliding_window": 7},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": LISTED,
        "tie_word_embeddings": True,
    },
    "qwen3": {"head_dim": 16},
    "phi3": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.0},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "olmo2": {},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "layer_types": LISTED},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "layer_types": LISTED},
    "gpt2": {"n_positions": 64, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0},
    "gpt_neox": {"hidden_dropout": 0.0, "rotary_pct": 0.5},
}


def content_of(kind: str, **changes: Any) -> dict[str, Any]:
    base = GPT if kind in ("gpt2", "gpt_neox") else COMMON
    if kind == "gpt2":
        names = {
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
        }
        base = {names.get(key, key): value for key, value in base.items() if key != "max_position_embeddings"}
    return {"model_type": kind, **base, **SPECIAL[kind], **changes}


def library_model(kind: str, **changes: Any) -> Any:
    """transformers' own model with random weights, in fp32."""
    torch.manual_seed(0)
    config = config_of(content_of(kind, **changes), "test")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FAMILIES[kind].model_class()(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases begin as ones and zeros
            torch.nn.init.normal_(parameter, 0.0 if "bias" in name else 0.5, 0.3)
    return model


def make_folder(folder: Path, kind: str, shard: str = "40KB", **changes: Any) -> Path:
    """A model's folder whose weights lie in several files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library_model(kind, **changes).save_pretrained(folder, max_shard_size=shard)
    return folder


# ------------------------------------------------------------------------------------------------------------
# A tokenizer: every byte is a token

CHAT = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
BYTES_VOCAB = 259  # 256 bytes, and three special tokens


def make_tokenizer(folder: Path, template: str | None = CHAT) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|pad|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def chat_model(folder: Path, kind: str) -> Path:
    """A family's folder with a tokenizer of bytes and a chat template."""
    return make_tokenizer(make_folder(folder, kind, vocab_size=BYTES_VOCAB + 2))


def chat_rows(path: Path) -> Path:
    """24 short conversations as JSONL."""
    talks = [
        [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "x" * (n % 7 + 1)}]
        for n in range(24)
    ]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return path
