"""What depends on the step alone: the learning rate, and the seed of everything random."""

from __future__ import annotations

import hashlib
import math

from lowmem.recipe import TrainConfig


def learning_rate(step: int, train: TrainConfig, grow_steps: int = 0) -> float:
    """A linear warm-up to `lr`, then constant or a cosine down to 0. `step`: counted per block, from 0.

    `grow_steps`: until the model grows the rate is constant, because the whole model has yet to learn. The
    cosine belongs to the steps after.
    """
    warm = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    if train.lr_schedule == "constant" or step < grow_steps:
        return train.lr * warm
    done = (step - grow_steps) / (train.num_steps - grow_steps)
    return train.lr * warm * 0.5 * (1 + math.cos(math.pi * done))


def mix_seed(*parts: object) -> int:
    """A 63-bit seed from numbers and words. Other parts give other draws, which `seed + step` does not."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
