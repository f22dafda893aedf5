"""What inference needs to know of each kind of target: how it is evaluated, and what is drawn from it.

A kind of target is an objective. A new one adds its line here; a new architecture with a known kind adds
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lowmem.data.datasets import Dataset
from lowmem.errors import ConfigError
from lowmem.inference import image_samples, sampling
from lowmem.inference.evaluation import (
    block_tokens,
    given_loss,
    images,
    labels,
    masked,
    next_tokens,
    recurrent,
    tokens,
)
from lowmem.inference.frozen_run import FrozenRun
from lowmem.inference.sampling import Draw
from lowmem.objectives.base import Objective
from lowmem.objectives.block_tokens import BlockTokens
from lowmem.objectives.given_loss import GivenLoss
from lowmem.objectives.images import ImageDenoising
from lowmem.objectives.labels import LabelDenoising
from lowmem.objectives.masked import MaskedDenoising
from lowmem.objectives.next_tokens import NextTokens
from lowmem.objectives.recurrent import RecurrentDenoising
from lowmem.objectives.tokens import TokenDenoising


@dataclass(frozen=True)
class Kind:
    """One kind of target. It draws images, or tokens, or nothing."""

    evaluate: Callable[[FrozenRun, Dataset], dict[str, Any]]
    # writes (path, how many, seed); None: no images
    write_images: Callable[[FrozenRun, Path, int | None, int], None] | None = None
    # [B, L] from a prompt [B, L'], a number of tokens and how to draw; None: no text
    draw_tokens: Callable[[FrozenRun, Tensor, int, Draw], Tensor] | None = None


KINDS: dict[type[Objective[Any, Any]], Kind] = {
    LabelDenoising: Kind(labels.evaluate),
    ImageDenoising: Kind(images.evaluate, write_images=image_samples.write_samples),
    MaskedDenoising: Kind(masked.evaluate, draw_tokens=sampling.fill),
    TokenDenoising: Kind(tokens.evaluate, draw_tokens=sampling.generate),
    NextTokens: Kind(next_tokens.evaluate),
    BlockTokens: Kind(block_tokens.evaluate),
    GivenLoss: Kind(given_loss.evaluate),
    RecurrentDenoising: Kind(recurrent.evaluate, draw_tokens=sampling.generate_recurrent),
}


def kind_of(frozen: FrozenRun) -> Kind:
    """The kind of the run's objective, or of the nearest class that it extends.

    Raises ConfigError without one.
    """
    for cls in type(frozen.objective).__mro__:
        if cls in KINDS:
            return KINDS[cls]
    raise ConfigError(f"model.name: '{frozen.plan.recipe.model.name}' has no evaluation")
