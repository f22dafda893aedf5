"""The families of decoders that are trained from a folder, and what lowmem must know of each.

Only classes that are named here are taken from the installed transformers, so a folder brings no code.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from lowmem.errors import ConfigError
from lowmem.files import printable
from lowmem.recipe import MOST_DIM, MOST_LAYERS
from lowmem.units import shown

MOST_WIDTH = 2**20  # of a layer's inner products; the largest published have some 2^16
MOST_VOCAB = 2**22
# The numbers of a config.json that say how large the model is, with a bound far beyond what trains.
SIZES = {
    "num_hidden_layers": MOST_LAYERS,
    "hidden_size": MOST_DIM,
    "vocab_size": MOST_VOCAB,
    "intermediate_size": MOST_WIDTH,
    "num_attention_heads": MOST_DIM,
    "num_key_value_heads": MOST_DIM,
    "head_dim": MOST_DIM,
    "max_position_embeddings": 2**24,
}
# What else a config.json may say that cannot be trained here.
REFUSED = {
    "quantization_config": "weights that are quantised already; give the folder of the original weights",
    "add_cross_attention": "layers that look at an encoder; give a decoder's folder",
}


@dataclass(frozen=True)
class Family:
    """Where a family's parts are: classes in transformers, and attributes in the model."""

    package: str  # below transformers.models
    model: str
    config: str
    body: str = "model"  # the attribute of the model without its head
    layers: str = "layers"
    norm: str = "norm"
    attention: Literal["sdpa", "eager"] = "sdpa"
    # Which layers see a window of the sequence: none; all, where the config names one; or those that it lists
    windows: Literal["none", "all", "listed"] = "none"
    transposed: bool = False  # linear weights lie as [in, out]
    renamed: tuple[tuple[str, str], ...] = ()  # beginnings of names in older files, and what they are now

    def model_class(self) -> Any:
        return getattr(imported(f"transformers.models.{self.package}.modeling_{self.package}"), self.model)

    def config_class(self) -> Any:
        module = imported(f"transformers.models.{self.package}.configuration_{self.package}")
        return getattr(module, self.config)


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", "LlamaConfig"),
    "mistral": Family("mistral", "MistralForCausalLM", "MistralConfig", windows="all"),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", "Qwen2Config", windows="listed"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", "Qwen3Config", windows="listed"),
    "phi3": Family("phi3", "Phi3ForCausalLM", "Phi3Config", windows="all"),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", "SmolLM3Config", windows="listed"),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", "Olmo2Config"),
    # sdpa has no soft cap of its scores, which Gemma 2 asks for
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", "Gemma2Config", attention="eager", windows="listed"),
    "gemma3_text": Family("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", windows="listed"),
    "gpt2": Family("gpt2", "GPT2LMHeadModel", "GPT2Config", "transformer", "h", "ln_f", transposed=True),
    "gpt_neox": Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        "gpt_neox",
        norm="final_layer_norm",
        renamed=(("embed_out.", "lm_head."),),
    ),
}
# Image classifiers: see `classifier`.
CLASSIFIERS = {"vit": Family("vit", "ViTForImageClassification", "ViTConfig", "vit", norm="layernorm")}


def family_of(content: dict[str, Any], where: str) -> Family:
    """The family that a config.json names. Raises ConfigError for one that is not supported."""
    kind = content.get("model_type")
    families = FAMILIES | CLASSIFIERS
    if not isinstance(kind, str) or kind not in families:
        found = shown(repr(kind), 80)
        raise ConfigError(
            f"{where}: model_type: found {found}; allowed: {', '.join(families)}; give a folder of these"
        )
    return families[kind]


def config_of(content: dict[str, Any], where: str) -> Any:
    """transformers' own configuration from the content of a config.json.

    Raises ConfigError for a family that is not supported, absurd sizes, and what the library refuses.
    """
    family = family_of(content, where)
    for key, why in REFUSED.items():
        if content.get(key):
            raise ConfigError(f"{where}: {key}: found {why}")
    for key, most in SIZES.items():
        number = content.get(key)
        if number is not None and not (type(number) is int and 0 < number <= most):
            raise ConfigError(
                f"{where}: {key}: found {shown(repr(number), 80)}; allowed: 1 to {most}; restore the file"
            )
    # what would choose other code, or a hub's, for a part of the model
    plain = {name: value for name, value in content.items() if not name.startswith(("_attn", "attn_impl"))}
    try:
        config = family.config_class()(**{**plain, "use_cache": False})
    except Exception as problem:  # the library's errors are of many kinds
        raise ConfigError(
            f"{where}: transformers does not take it ({shown(' '.join(str(problem).split()), 200)}); "
            "restore it from a copy"
        ) from None
    config._attn_implementation = family.attention
    return config


def not_built(where: str, problem: Exception) -> ConfigError:
    said = shown(" ".join(str(problem).split()), 200)
    return ConfigError(f"{where}: transformers does not build it ({said}); restore the file from a copy")


def imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        raise ConfigError(
            f"model.name: 'huggingface' needs the packages transformers 5 and peft, and not all are "
            f"there ({printable(str(problem))}); install the extra: pip install 'lowmem[huggingface]'"
        ) from None
