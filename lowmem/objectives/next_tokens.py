"""Next-token prediction of an ordinary decoder, trained end to end: the loss of the tokens that have a label.

A batch holds `tokens` [B, T], `labels` [B, T] and `share` [B]. A label is the token that follows, or
`IGNORED` where nothing is to be learnt: in a question, in padding. `share` is the number of rows of the whole
batch over the number of its labels. So the mean over samples is the mean over labels, however a batch is cut
into micro-batches. Logits exist for `head_chunk` tokens at a time, in the forward pass and again in backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowmem.noise import Interval
from lowmem.objectives.base import Batch, DenoisedModel, Entered, Kept, Objective, in_chunks
from lowmem.objectives.recompute import recomputed
from lowmem.recipe import NoiseConfig

IGNORED = -100  # the label of a token that takes no part in the loss


class Call(NamedTuple):
    """What a layer is called with beside the residual stream: masks, tables of positions."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


@dataclass(frozen=True)
class Calls(Kept):
    """A call for each layer. Most tensors are the same in all of them."""

    of_layer: tuple[Call, ...]

    def tensors(self) -> list[Tensor]:
        found = tree_leaves([(call.arguments, dict(call.keywords)) for call in self.of_layer])
        return list({id(leaf): leaf for leaf in found if isinstance(leaf, Tensor)}.values())


class Decoder(DenoisedModel, Protocol):
    """`output_part` gives features [B, T, D]; the head is applied to them in chunks."""

    def way_in(self, batch: Batch) -> tuple[Tensor, tuple[Call, ...]]:
        """h [B, T, D] before the first layer, and what each layer is called with."""
        ...

    def index_of(self, layer: nn.Module) -> int: ...

    def example_batch(self, batch_size: int) -> Batch: ...

    def logits(self, features: Tensor) -> Tensor:
        """[N, V], for features [N, D]."""
        ...


class NextTokens(Objective[Decoder, Calls]):
    """Losses in nats per label."""

    def __init__(self, model: Decoder, noise: NoiseConfig, head_chunk: int) -> None:
        super().__init__(model, noise)
        self.head_chunk = head_chunk

    def block_loss(
        self, layers: Iterable[nn.Module], batch: Batch, interval: Interval, recompute: bool = False
    ) -> Tensor:
        raise NotImplementedError("a recipe refuses blocks that are trained alone")

    def enter(self, batch: Batch) -> Entered:
        h, calls = self.model.way_in(batch)
        return Entered(h, h.new_zeros(len(h), 1, 1), Calls(calls))

    def through(
        self, layers: Iterable[nn.Module], h: Tensor, cond: Tensor, kept: Calls, recompute: bool = False
    ) -> Tensor:
        for layer in layers:
            run = partial(_run, layer, kept.of_layer[self.model.index_of(layer)])
            h = recomputed(run, h) if recompute else run(h)
        return h

    def leave(self, h: Tensor, cond: Tensor, kept: Calls, batch: Batch) -> Tensor:
        losses = self.token_losses(self.model.output_part(h, cond), batch["labels"])
        return losses.sum(1) * batch["share"]

    def token_losses(
        self, features: Tensor, labels: Tensor, z: Tensor | None = None, sigma: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy of each label [B, T], 0 where there is none, from features [B, T, D].

        z [B, T, D] and sigma [B, T]: of blocks that are trained alone, see `evidence`.
        """

        def loss(part: Tensor, target: Tensor, z_part: Tensor | None, s_part: Tensor | None) -> Tensor:
            logits = self.model.logits(part).float()
            if z_part is not None and s_part is not None:
                logits = logits + self.evidence(z_part, s_part)
            return F.cross_entropy(logits, target, reduction="none", ignore_index=IGNORED)

        rows, most = features.flatten(0, -2), labels.numel()
        if self.most_chunks is not None:
            most = self.most_chunks * self.head_chunk
        noisy = (
            (None, None) if z is None or sigma is None else (z.flatten(0, -2)[:most], sigma.flatten()[:most])
        )
        losses = in_chunks(loss, self.head_chunk, rows[:most], labels.flatten()[:most], *noisy)
        return F.pad(losses, (0, len(rows) - len(losses))).view(labels.shape)

    def evidence(self, z: Tensor, sigma: Tensor) -> Tensor:
        """What is known of the targets from z [N, D] at levels sigma [N], as logits [N, V]."""
        raise NotImplementedError("a model that is trained whole sees no noise")

    def num_chunks(self, batch_size: int) -> int:
        tokens = self.model.example_batch(1)["labels"].numel() * batch_size
        return ceil(tokens / self.head_chunk)

    @torch.no_grad()
    def health(self) -> dict[str, float]:
        return {}


def _run(layer: nn.Module, call: Call, h: Tensor) -> Tensor:
    out = layer(h, *call.arguments, **call.keywords)
    return torch.as_tensor(out[0] if isinstance(out, tuple) else out)
