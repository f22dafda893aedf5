"""A recipe: one training run in YAML, with strict keys, named choices, and `--set key=value` on top.

`auto` stands for what the planner settles from the machine's profile; the settled value is written in
`plan.json`. Counts are integers, rates and probabilities are floats. A step is one optimizer update;
`train.num_steps` counts steps *per block*. Every architecture has a section of its own, in the module of its
model (see `ARCHITECTURES`).
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, Field, SerializeAsAny, model_validator
from pydantic_core import PydanticKnownError

from lowmem.data.config import DECLARED, DataConfig
from lowmem.data.packages import require_package
from lowmem.errors import ConfigError
from lowmem.schema import Section, expanded, find_file, names_in, parse, read_yaml, sections, yaml_value

if TYPE_CHECKING:
    from lowmem.data.datasets import DataSpec
    from lowmem.machine.floor import Library

# The registry of architectures: the name in a recipe, and where its section is. The section builds the model.
ARCHITECTURES = {
    "vit": "lowmem.models.sections:VitModel",
    "dit": "lowmem.models.sections:DitModel",
    "masked_lm": "lowmem.models.sections:MaskedLmModel",
    "causal_lm": "lowmem.models.sections:CausalLmModel",
    "recurrent_lm": "lowmem.models.sections:RecurrentLmModel",
    "huggingface": "lowmem.models.huggingface.section:HuggingfaceModel",
    "custom": "lowmem.recipe:CustomModel",
}

STANDARD_NORMAL = NormalDist()
PATHS = ("path", "tokenizer")  # keys whose value is, or may be, a path
# The kind of data that a file's ending suggests; another file is taken for a text.
KINDS_BY_ENDING = {".jsonl": "chat", ".csv": "chat", ".parquet": "chat", ".npz": "npz_images"}
FOLDERS = ("idx_images", "image_folder", "latent_arrays")  # kinds of data whose path is a folder
LEAST_PROBABILITY = 1e-3  # that a drawn level lies in [sigma_min, sigma_max]
Auto = Literal["auto"]
Tier = Literal["device", "host", "disk"]
Kept = Literal["float32", "bfloat16"]  # how trained weights are kept
Precision = Kept | Literal["float16"]  # of compute and gradients
Quantised = Literal["int8", "nf4"]
QUANTISED: tuple[Quantised, ...] = ("int8", "nf4")
Frozen = Kept | Quantised  # how frozen weights are kept
# muon: the blocks' matrices by Muon, with one moment; everything else by adamw
OptimizerName = Literal["adamw8bit", "adamw", "muon"]
# block_coordinate: the loss of the whole model, whose blocks are trained in turn by exact gradients
Method = Literal["diffusion_blocks", "end_to_end", "block_coordinate"]
# What the network sees of the noisy target z: c_in z (paper); E[y | z] without context; or nothing, so that
# only the read-out knows z and sigma.
NoisyInput = Literal["scaled", "posterior", "none"]
# The network's logits (paper), or the same with the analytic term E z / sigma^2 added.
Readout = Literal["plain", "bayes"]
# How ln sigma is drawn: around p_mean (paper); around the level that hides half of what z tells of a discrete
# target; or around that level with the spread that fits it too.
NoiseSchedule = Literal["lognormal", "centred", "balanced"]
P_MEAN, P_STD = -1.2, 1.2  # paper, App. C
# Bounds: far beyond what trains, and near enough that arithmetic on the numbers stays exact. A typing
# error in a size is then refused before a model of that size is built.
MOST_LAYERS, MOST_DIM = 256, 2**16  # a plan counts a pass of each layer
MOST_SAMPLES, MOST_TOKENS = 2**16, 2**20  # of a batch; of a sequence
MOST_STEP_TOKENS = 2**24  # of a whole step: the largest published runs take a quarter of that
MOST_CHUNKS = 512  # of a step's tokens, for their logits: a plan counts a pass of each
MOST_SEED = 2**63 - 1  # what every reader of JSON and every generator of random numbers takes
Fraction = Annotated[float, Field(ge=0, lt=1)]
# Of moments and averages: float32 no longer tells anything closer to 1 from 1.
Decay = Annotated[float, Field(ge=0, le=0.999999)]
Level = Annotated[float, Field(ge=1e-6, le=1e6)]  # sigma; its square is exact enough in float32
Count = Annotated[int, Field(gt=0, le=10**9)]  # of steps: at a millisecond each, 12 days for each block
Layers = Annotated[int, Field(gt=0, le=MOST_LAYERS)]
Width = Annotated[int, Field(gt=0, le=MOST_DIM)]
Samples = Annotated[int, Field(gt=0, le=MOST_SAMPLES)]
Share = Annotated[float, Field(ge=0, le=1)]


# ------------------------------------------------------------------------------------------------------------
# The model


class ModelConfig(Section):
    """The section `model`. Each architecture extends it with its own keys."""

    name: str

    @classmethod
    def variants(cls) -> list[type[Section]]:
        """Every architecture's section, for messages that name the known keys."""
        return [_section_of(name) for name in ARCHITECTURES]

    def builder(self, recipe: Recipe, spec: DataSpec) -> Callable[[], Any]:
        """What builds the `BlockModel` for the recipe's data.

        Raises ConfigError where the two do not go together.
        """
        raise NotImplementedError

    @property
    def begins_trained(self) -> bool:
        """Whether the first weights are trained ones, so that they are worth an evaluation."""
        return False

    @property
    def freezes(self) -> bool:
        """Whether only some of the weights are trained, and the others are frozen."""
        return False

    def library(self, adapter: bool) -> Library | None:
        """What the model is built with beside torch; None: nothing. `adapter`: with what it needs for one."""
        return None

    def fingerprint(self) -> str | None:
        """Of what this machine holds and the model is built from, beside the recipe; None: nothing.

        Raises ConfigError where that cannot be read.
        """
        return None

    def contradiction(self, recipe: Recipe) -> str | None:
        """One line about what in the rest of the recipe does not go with this model, or None."""
        return None


class TransformerModel(ModelConfig):
    """The keys that all packaged models have in common."""

    built_by: ClassVar[str]  # the module whose `builder(section, recipe, spec)` builds the model

    num_layers: Layers
    dim: Width  # of the residual stream
    num_heads: Width
    mlp_ratio: Annotated[int, Field(gt=0, le=64)] = 4
    dropout: Fraction = 0.0

    def builder(self, recipe: Recipe, spec: DataSpec) -> Callable[[], Any]:
        built: Callable[[], Any] = importlib.import_module(self.built_by).builder(self, recipe, spec)
        return built

    @property
    def least_layers(self) -> int:
        """The fewest layers that this model can have."""
        return 1

    @model_validator(mode="after")
    def _heads_divide(self) -> TransformerModel:
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"dim {self.dim} is not an even multiple of num_heads {self.num_heads}; change one of them"
            )
        return self


class CustomModel(ModelConfig):
    """A model built by the user's own `build_model()`; only the Python interface can train it."""

    name: Literal["custom"]

    def builder(self, recipe: Recipe, spec: DataSpec) -> Callable[[], Any]:
        raise ConfigError(
            "model.name: 'custom' models are trained from Python: "
            "Trainer(build_model, plan, run_dir).fit(batches)"
        )


def _section_of(name: str) -> type[ModelConfig]:
    module, _, section = ARCHITECTURES[name].partition(":")
    found: type[ModelConfig] = getattr(importlib.import_module(module), section)
    return found


def _model_section(raw: Any) -> ModelConfig:
    """The section of the architecture that `name` says."""
    if isinstance(raw, ModelConfig):
        return raw
    if not isinstance(raw, dict):
        raise PydanticKnownError("model_attributes_type")
    if "name" not in raw:
        raise PydanticKnownError("union_tag_not_found", {"discriminator": "'name'"})
    name = raw["name"]
    if not isinstance(name, str) or name not in ARCHITECTURES:
        expected = ", ".join(f"'{known}'" for known in ARCHITECTURES)
        raise PydanticKnownError(
            "union_tag_invalid", {"discriminator": "'name'", "tag": str(name), "expected_tags": expected}
        )
    return _section_of(name).model_validate(raw)


# ------------------------------------------------------------------------------------------------------------
# The other sections


class BlocksConfig(Section):
    num_blocks: Auto | Layers = "auto"
    visit_steps: Count = 50  # steps that a block stays on the device
    # random: a fresh order for each round; together: every visit of a round begins from the same shared part,
    # and the round ends with the mean of theirs, so that several ranks can make the visits at the same time
    order: Literal["round_robin", "random", "together"] = "round_robin"
    overlap_gamma: Fraction = 0.05  # paper, section 3.3
    # end_to_end: steps that a block makes each time it comes, from inputs and output gradients that are kept.
    # 1: exact.
    sweep_steps: Annotated[int, Field(gt=0, le=256)] = 1
    # block_coordinate: batches that a visit draws; its steps take them in turn, each with the same draws.
    # None: every step draws its own.
    visit_batches: Annotated[int, Field(gt=0, le=4096)] | None = None
    # end_to_end: until this share of the steps is made the first block is the whole model; then it is copied
    # to all others. None: all blocks are trained from the first step on.
    grow_at: Annotated[float, Field(gt=0, lt=1)] | None = None


class NoiseConfig(Section):
    schedule: NoiseSchedule = "lognormal"
    sigma_min: Level = 0.002
    sigma_max: Level = 80.0
    sigma_data: Level = 0.5
    p_mean: Annotated[float, Field(ge=-50, le=50)] = (
        P_MEAN  # mean of ln sigma; schedules centred and balanced measure it
    )
    p_std: Annotated[float, Field(ge=1e-3, le=50)] = (
        P_STD  # deviation of ln sigma; schedule balanced measures it
    )
    # The share of discrete targets' draws that are made at sigma_max in every block. They train the joint
    # prediction.
    sigma_max_share: Share = 0.0
    weighting: Literal["auto", "none", "edm"] = "auto"  # auto: edm for L2 losses, none for cross-entropy

    @model_validator(mode="after")
    def _ordered(self) -> NoiseConfig:
        measures_both = self.schedule == "balanced" and self.p_std != P_STD
        if measures_both or (self.schedule != "lognormal" and self.p_mean != P_MEAN):
            raise ValueError(
                f"schedule '{self.schedule}' measures p_mean (balanced: p_std too) from the targets; "
                "leave it out, or take lognormal"
            )
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} is not below sigma_max {self.sigma_max}; swap them")
        levels = (math.log(sigma) for sigma in (self.sigma_min, self.sigma_max))
        low, high = (STANDARD_NORMAL.cdf((level - self.p_mean) / self.p_std) for level in levels)
        if high - low < LEAST_PROBABILITY:
            raise ValueError(
                f"p_mean {self.p_mean} and p_std {self.p_std} put a share of {high - low:.1e} of all levels "
                f"between sigma_min and sigma_max; allowed: at least {LEAST_PROBABILITY}; move p_mean to "
                "where "
                "the levels are"
            )
        return self


class TrainConfig(Section):
    num_steps: Count  # per block
    batch_size: Samples
    micro_batch_size: Auto | Samples = "auto"  # samples in one forward and backward pass
    # tokens; None where the data fix it
    seq_len: Annotated[int, Field(gt=0, le=MOST_TOKENS)] | None = None
    lr: Annotated[float, Field(gt=0, le=1e3)]  # about what Adam adds to each weight in a step
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 0
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] = 0
    # bfloat16, float16: compute and gradients in that. float16 needs optimizer.loss_scale.
    precision: Auto | Precision = "auto"
    # CUDA and float16: matrix products also sum in fp16, which some cards do twice as fast.
    fp16_accumulation: bool = False
    # How weights are kept. auto: float32. bfloat16: rounded stochastically, with no fp32 copy anywhere.
    weights: Auto | Kept = "auto"
    recompute: Auto | bool = "auto"  # activation checkpointing of each layer
    # Out of memory in a visit. shrink: go on from the last commit with half the micro-batch.
    on_oom: Literal["stop", "shrink"] = "stop"
    # On CUDA: take only kernels that give the same bits each time. A CPU always does.
    deterministic: bool = False


class OptimizerConfig(Section):
    name: Auto | OptimizerName = "auto"
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    # float32 holds it, and a step is still nearly lr
    eps: Annotated[float, Field(ge=1e-30, le=1.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 0.05
    grad_clip: Annotated[float, Field(ge=1e-12, le=1e12)] | None = 1.0  # L2 norm of the gradient; None = off
    # Which norm is clipped: that of each block and of the shared part, or that of the whole model
    # (end_to_end).
    clip: Literal["block", "global"] = "block"
    # Update each parameter, and free its gradient, as soon as the gradient is whole. auto: where one pass
    # suffices.
    during_backward: Auto | bool = "auto"
    # Decay per step of an average of the weights, kept in fp32 and used to evaluate and sample. None = none
    # is kept.
    ema: Decay | None = None
    # float16: backward starts from the loss times this power of two, and an update divides by it.
    loss_scale: Annotated[float, Field(ge=1, le=2**15)] = 1.0

    @property
    def scaled_clip(self) -> float | None:
        """The largest norm of gradients of the scaled loss."""
        return None if self.grad_clip is None else self.grad_clip * self.loss_scale

    @property
    def clips_whole(self) -> bool:
        return self.clip == "global" and self.grad_clip is not None


class AdapterConfig(Section):
    """Small matrices that are trained beside frozen weights, as in LoRA (Hu et al., 2021)."""

    name: Literal["lora"]
    r: Annotated[int, Field(gt=0, le=4096)] = 16  # rank
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 32.0  # what they add is scaled by alpha / r
    # The layers' modules that they stand beside, by the end of their names; auto: every linear one.
    targets: Auto | Annotated[list[str], Field(min_length=1, max_length=256)] = "auto"
    dropout: Fraction = 0.0
    # How the frozen weights are kept. In 8 and 4 bits it is those of linear layers, and all else is kept in
    # the dtype of compute.
    base: Frozen = "bfloat16"


class OffloadConfig(Section):
    tier: Auto | Tier = "auto"  # where blocks rest that are not visited
    # Where activations at block borders rest while a model trained end to end streams.
    borders: Auto | Tier = "auto"
    # Where the masters and moments of the shared part rest in that case. tier: with the blocks; on the device
    # are its weights in the compute dtype and its gradients. auto: on the device, if it has room.
    shared: Auto | Literal["device", "tier"] = "auto"
    # Layers that stay on the device whole, while the others of a model trained end to end stream.
    # auto: as many as the budget has room for.
    resident_layers: Auto | Annotated[int, Field(ge=0, le=10**6)] = "auto"
    # More layers, of which the weights alone stay. auto: as many as the budget has room for, before any layer
    # stays whole; none where resident_layers is a number.
    resident_weights: Auto | Annotated[int, Field(ge=0, le=10**6)] = "auto"
    # How far several ranks spread a model that is trained end to end (DeepSpeed's ZeRO): 1 optimizer state,
    # 2 gradients too, 3 weights too. auto: 1 where the tier is device, else 3.
    zero_stage: Auto | Literal[1, 2, 3] = "auto"
    prefetch: bool = True  # read the next block beside compute
    # wait: a block is on disk before the next step starts.
    write_back: Literal["auto", "beside", "wait"] = "auto"
    # Keep the files of the commit before the last, for `lowmem recover`. A whole model streamed then takes
    # three times its size on the drive, and twice without.
    keep_previous: bool = True
    # Move bytes no faster than the profile's link and disk: how long a run would take on a slower machine.
    pace: bool = False


class EvalConfig(Section):
    # denoising steps of the chain; auto: one for each block, 18 for images
    num_steps: Auto | Annotated[int, Field(gt=0, le=10**5)] = "auto"
    # Whose accuracy is a classifier's headline. The report has both.
    prediction: Literal["chain", "joint"] = "chain"
    batch_size: Samples = 256
    num_batches: Count | None = None  # of the test part; None = all of it
    num_samples: Annotated[int, Field(gt=0, le=10**7)] = 1000  # images generated
    # without class (or image) + guidance (with - without); 1 = none; auto: 2 for images, 1 for labels
    guidance: Auto | Annotated[float, Field(gt=0, le=1e3)] = "auto"


class Recipe(Section):
    schema_version: Literal[1] = Field(alias="schema")
    method: Method
    model: Annotated[SerializeAsAny[ModelConfig], BeforeValidator(lambda raw: _model_section(raw))]
    blocks: BlocksConfig = BlocksConfig()
    noise: NoiseConfig = NoiseConfig()
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    adapter: AdapterConfig | None = None  # None: all weights are trained
    offload: OffloadConfig = OffloadConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def whole(self) -> bool:
        """Whether the loss is that of the whole model, and not of a block alone."""
        return self.method != "diffusion_blocks"

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for contradiction in (self.model.contradiction, *CONTRADICTIONS):
            found = contradiction(self)
            if found is not None:
                raise ValueError(found)
        return self

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)


# ------------------------------------------------------------------------------------------------------------
# What contradicts what: each gives one line, or None


def _clip_without_all_gradients(recipe: Recipe) -> str | None:
    if recipe.optimizer.clip != "global" or recipe.method == "end_to_end":
        return None
    return (
        f"optimizer.clip: found 'global'; allowed with method {recipe.method}: block "
        "(no step has all gradients at once)"
    )


def _more_blocks_than_layers(recipe: Recipe) -> str | None:
    layers, blocks = getattr(recipe.model, "num_layers", None), recipe.blocks.num_blocks
    if layers is None or blocks == "auto" or blocks <= layers:
        return None
    return f"blocks.num_blocks: found {blocks}; allowed: at most model.num_layers = {layers}; lower it"


def _scale_without_image_targets(recipe: Recipe) -> str | None:
    if getattr(recipe.data, "scale", None) != "measured" or recipe.model.name == "dit":
        return None
    return (
        f"data.scale: found 'measured'; allowed with model.name {recipe.model.name}, whose targets are no "
        "images: null; leave it out"
    )


def _batch_not_divided(recipe: Recipe) -> str | None:
    size, whole = recipe.train.micro_batch_size, recipe.train.batch_size
    if size == "auto" or whole % size == 0:
        return None
    return f"train.micro_batch_size: found {size}; allowed: a divisor of train.batch_size = {whole}"


def _bf16_weights_in_fp32(recipe: Recipe) -> str | None:
    if recipe.train.weights != "bfloat16" or recipe.train.precision != "float32":
        return None
    return (
        "train.weights: found bfloat16; allowed with train.precision float32: float32; "
        "set train.precision: bfloat16"
    )


def _scale_that_cannot_be(recipe: Recipe) -> str | None:
    precision, scale = recipe.train.precision, recipe.optimizer.loss_scale
    found = f"optimizer.loss_scale: found {scale:g}; allowed with train.precision {precision}"
    if precision != "float16":
        return None if scale == 1 else f"{found}: 1; leave it out"
    if scale == 1 or math.frexp(scale)[0] != 0.5:
        return f"{found}: a power of two from 2 to {2**15}; set 1024"
    return None


def _float16_that_cannot_be(recipe: Recipe) -> str | None:
    train = recipe.train
    if train.fp16_accumulation and train.precision != "float16":
        return (
            f"train.fp16_accumulation: found true; allowed with train.precision {train.precision}: false; "
            "set train.precision: float16"
        )
    if train.precision != "float16":
        return None
    if train.weights == "bfloat16":
        return "train.weights: found bfloat16; allowed with train.precision float16: float32; set it"
    if recipe.adapter is not None or recipe.model.freezes:
        return (
            "train.precision: found float16; allowed where weights are frozen: auto, float32, bfloat16; "
            "set train.precision: bfloat16"
        )
    return None


def _update_before_gradients_are_whole(recipe: Recipe) -> str | None:
    train, clip = recipe.train, recipe.optimizer.grad_clip
    if recipe.optimizer.during_backward is not True:
        return None
    if clip is not None:
        return (
            f"optimizer.during_backward: found true; allowed with optimizer.grad_clip {clip}, which needs "
            "all gradients at once: false, auto; set optimizer.grad_clip: null"
        )
    if train.micro_batch_size not in ("auto", train.batch_size):
        return (
            "optimizer.during_backward: found true; allowed with train.micro_batch_size "
            f"{train.micro_batch_size}, whose gradients add up: false, auto; set train.micro_batch_size: "
            f"{train.batch_size}"
        )
    return None


def _warmup_longer_than_the_run(recipe: Recipe) -> str | None:
    train = recipe.train
    if train.warmup_steps <= train.num_steps:
        return None
    found, most = train.warmup_steps, train.num_steps
    return f"train.warmup_steps: found {found}; allowed: at most train.num_steps = {most}"


def _step_of_too_many_tokens(recipe: Recipe) -> str | None:
    train = recipe.train
    if train.seq_len is None or train.batch_size * train.seq_len <= MOST_STEP_TOKENS:
        return None
    return (
        f"train.batch_size: found {train.batch_size} sequences of train.seq_len {train.seq_len} tokens; "
        f"allowed: {MOST_STEP_TOKENS} tokens in a step; lower one of them"
    )


def _step_of_too_many_chunks(recipe: Recipe) -> str | None:
    train, chunk = recipe.train, getattr(recipe.model, "head_chunk", None)
    if train.seq_len is None or chunk is None:
        return None
    least = -(-train.batch_size * train.seq_len // MOST_CHUNKS)
    if chunk >= least:
        return None
    return (
        f"model.head_chunk: found {chunk}; allowed for {train.batch_size} times {train.seq_len} tokens, "
        f"whose logits come in at most {MOST_CHUNKS} chunks: {least} or more; raise it"
    )


def _decay_of_whole_weights(recipe: Recipe) -> str | None:
    share = recipe.train.lr * recipe.optimizer.weight_decay
    if share <= 1:
        return None
    return (
        f"optimizer.weight_decay: found {recipe.optimizer.weight_decay:g} with train.lr {recipe.train.lr:g}; "
        f"allowed: a product of at most 1, the share that a step takes off every weight; lower one of them"
    )


def _adapter_of_another_model(recipe: Recipe) -> str | None:
    if recipe.adapter is None or recipe.model.name == "huggingface":
        return None
    return f"adapter: allowed with model.name huggingface, found '{recipe.model.name}'; leave it out"


def _sweep_that_cannot_be(recipe: Recipe) -> str | None:
    steps, train = recipe.blocks.sweep_steps, recipe.train
    if steps == 1:
        return None
    found = f"blocks.sweep_steps: found {steps}; allowed"
    if recipe.method != "end_to_end":
        return f"{found} with method {recipe.method}: 1 (its blocks are trained alone); leave it out"
    if recipe.optimizer.clips_whole:
        return (
            f"{found} with optimizer.clip global: 1 (no block has the gradients of another at hand); "
            "set optimizer.clip: block"
        )
    if recipe.optimizer.during_backward is True:
        return f"{found} with optimizer.during_backward true: 1; set optimizer.during_backward: auto"
    if recipe.adapter is not None or recipe.model.freezes:
        return f"{found} where layers are frozen: 1 (their blocks are not updated); leave it out"
    if train.num_steps % steps:
        return (
            f"train.num_steps: found {train.num_steps}; allowed with blocks.sweep_steps {steps}: a multiple "
            f"of it; set {-(-train.num_steps // steps) * steps}"
        )
    return None


def _together_that_cannot_be(recipe: Recipe) -> str | None:
    if recipe.blocks.order != "together":
        return None
    found = "blocks.order: found 'together'"
    if recipe.method == "end_to_end":
        return f"{found}; allowed with method end_to_end: round_robin (its blocks share a step); leave it out"
    if recipe.method == "block_coordinate":
        return f"{found}; allowed with method block_coordinate: round_robin, random (a step needs all blocks)"
    if recipe.train.weights == "bfloat16":
        return (
            f"{found} with train.weights bfloat16; allowed: float32, because the shared part becomes a mean, "
            "and small changes would be lost in its rounding; set it"
        )
    return None


def _growth_that_cannot_be(recipe: Recipe) -> str | None:
    blocks, layers = recipe.blocks, getattr(recipe.model, "num_layers", None)
    if blocks.grow_at is None:
        return None
    found = f"blocks.grow_at: found {blocks.grow_at:g}"
    if recipe.method != "end_to_end":
        return f"{found}; allowed with method {recipe.method}: null; set method: end_to_end"
    if recipe.model.begins_trained or recipe.adapter is not None or recipe.model.name == "recurrent_lm":
        return f"{found}; allowed with model.name {recipe.model.name}: null (its blocks are not alike)"
    if blocks.num_blocks in ("auto", 1):
        return (
            f"{found} with blocks.num_blocks {blocks.num_blocks}; allowed: a number above 1, because the "
            "first block is copied to the others; set it"
        )
    if layers is not None and layers % blocks.num_blocks:
        return (
            f"{found} with {blocks.num_blocks} blocks of {layers} layers; allowed: blocks of as many layers "
            "each; set a blocks.num_blocks that divides model.num_layers"
        )
    if recipe.train.num_steps <= blocks.visit_steps:
        return (
            f"{found} with blocks.visit_steps {blocks.visit_steps}; allowed: less than train.num_steps = "
            f"{recipe.train.num_steps}, because a model grows between two visits; lower it"
        )
    return None


def _turns_that_cannot_be(recipe: Recipe) -> str | None:
    blocks = recipe.blocks
    if recipe.method != "block_coordinate":
        if blocks.visit_batches is None:
            return None
        return (
            f"blocks.visit_batches: found {blocks.visit_batches}; allowed with method {recipe.method}: null; "
            "set method: block_coordinate"
        )
    found = "method: found 'block_coordinate'"
    if recipe.adapter is not None or recipe.model.freezes:
        return f"{found}; allowed where layers are frozen: end_to_end (no block would be trained); change it"
    if blocks.num_blocks == 1:
        return (
            f"{found} with blocks.num_blocks 1, which is end_to_end; allowed: 2 or more; change one of them"
        )
    if recipe.optimizer.during_backward is True:
        return f"{found} with optimizer.during_backward true; allowed: auto, false; change it"
    for key in ("resident_layers", "resident_weights"):
        count = getattr(recipe.offload, key)
        if count not in ("auto", 0):
            return (
                f"offload.{key}: found {count}; allowed with method block_coordinate, whose visited block "
                "stays: auto, 0; leave it out"
            )
    return None


CONTRADICTIONS = (
    _turns_that_cannot_be,
    _scale_without_image_targets,
    _together_that_cannot_be,
    _growth_that_cannot_be,
    _adapter_of_another_model,
    _step_of_too_many_tokens,
    _step_of_too_many_chunks,
    _decay_of_whole_weights,
    _clip_without_all_gradients,
    _more_blocks_than_layers,
    _batch_not_divided,
    _bf16_weights_in_fp32,
    _scale_that_cannot_be,
    _float16_that_cannot_be,
    _update_before_gradients_are_whole,
    _warmup_longer_than_the_run,
    _sweep_that_cannot_be,
)


# ------------------------------------------------------------------------------------------------------------
# Files and overrides


def load_recipe(name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name or path, with `key=value` overrides on top.

    Raises ConfigError: unknown recipe, key or name, wrong type, or settings that contradict each other.
    """
    return recipe_from_dict(*read_recipe(name, overrides))


def read_recipe(name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """(The recipe as YAML holds it, with `key=value` overrides on top; what a message about it begins with).

    Raises ConfigError.
    """
    path = find_file(name, "recipes", "recipe", ConfigError)
    raw, where = _with_paths(read_yaml(path, ConfigError)), f"recipe {path.stem}"
    with_overrides(raw, overrides)
    _require_kind_of_path(raw, overrides)
    return raw, where


def _steps(raw: dict[str, Any]) -> tuple[int, int] | None:
    """(train.warmup_steps, train.num_steps) of a recipe that has both."""
    train = raw.get("train")
    found = (train.get("warmup_steps"), train.get("num_steps")) if isinstance(train, dict) else ()
    whole = [number for number in found if isinstance(number, int) and number > 0]
    return (whole[0], whole[1]) if len(whole) == 2 else None


def _fit_warmup(raw: dict[str, Any], planned: tuple[int, int] | None, overrides: Sequence[str]) -> None:
    """Keeps the recipe's share of warm-up in a run that `overrides` make shorter than the warm-up.

    One that is long enough keeps the number, and a given number is not touched.
    """
    now = _steps(raw)
    given = {"train", "train.warmup_steps"} & {override.partition("=")[0] for override in overrides}
    if planned and now and not given and now[0] > now[1] and planned[0] <= planned[1]:
        raw["train"]["warmup_steps"] = planned[0] * now[1] // planned[1]


def _require_kind_of_path(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Raises ConfigError where only the data's path is given, and the recipe's kind of data has none.

    So too where it is a file and that kind reads a folder.
    """
    data, keys = raw.get("data"), {override.partition("=")[0] for override in overrides}
    if not isinstance(data, dict) or "data.path" not in keys or keys & {"data", "data.name"}:
        return
    kind, path = data.get("name"), data.get("path")
    known: dict[Any, type[BaseModel]] = {
        name: section
        for section in sections(Recipe.model_fields["data"].annotation)
        for name in get_args(section.model_fields["name"].annotation)
    }
    if kind not in known or not isinstance(path, str):
        return
    if "path" not in known[kind].model_fields:
        why = "has no path"
    elif kind in FOLDERS and os.path.isfile(path):
        why = "reads a folder, and this is a file"
    else:
        return
    names = sorted(name for name, section in known.items() if "path" in section.model_fields)
    example = KINDS_BY_ENDING.get(Path(path).suffix, "image_folder" if os.path.isdir(path) else "text")
    raise ConfigError(
        f"--set data.path: found '{path}'; the recipe's data.name '{kind}' {why}; set data.name too, as in "
        f"--set data.name={example}; allowed with a path: "
        f"{', '.join(names)}"
    )


def with_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A recipe as YAML holds it, with `key=value` overrides on top. Raises ConfigError."""
    planned = _steps(raw)
    for override in overrides:
        _override(raw, override, "--set", "blocks.num_blocks=6")
    _fit_warmup(raw, planned, overrides)
    return raw


def recipe_from_dict(raw: dict[str, Any], where: str) -> Recipe:
    """`raw` as a recipe; `where` begins the message of the ConfigError that it may raise. Loads no torch."""
    return parse(Recipe, raw, where, ConfigError)


def require_packages(recipe: Recipe) -> None:
    """Raises DataError where a package that the recipe's data or model needs is not installed."""
    for module in recipe.data.packages:
        require_package(module, f"data.name: '{recipe.data.name}'")
    if recipe.model.name == "huggingface":
        for module in ("transformers", *(["peft"] if recipe.adapter else [])):
            require_package(module, "model.name: 'huggingface'")


def with_data(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with `key=value` overrides of its data section. A new `name` starts a new section.

    What the recipe declares of the old data (shapes, counts) does not hold for the new ones and is dropped.
    Raises ConfigError as `load_recipe` does.
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
    *above, last = key.split(".")
    for section in above:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{option} {key}: '{section}' is a value, not a section with keys")
    raw[last] = _with_paths(value, last, key)


def _with_paths(value: Any, key: str = "", where: str = "") -> Any:
    """A value of YAML with `~` and variables in paths written out. Those of a stranger's run never are."""
    if isinstance(value, dict):
        return {
            name: _with_paths(inner, name, f"{where}.{name}".lstrip(".")) for name, inner in value.items()
        }
    return expanded(value, where, ConfigError) if key in PATHS and isinstance(value, str) else value
