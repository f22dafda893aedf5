"""Predicts what evaluating a run takes, and picks the micro-batches with which that stays in the budget.

An evaluation holds no gradients. Its largest call is counted as training's passes are (see `passes`). Beside
it lie the samples that wait while the blocks pass, and what is kept of every sample to the end. The first
micro-batch that fits is taken, the whole evaluation batch first; then as many samples for each walk over the
blocks as fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from math import ceil
from typing import Any, NamedTuple

from lowmem.blocks.unit_stream import unit_bytes
from lowmem.models.base import BlockModel
from lowmem.objectives.base import Objective
from lowmem.objectives.block_tokens import BlockTokens
from lowmem.objectives.given_loss import GivenLoss
from lowmem.objectives.images import ImageDenoising
from lowmem.objectives.labels import LabelDenoising
from lowmem.objectives.masked import MaskedDenoising
from lowmem.objectives.next_tokens import NextTokens
from lowmem.objectives.recurrent import RecurrentDenoising
from lowmem.objectives.tokens import TokenDenoising
from lowmem.planning.duration import Work, has_rates, moving_s, pass_s
from lowmem.planning.passes import Pass, PassCounter
from lowmem.planning.settings import Setup, shared_bytes
from lowmem.recipe import EvalConfig
from lowmem.schema import Section
from lowmem.units import format_bytes, format_seconds

TOGETHER = 8  # evaluation batches that pass the blocks of a model trained end to end in one walk, at most
NUM_STEPS, GUIDANCE = 18, 2.0  # of images, where the recipe says auto: EDM's steps, and the paper's guidance
NUM_DRAWS = 4  # of t and masks, for each test window and block of a masked model
ITERATIONS = (1, 2, 4, 8, 16, 32)  # at which a recurrent model is looked at
FEATURE_IMAGES = 6000  # training images at most that the feature space of generated images is made from
NETWORK_BYTES = 64 * 200 * 4  # for each pixel: the activations of the feature network's training, 64 images
# for each pixel of an image, and of it for each channel: the feature network's operations of one pass
NETWORK_FLOPS, NETWORK_CHANNEL_FLOPS = 2 * (9 * 32 * 64 // 4 + 9 * 64 * 64 // 16), 2 * 9 * 32
NETWORK_IMAGES = 700 * 64  # that the network is trained on, each with three times the operations of a pass
NORMALS = 16  # torch draws normal numbers in groups of so many: whole groups may be drawn apart


class Evaluation(Section):
    """What the evaluation at a run's end is predicted to take, and how it is cut to fit."""

    peak_bytes: int  # on the device
    by_category: dict[str, int]  # adds up to the peak
    micro_batch_size: int  # samples of one call
    walk_size: int  # samples that pass the blocks in one walk over them
    batch_size: int  # of the recipe; micro-batches are parts of it
    num_samples: int | None  # test samples; None: not known before the data are read
    layer_calls: int  # samples, once for each layer that they pass
    seconds: float | None = None  # None: the profile lacks a rate, or the samples are not known

    @property
    def is_split(self) -> bool:
        """Whether the recipe's evaluation batches are cut to stay in the budget."""
        return self.micro_batch_size < min(self.batch_size, self.num_samples or self.batch_size)

    @property
    def base_bytes(self) -> int:
        """Of the peak, what does not depend on the micro-batch."""
        return self.peak_bytes - self.by_category["activations"]

    def line(self) -> str:
        """The prediction as a line for the plan's table."""
        whole = f" of {self.batch_size}" if self.is_split else ""
        time = "time unknown" if self.seconds is None else f"about {format_seconds(self.seconds)}"
        size = f"micro-batch {self.micro_batch_size}{whole}"
        return f"evaluation  {format_bytes(self.peak_bytes)}, {size}, {time}"


class Demand(NamedTuple):
    """What one kind of evaluation asks for; bytes are of one sample unless said otherwise."""

    passes: float  # of a test sample through one block, or through the model where it is trained end to end
    walk_bytes: int  # while the blocks pass
    held_bytes: int  # of every test sample, to the end
    fixed_bytes: int = 0  # beside the calls, in all
    least_bytes: int = 0  # that a phase without the model's calls takes, in all
    drawn: float = 0.0  # passes of generated samples, in all
    row: int = NORMALS  # normal numbers that are drawn at once for a sample
    cpu_flops: int = 0  # beside the model's calls, on the CPU whatever the device


def sampling_settings(config: EvalConfig) -> tuple[int, float]:
    """(steps of the chain, guidance) with which images are made."""
    num_steps = NUM_STEPS if config.num_steps == "auto" else config.num_steps
    return num_steps, GUIDANCE if config.guidance == "auto" else config.guidance


def plan_evaluation(
    model: BlockModel,
    setup: Setup,
    counter: PassCounter,
    training: dict[str, int],
    allowed_bytes: int,
    num_test: int | None,
) -> Evaluation | None:
    """The evaluation of a run of `setup`; None for an objective that has none.

    `training`: the plan's bytes by category. `allowed_bytes`: the highest peak that the budget holds.
    `num_test`: samples of the test part, None if not known. Where nothing fits, the smallest is returned.
    """
    config = setup.recipe.eval
    batches = TOGETHER if num_test is None else ceil(num_test / config.batch_size)
    batches = min(config.num_batches or batches, batches)
    most = batches * config.batch_size
    num_samples = most if num_test is None else min(most, num_test)
    known = num_samples if num_test is not None or config.num_batches else None
    demand = _demand(model, setup, counter, num_samples)
    if demand is None:
        return None
    layers = range(len(model.layers)) if setup.whole else model.block_slices(setup.settings.num_blocks)[0]
    base = _base(setup, training)
    held = demand.held_bytes * num_samples + demand.fixed_bytes
    left, per_sample = allowed_bytes - sum(base.values()) - held, 0.0
    for size in _sizes(min(config.batch_size, num_samples), demand.row):
        if size > 1 and size * (per_sample + demand.walk_bytes) > left:
            continue  # a smaller size takes no less for each sample
        peak_bytes = _counted(model, setup, counter, layers, size).peak_bytes
        per_sample, room = peak_bytes / size, left - peak_bytes
        most_walked = num_samples if not setup.whole else min(num_samples, TOGETHER * config.batch_size)
        walk = min(most_walked, max(room, 0) // max(demand.walk_bytes, 1) // size * size)
        if walk >= size or size == 1:
            break
    taken = _with_work(model, setup, counter, layers, size)
    walk = max(walk, size)
    kept = held + demand.walk_bytes * walk
    categories = {**base, "activations": max(taken.peak_bytes + kept, demand.least_bytes)}
    total = demand.passes * num_samples + demand.drawn
    return Evaluation(
        peak_bytes=sum(categories.values()),
        by_category=categories,
        micro_batch_size=size,
        walk_size=walk,
        batch_size=config.batch_size,
        num_samples=known,
        layer_calls=round(total * len(layers)),
        seconds=None
        if known is None
        else _seconds(setup, taken, total / size, ceil(num_samples / walk), demand.cpu_flops),
    )


def _counted(model: BlockModel, setup: Setup, counter: PassCounter, layers: range, size: int) -> Pass:
    """The largest call, with the peak of all `layers` and the work of those that are counted.

    Without gradients a layer's activations are gone when the next one computes. So of a deep model that
    streams layer by layer, the first two layers tell the rest.
    """
    first = range(2) if _first_tell(model, setup, layers) else layers
    return counter.evaluated(first, setup.settings, size)


def _with_work(model: BlockModel, setup: Setup, counter: PassCounter, layers: range, size: int) -> Pass:
    """The same with the work of all `layers`."""
    taken = _counted(model, setup, counter, layers, size)
    if not _first_tell(model, setup, layers):
        return taken
    one = counter.evaluated(range(1), setup.settings, size)
    more = {kind: count * (len(layers) - 1) for kind, count in (taken.work - one.work).items()}
    return taken._replace(work=one.work + Work(more))


def _first_tell(model: BlockModel, setup: Setup, layers: range) -> bool:
    """Whether the first two layers tell what all take."""
    shapes = {tuple(p.shape for p in layer.parameters()) for layer in model.layers}
    alike = model.layers_alike or (setup.streams and len(shapes) == 1)
    return alike and len(model.units()) == len(layers) and len(layers) > 2


def _sizes(most: int, row: int) -> Iterator[int]:
    """Micro-batches, largest first: the whole batch, then powers of two.

    Where several are drawn one after the other, each holds whole groups of normal numbers: they are then the
    numbers that the whole batch would have drawn.
    """
    yield most
    for exponent in itertools.count(most.bit_length() - 1, -1):
        size = 1 << max(exponent, 0)
        if size < most and (size * row % NORMALS == 0 or size == 1):
            yield size
        if exponent <= 0:
            return


def _base(setup: Setup, training: dict[str, int]) -> dict[str, int]:
    """Bytes by category that do not depend on the micro-batch: training's, without what updates need."""
    gone = {"gradients", "activations", "borders"}
    kept = {name: num_bytes for name, num_bytes in training.items() if name not in gone}
    snapshot = setup.snapshot_bytes if setup.profile.unified else 0
    kept["staging"] -= snapshot
    shared = setup.shared  # only its weights to use are read
    kept["shared_part"] += shared.result[2] + setup.copy_bytes * shared.numel - shared_bytes(setup)
    if setup.streams:  # no layer stays, and none is updated
        prefetch = setup.recipe.offload.prefetch
        frozen = unit_bytes(setup.units, frozenset(), prefetch)
        if setup.swept or setup.coordinate:
            copied = setup.block_copy_bytes * max(unit.numel for unit in setup.units)
            kept["weights"] = frozen.weights + copied
            kept["staging"] -= setup.staged_bytes[0]
            kept["staging"] += 0 if setup.coordinate else frozen.fetched
        else:
            trained = setup.unit_bytes
            kept["weights"] += frozen.weights - trained.weights
            kept["staging"] += frozen.fetched - trained.fetched - trained.chunks
        kept["optimizer_state"] = 0
    return kept


def _seconds(setup: Setup, taken: Pass, calls: float, walks: int, cpu_flops: int) -> float | None:
    """On a profile of a card the rate of its CPU is not known, and what the CPU does is left out."""
    if not has_rates(setup.profile):
        return None
    moved = 0 if setup.resident else walks * sum(layout.total_bytes for layout in setup.layouts)
    beside = Work({(cpu_flops, 0): 1} if setup.profile.device.type == "cpu" else {})
    return calls * pass_s(taken.work, setup.profile) + (
        pass_s(beside, setup.profile) + moving_s(moved, 0, setup.profile, setup.settings.tier == "disk")
    )


# ------------------------------------------------------------------------------------------------------------
# The kinds of targets


def _demand(model: BlockModel, setup: Setup, counter: PassCounter, num_samples: int) -> Demand | None:
    """What the evaluation of the objective's kind asks for; `lowmem.inference.kinds` names the same kinds."""
    objective: Objective[Any, Any] = counter.objective
    config, num_blocks = setup.recipe.eval, setup.settings.num_blocks
    levels = num_blocks + 2  # the middle of each block's, and both ends
    steps = num_blocks if config.num_steps == "auto" else config.num_steps
    item = sum(v.numel() * v.element_size() for v in model.example_batch(1).values())
    if isinstance(objective, ImageDenoising):
        return _images(model, config, item, num_samples, 3 * levels)
    if isinstance(objective, MaskedDenoising):
        return Demand(NUM_DRAWS * num_blocks + 2 * levels, 0, item)
    waits = 0
    if setup.streams:
        waits = sum(counter.waiting(setup.settings)) // setup.settings.micro_batch_size
    if isinstance(objective, BlockTokens):
        length, (_, dim) = model.example_batch(1)["labels"].numel(), objective.target_shape()
        # of the block that passes both features, with the true tokens and with another's; and their mean
        return Demand(2 * num_blocks, item + 12 * length * dim, 0, row=length * dim)
    if isinstance(objective, NextTokens | GivenLoss):
        return Demand(1, waits, item)
    if isinstance(objective, TokenDenoising):
        length, (_, dim) = item // 8, objective.target_shape()
        if isinstance(objective, RecurrentDenoising):
            loops = sum(ITERATIONS)
            counted = objective.fixed_iterations or objective.iterations
            passes = (loops + objective.iterations) / counted if setup.whole else loops + 1
            return Demand(passes, waits, item, row=length * dim)
        if setup.whole:
            return Demand(1, waits, item)
        # the noise at the top, the chain's z and the mean of the features; tokens, and another's
        return Demand(num_blocks + 2 * levels + 3 * steps, 12 * length * dim + 2 * item, 0, row=length * dim)
    if isinstance(objective, LabelDenoising):
        num_classes, dim = objective.target_shape()
        if setup.whole:
            return Demand(1, waits, item + 12 * num_classes)
        guided = 2 if config.guidance not in ("auto", 1) else 1
        passes = num_blocks + 2 * levels + steps * (2 * guided + 2)
        return Demand(passes, item + 8 * dim + 4 * num_classes, 0, row=dim)
    return None


def _images(model: BlockModel, config: EvalConfig, item: int, num_samples: int, losses: int) -> Demand:
    """Made images exist three times at most: as parts, joined, and clamped."""
    num_steps, guidance = sampling_settings(config)
    made = 3 * config.num_samples * item
    drawn = config.num_samples * num_steps * (1 if guidance == 1 else 2)
    channels, height, width = model.example_batch(1)["image"].shape[1:]
    network = NETWORK_BYTES * height * width + 2 * FEATURE_IMAGES * item + num_samples * item
    flops = height * width * (NETWORK_FLOPS + channels * NETWORK_CHANNEL_FLOPS)
    seen = 3 * NETWORK_IMAGES + FEATURE_IMAGES + num_samples + config.num_samples
    return Demand(losses, 0, item, made, network, float(drawn), cpu_flops=flops * seen)
