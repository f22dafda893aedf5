"""`data.name: pointer_chasing`: look-ups that depend on each other, generated from the seed.

A sequence is a number of hops h, a random function f of n nodes, and where h hops lead from every node:

    h  f(0) f(1) ... f(n-1)  f^h(0) f^h(1) ... f^h(n-1)

Nodes are letters. The answers follow from what stands before them, and each is h look-ups, one after the
other: no place in front of the answers sees all of f. So depth pays: six layers learn what two do not
(docs/results.md). Everything else is random: with all answers right the mean loss is `floor_nats`.
"""

from __future__ import annotations

import math
import string
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from lowmem.data.datasets import ArrayBatch
from lowmem.data.identity import DataIdentity, Fingerprint
from lowmem.data.images import Array
from lowmem.data.text import TextConfig, TextDataset
from lowmem.data.tokenizer import Tokenizer
from lowmem.errors import ConfigError

NUM_TRAIN, NUM_TEST = 1 << 16, 1024  # sequences of an epoch, which are drawn anew in every one; and held out
TEST_SEED = (1 << 63, 0)  # no run's: those are below it
FORMAT = 1  # of what is generated from a seed


class PointerDataset(TextDataset):
    """`tokens`, int64 [B, 2 n + 1]. Training has 1 to `hops` hops, the test part `hops`."""

    def __init__(self, nodes: int, hops: int, where: str) -> None:
        self.nodes, self.hops = nodes, hops
        held_out = self._drawn(np.random.default_rng(TEST_SEED), NUM_TEST, hops).flatten()
        super().__init__(held_out, held_out, 2 * nodes + 1, nodes + hops, where)
        self.num_train = NUM_TRAIN

    def batch(self, seed: int, step: int, batch_size: int) -> ArrayBatch:
        return {"tokens": self._drawn(np.random.default_rng([seed, step]), batch_size, 1)}

    def _drawn(self, draws: np.random.Generator, count: int, fewest: int) -> Array:
        """Sequences of `fewest` hops or more."""
        hops = draws.integers(fewest, self.hops + 1, count)
        maps = draws.integers(0, self.nodes, (count, self.nodes))
        answers = np.tile(np.arange(self.nodes), (count, 1))
        for hop in range(self.hops):
            further = np.take_along_axis(maps, answers, axis=1)
            answers = np.where((hop < hops)[:, None], further, answers)
        return np.concatenate([self.nodes + hops[:, None] - 1, maps, answers], axis=1).astype(np.int64)


def floor_nats(nodes: int, hops: int) -> float:
    """The mean loss per token of a model that gives every answer and guesses the rest as it was drawn."""
    return (math.log(hops) + nodes * math.log(nodes)) / (2 * nodes + 1)


class PointerChasingData(TextConfig):
    name: Literal["pointer_chasing"]
    hops: Annotated[int, Field(ge=1, le=9)] = 4

    @property
    def source(self) -> str:
        return "data.name: 'pointer_chasing'"

    def files(self) -> list[Path]:
        return []

    @property
    def tokenizer_name(self) -> str:
        return "characters"

    def open(self, seq_len: int, tokenizer: Tokenizer | None) -> PointerDataset:
        most = len(string.ascii_letters)
        nodes, rest = divmod(seq_len - 1, 2)
        if rest or not 2 <= nodes <= most:
            raise ConfigError(
                f"train.seq_len: found {seq_len}; allowed with data.name pointer_chasing, whose sequences "
                f"have 2 n + 1 tokens for n nodes: odd numbers from 5 to {2 * most + 1}"
            )
        return PointerDataset(nodes, self.hops, self.source)

    def identify(self, seq_len: int | None) -> DataIdentity:
        data, mark = self.load(seq_len, None, False), Fingerprint()
        mark.fact("pointer_chasing", FORMAT, data.seq_len, self.hops)
        mark.num_items = NUM_TRAIN
        nodes = data.vocab_size - self.hops
        alphabet = [*string.ascii_letters[:nodes], *string.digits[1 : self.hops + 1]]
        return mark.identity(vocab_size=data.vocab_size, alphabet=alphabet)
