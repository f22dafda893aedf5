"""A recipe: one training run in YAML. Strict keys, named choices, `--set key=value` on top.

`auto` stands for what the planner settles from the machine's profile; the settled value is written in
`plan.json`. Counts are integers, rates and probabilities floats. A step is one optimizer update;
`train.num_steps` counts steps *per block*.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveInt, model_validator

from lowmem.data.config import DECLARED, DataConfig
from lowmem.errors import ConfigError
from lowmem.schema import Section, find_file, names_in, parse, read_yaml, yaml_value

STANDARD_NORMAL = NormalDist()
LEAST_PROBABILITY = 1e-3  # of a drawn level to lie in [sigma_min, sigma_max]
Auto = Literal["auto"]
Tier = Literal["device", "host", "disk"]
Precision = Literal["float32", "bfloat16"]
OptimizerName = Literal["adamw8bit", "adamw"]
Method = Literal["diffusion_blocks", "end_to_end"]
# what the network sees of the noisy target z: c_in z (paper); E[y | z] without context; or nothing: only the
# read-out knows z and sigma
NoisyInput = Literal["scaled", "posterior", "none"]
Readout = Literal[
    "plain", "bayes"
]  # the network's logits (paper), or with the analytic term E z / sigma^2 added
# how ln sigma is drawn: around p_mean (paper); around the level that hides half of what z tells of a discrete
# target; so with that spread too
NoiseSchedule = Literal["lognormal", "centred", "balanced"]
P_MEAN, P_STD = -1.2, 1.2  # paper, App. C
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class TransformerModel(Section):
    """What all packaged models have in common."""

    num_layers: PositiveInt
    dim: PositiveInt  # width of the residual stream
    num_heads: PositiveInt
    mlp_ratio: PositiveInt = 4
    dropout: Fraction = 0.0

    @model_validator(mode="after")
    def _heads_divide(self) -> TransformerModel:
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"dim {self.dim} is not an even multiple of num_heads {self.num_heads}; change one of them"
            )
        return self


class VitModel(TransformerModel):
    name: Literal["vit"]
    patch_size: PositiveInt  # pixels
    image_drop: Fraction = 0.0  # share of samples trained on a blank image, for guidance
    noisy_input: NoisyInput = "scaled"
    readout: Readout = "plain"


class DitModel(TransformerModel):
    name: Literal["dit"]
    patch_size: PositiveInt  # pixels
    label_drop: Fraction = 0.1  # share of samples trained without their class, for guidance


class MaskedLmModel(TransformerModel):
    name: Literal["masked_lm"]
    mask_schedule: Literal["linear", "cosine"] = (
        "linear"  # alpha(t), the share of tokens not masked at time t
    )
    head_chunk: PositiveInt = 4096  # tokens whose logits are in memory at once


class CausalLmModel(TransformerModel):
    name: Literal["causal_lm"]
    noisy_input: NoisyInput = "posterior"
    readout: Readout = "bayes"
    head_chunk: PositiveInt = 4096  # tokens whose logits are in memory at once


class RecurrentLmModel(TransformerModel):
    name: Literal["recurrent_lm"]
    prelude_layers: PositiveInt = 2
    coda_layers: PositiveInt = 2  # the core has what is left of num_layers
    iterations: PositiveInt = 32  # mean number, when trained end to end
    backprop_iterations: PositiveInt = 8  # of them that gradients flow through
    noisy_input: Literal["scaled", "posterior"] = (
        "posterior"  # its state is the noisy target: it must be seen
    )
    readout: Readout = "bayes"
    head_chunk: PositiveInt = 4096

    @model_validator(mode="after")
    def _core_left(self) -> RecurrentLmModel:
        if self.prelude_layers + self.coda_layers >= self.num_layers:
            raise ValueError(
                f"num_layers {self.num_layers} leaves no core between {self.prelude_layers} and {self.coda_layers} layers; raise it"
            )
        return self


class CustomModel(Section):
    """A model built by the user's own `build_model()`; only the Python interface can train it."""

    name: Literal["custom"]


class BlocksConfig(Section):
    num_blocks: Auto | PositiveInt = "auto"
    visit_steps: PositiveInt = 50  # steps a block stays on the device
    order: Literal["round_robin", "random"] = "round_robin"  # random: a fresh order for each round
    overlap_gamma: Fraction = 0.05  # paper, section 3.3


class NoiseConfig(Section):
    schedule: NoiseSchedule = "lognormal"
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    sigma_data: Positive = 0.5
    p_mean: float = P_MEAN  # of ln sigma; schedules centred and balanced measure it
    p_std: Positive = P_STD  # of ln sigma; schedule balanced measures it
    sigma_max_share: Share = (
        0.0  # of discrete targets' draws, made at sigma_max in every block: they train the joint prediction
    )
    weighting: Literal["auto", "none", "edm"] = "auto"  # auto: edm for L2 losses, none for cross-entropy

    @model_validator(mode="after")
    def _ordered(self) -> NoiseConfig:
        if (self.schedule != "lognormal" and self.p_mean != P_MEAN) or (
            self.schedule == "balanced" and self.p_std != P_STD
        ):
            raise ValueError(
                f"schedule '{self.schedule}' measures p_mean (balanced: p_std too) from the targets; leave it out, or take lognormal"
            )
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} is not below sigma_max {self.sigma_max}; swap them")
        low, high = (
            STANDARD_NORMAL.cdf((math.log(sigma) - self.p_mean) / self.p_std)
            for sigma in (self.sigma_min, self.sigma_max)
        )
        if high - low < LEAST_PROBABILITY:
            raise ValueError(
                f"p_mean {self.p_mean} and p_std {self.p_std} put a share of {high - low:.1e} of all levels between sigma_min and sigma_max; "
                f"allowed: at least {LEAST_PROBABILITY}; move p_mean to where the levels are"
            )
        return self


class TrainConfig(Section):
    num_steps: PositiveInt  # per block
    batch_size: PositiveInt
    micro_batch_size: Auto | PositiveInt = "auto"  # samples in one forward and backward pass
    seq_len: PositiveInt | None = None  # tokens; None where the data fix it
    lr: Positive
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Auto | Precision = "auto"  # bfloat16: compute and gradients in bf16
    weights: Auto | Precision = (
        # as they are kept; auto: float32; bfloat16: stochastically rounded, with no fp32 copy anywhere
        "auto"
    )
    recompute: Auto | bool = "auto"  # activation checkpointing of each layer
    on_oom: Literal["stop", "shrink"] = (
        "stop"  # out of memory in a visit; shrink: go on from the last commit with half the micro-batch
    )
    deterministic: bool = False  # on CUDA: only kernels that give the same bits each time (a CPU always does)


class OptimizerConfig(Section):
    name: Auto | OptimizerName = "auto"
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    grad_clip: Positive | None = 1.0  # L2 norm of the gradient; None = off
    clip: Literal["block", "global"] = (
        "block"  # of each block's and of the shared part's apart, or of the whole model's (method end_to_end)
    )
    during_backward: Auto | bool = (
        # each parameter updated, and its gradient freed, as soon as that is whole; auto: where one pass
        # suffices
        "auto"
    )
    ema: Fraction | None = (
        # decay per step of an average of the weights, kept in fp32 and used to evaluate and sample; None =
        # none kept
        None
    )

    @property
    def clips_whole(self) -> bool:
        return self.clip == "global" and self.grad_clip is not None


class OffloadConfig(Section):
    tier: Auto | Tier = "auto"  # where blocks rest that are not visited
    borders: Auto | Tier = (
        "auto"  # where activations at block borders rest while a model trained end to end streams
    )
    prefetch: bool = True  # read the next block beside compute
    write_back: Literal["auto", "beside", "wait"] = (
        "auto"  # wait: a block is on disk before the next step starts
    )
    # move bytes no faster than the profile's link and disk: what a run would take on a slower machine than
    # this one
    pace: bool = False


class EvalConfig(Section):
    num_steps: Auto | PositiveInt = (
        "auto"  # denoising steps of the chain; auto: one for each block, 18 for images
    )
    prediction: Literal["chain", "joint"] = (
        "chain"  # of classifiers: whose accuracy is the headline; the report has both
    )
    batch_size: PositiveInt = 256
    num_batches: PositiveInt | None = None  # of the test part; None = all of it
    num_samples: PositiveInt = 1000  # images generated
    guidance: Auto | Positive = (
        # without class (or image) + guidance (with - without); 1 = none; auto: 2 for images, 1 for labels
        "auto"
    )


class Recipe(Section):
    schema_version: Literal[1] = Field(alias="schema")
    method: Method
    model: Annotated[
        VitModel | DitModel | MaskedLmModel | CausalLmModel | RecurrentLmModel | CustomModel,
        Field(discriminator="name"),
    ]
    blocks: BlocksConfig = BlocksConfig()
    noise: NoiseConfig = NoiseConfig()
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    offload: OffloadConfig = OffloadConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        whole = self.method == "end_to_end"
        if isinstance(self.model, RecurrentLmModel) and self.blocks.num_blocks not in (
            (1, 3) if whole else (1,)
        ):
            allowed = "1 or 3 (prelude, core, coda)" if whole else "1 (its core is one denoiser)"
            raise ValueError(
                f"blocks.num_blocks: found {self.blocks.num_blocks}; allowed with model recurrent_lm: {allowed}"
            )
        if self.optimizer.clip == "global" and not whole:
            raise ValueError(
                "optimizer.clip: found 'global'; allowed with method diffusion_blocks: block (no step has all gradients at once)"
            )
        layers, blocks = getattr(self.model, "num_layers", None), self.blocks.num_blocks
        if layers is not None and blocks != "auto" and blocks > layers:
            raise ValueError(
                f"blocks.num_blocks: found {blocks}; allowed: at most model.num_layers = {layers}; lower it"
            )
        if (
            isinstance(self.model, VitModel)
            and self.eval.guidance not in ("auto", 1)
            and not self.model.image_drop
        ):
            raise ValueError(
                f"eval.guidance: found {self.eval.guidance}; allowed without model.image_drop: 1; train with model.image_drop: 0.1"
            )
        if self.train.micro_batch_size != "auto" and self.train.batch_size % self.train.micro_batch_size:
            raise ValueError(
                f"train.micro_batch_size: found {self.train.micro_batch_size}; allowed: a divisor of train.batch_size = {self.train.batch_size}"
            )
        if self.train.weights == "bfloat16" and self.train.precision == "float32":
            raise ValueError(
                "train.weights: found bfloat16; allowed with train.precision float32: float32; set train.precision: bfloat16"
            )
        if self.optimizer.during_backward is True and self.optimizer.grad_clip is not None:
            raise ValueError(
                f"optimizer.during_backward: found true; allowed with optimizer.grad_clip {self.optimizer.grad_clip}, which needs all gradients at "
                "once: false, auto; set optimizer.grad_clip: null"
            )
        if self.optimizer.during_backward is True and self.train.micro_batch_size not in (
            "auto",
            self.train.batch_size,
        ):
            raise ValueError(
                f"optimizer.during_backward: found true; allowed with train.micro_batch_size {self.train.micro_batch_size}, whose gradients add up: "
                f"false, auto; set train.micro_batch_size: {self.train.batch_size}"
            )
        if self.train.warmup_steps > self.train.num_steps:
            raise ValueError(
                f"train.warmup_steps: found {self.train.warmup_steps}; allowed: at most train.num_steps = {self.train.num_steps}"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)


def load_recipe(name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name or path, with `key=value` overrides on top.

    Raises ConfigError: unknown recipe, key or name, wrong type, or settings that contradict each other.
    """
    path = find_file(name, "recipes", "recipe", ConfigError)
    raw = read_yaml(path, ConfigError)
    for override in overrides:
        _override(raw, override, "--set", "blocks.num_blocks=6")
    return parse(Recipe, raw, f"recipe {path.stem}", ConfigError)


def recipe_from_dict(raw: dict[str, Any], where: str) -> Recipe:
    return parse(Recipe, raw, where, ConfigError)


def with_data(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with `key=value` overrides of its data section; a new `name` starts a section of its own.
    Raises ConfigError as load_recipe.

    What was declared of the old data (shapes, counts) is not said of the new ones.
    """
    raw = recipe.to_dict()
    fresh = any(override.startswith("name=") for override in overrides)
    raw["data"] = {} if fresh else {key: value for key, value in raw["data"].items() if key not in DECLARED}
    for override in overrides:
        _override(raw["data"], override, "--data", "path=FILE")
    return parse(Recipe, raw, "--data", ConfigError)


def list_recipes() -> list[str]:
    return names_in("recipes")


def recipe_name(name: str | os.PathLike[str]) -> str:
    return Path(name).stem if Path(name).suffix in (".yaml", ".yml") else str(name)


def _override(raw: dict[str, Any], override: str, option: str, example: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{option}: found '{override}'; allowed: key=value, as in {option} {example}")
    try:
        value = yaml_value(text)
    except (yaml.YAMLError, ValueError) as problem:
        raise ConfigError(
            f"{option} {key}: '{text}' is not a YAML value: {' '.join(str(problem).split())}"
        ) from None
    *sections, last = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{option} {key}: '{section}' is a value, not a section with keys")
    raw[last] = value
