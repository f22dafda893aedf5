"""The section `model` of each packaged architecture.

This module loads without torch, so that a recipe is checked whole before that is loaded.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from lowmem.recipe import Count, Fraction, Layers, NoisyInput, Readout, Recipe, TransformerModel, Width


class VitModel(TransformerModel):
    built_by: ClassVar[str] = "lowmem.models.vit"
    name: Literal["vit"]
    patch_size: Width  # pixels
    image_drop: Fraction = 0.0  # share of samples trained on a blank image, for guidance
    noisy_input: NoisyInput = "scaled"
    readout: Readout = "plain"

    def contradiction(self, recipe: Recipe) -> str | None:
        guidance = recipe.eval.guidance
        if guidance in ("auto", 1) or self.image_drop:
            return None
        return (
            f"eval.guidance: found {guidance}; allowed without model.image_drop: 1; "
            "train with model.image_drop: 0.1"
        )


class DitModel(TransformerModel):
    built_by: ClassVar[str] = "lowmem.models.dit"
    name: Literal["dit"]
    patch_size: Width  # pixels
    label_drop: Fraction = 0.1  # share of samples trained without their class, for guidance


class MaskedLmModel(TransformerModel):
    built_by: ClassVar[str] = "lowmem.models.masked_lm"
    name: Literal["masked_lm"]
    mask_schedule: Literal["linear", "cosine"] = (
        "linear"  # alpha(t), the share of tokens not masked at time t
    )
    head_chunk: Count = 4096  # tokens whose logits are in memory at once


class CausalLmModel(TransformerModel):
    built_by: ClassVar[str] = "lowmem.models.causal_lm"
    name: Literal["causal_lm"]
    noisy_input: NoisyInput = "posterior"
    readout: Readout = "bayes"
    head_chunk: Count = 4096  # tokens whose logits are in memory at once


class RecurrentLmModel(TransformerModel):
    built_by: ClassVar[str] = "lowmem.models.recurrent_lm"
    name: Literal["recurrent_lm"]
    prelude_layers: Layers = 2
    coda_layers: Layers = 2  # the core has what is left of num_layers
    iterations: Layers = 32  # mean number, when trained end to end
    backprop_iterations: Layers = 8  # how many of them gradients flow through
    noisy_input: Literal["scaled", "posterior"] = (
        "posterior"  # its state is the noisy target: it must be seen
    )
    readout: Readout = "bayes"
    head_chunk: Count = 4096  # tokens whose logits are in memory at once

    @property
    def least_layers(self) -> int:
        return self.prelude_layers + self.coda_layers + 1

    @model_validator(mode="after")
    def _core_left(self) -> RecurrentLmModel:
        if self.num_layers < self.least_layers:
            raise ValueError(
                f"num_layers {self.num_layers} leaves no core between {self.prelude_layers} and "
                f"{self.coda_layers} "
                "layers; raise it"
            )
        return self

    def contradiction(self, recipe: Recipe) -> str | None:
        whole, num_blocks = recipe.whole, recipe.blocks.num_blocks
        if num_blocks in ((1, 3) if whole else (1,)):
            return None
        allowed = "1 or 3 (prelude, core, coda)" if whole else "1 (its core is one denoiser)"
        return f"blocks.num_blocks: found {num_blocks}; allowed with model recurrent_lm: {allowed}"
