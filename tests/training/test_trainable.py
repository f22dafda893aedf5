"""Updates during backward against updates after it: the same bits for every architecture, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import with_weights
from torch import Tensor, nn

from lowmem.blocks.arena import ArenaLayout, aligned_buffer, parameter_views
from lowmem.models.base import BlockModel, named_layer_parameters, named_shared_parameters
from lowmem.models.causal_lm import CausalLm
from lowmem.models.dit import Dit
from lowmem.models.masked_lm import MaskedLm
from lowmem.models.recurrent_lm import RecurrentLm
from lowmem.models.sections import CausalLmModel, DitModel, MaskedLmModel, RecurrentLmModel, VitModel
from lowmem.models.vit import Vit
from lowmem.planning.settings import COMPUTE_DTYPE
from lowmem.recipe import NoiseConfig, OptimizerConfig
from lowmem.training.trainable import SHARED, Scratch, Trainable

TRANSFORMER: dict[str, Any] = {"num_layers": 3, "dim": 64, "num_heads": 2, "dropout": 0.1}
TEXT: dict[str, Any] = {**TRANSFORMER, "head_chunk": 20}  # several chunks, the last one shorter
MODELS = {
    "vit": lambda: Vit(
        VitModel(name="vit", patch_size=2, readout="bayes", noisy_input="posterior", **TRANSFORMER),
        (1, 4, 4),
        10,
    ),
    "dit": lambda: Dit(DitModel(name="dit", patch_size=2, **TRANSFORMER), (1, 4, 4), 10),
    "masked_lm": lambda: MaskedLm(MaskedLmModel(name="masked_lm", **TEXT), 70, 12),
    "causal_lm": lambda: CausalLm(CausalLmModel(name="causal_lm", **TEXT), 70, 12, whole=False),
    "recurrent_lm": lambda: RecurrentLm(
        RecurrentLmModel(name="recurrent_lm", prelude_layers=1, coda_layers=1, **TEXT), 70, 12
    ),
}
CONFIG = OptimizerConfig(grad_clip=None, weight_decay=0.1, ema=0.9)


def trained(
    name: str, during_backward: bool, optimizer: str, precision: str, weights: str, recompute: bool
) -> list[Tensor]:
    """The buffers of the first block (all layers but the last; a recurrent model's all) and of the shared
    part after two steps.
    """
    torch.manual_seed(0)
    model: BlockModel = with_weights(MODELS[name](), std=0.05)
    layers = range(len(model.layers) - (name != "recurrent_lm"))
    parts = {0: dict(named_layer_parameters(model, layers)), SHARED: dict(named_shared_parameters(model))}
    layouts = {
        place: ArenaLayout(
            [(n, tuple(p.shape)) for n, p in part.items()], optimizer, True, COMPUTE_DTYPE[weights]
        )  # type: ignore[index]
        for place, part in parts.items()
    }
    dtype, device = COMPUTE_DTYPE[precision], torch.device("cpu")  # type: ignore[index]
    scratch = Scratch([layouts[0]], layouts[SHARED], dtype, device, 0, during_backward)
    trainables: list[Trainable] = []
    for place, layout in layouts.items():
        trainable = scratch.trainable(place, layout, aligned_buffer(layout.total_bytes))
        for slot in layout.slots:
            trainable.arena.weights[slot.start : slot.start + slot.numel] = (
                parts[place][slot.name].detach().flatten()
            )
        trainable.bind(model)
        trainables.append(trainable)
    batch = {key: torch.ones_like(value) for key, value in model.example_batch(4).items()}
    noise, before = NoiseConfig(), [trainable.arena.buffer.clone() for trainable in trainables]
    for step in (1, 2):
        torch.manual_seed(step)
        for trainable in trainables:
            trainable.begin(step, 1e-2, CONFIG)
        objective = model.make_objective(noise)
        interval = objective.interval(0, 2, 0.0)
        objective.block_loss([model.layers[i] for i in layers], batch, interval, recompute).mean().backward()
        if during_backward:
            assert all(parameter.grad is None for parameter in model.parameters())
        for trainable in trainables:
            trainable.update()
    assert not any(
        torch.equal(trainable.arena.buffer, old) for trainable, old in zip(trainables, before, strict=True)
    )
    return [trainable.arena.buffer for trainable in trainables]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recompute", [False, True])
def test_updates_during_backward_are_bit_equal_for_every_architecture(name: str, recompute: bool) -> None:
    """Tied tables, heads in chunks, layers made again in backward, parameters without a gradient."""
    after, during = (trained(name, flag, "adamw", "float32", "float32", recompute) for flag in (False, True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(during, after, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize(
    ("precision", "weights"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
def test_updates_during_backward_are_bit_equal_in_every_precision(
    optimizer: str, precision: str, weights: str
) -> None:
    after, during = (
        trained("causal_lm", flag, optimizer, precision, weights, True) for flag in (False, True)
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(during, after, strict=True))


def test_a_weight_that_is_needed_after_its_update_is_noticed() -> None:
    """Each parameter has a version of its own: a neighbour's update is none of its, its own is."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    layout = ArenaLayout([(n, tuple(p.shape)) for n, p in model.named_parameters()], "adamw")
    scratch = Scratch([layout], layout, torch.float32, torch.device("cpu"), 0, True)
    trainable = scratch.trainable(0, layout, aligned_buffer(layout.total_bytes))
    trainable.bind(model)
    x = torch.ones(2, 8, requires_grad=True)
    config = CONFIG.model_copy(update={"ema": None})
    trainable.begin(1, 1e-3, config)
    model(x).sum().backward()
    trainable.update()
    trainable.begin(2, 1e-3, config)
    hidden = (
        model[0](x) * model[1].weight.detach()[0]
    )  # saved here without a gradient of its own, needed again below
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model[1](hidden).sum().backward()


@pytest.mark.parametrize("during_backward", [False, True])
def test_each_step_rounds_bf16_weights_with_odds_of_its_own(during_backward: bool) -> None:
    """At 1 bf16 numbers lie 1/256 apart below; steps of half of that move one weight in two."""
    model = nn.Sequential(nn.Linear(64, 256, bias=False))
    layout = ArenaLayout([("0.weight", (256, 64))], "adamw", weights_dtype=torch.bfloat16)
    scratch = Scratch([layout], layout, torch.bfloat16, torch.device("cpu"), 0, during_backward)
    trainable = scratch.trainable(0, layout, aligned_buffer(layout.total_bytes))
    weights = trainable.arena.weights.fill_(1.0)
    config = CONFIG.model_copy(update={"ema": None, "weight_decay": 0.0})
    moved = []
    for step in (1, 2):
        before = weights.clone()
        trainable.bind(model)
        trainable.begin(step, 1 / 512, config)
        model(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
        trainable.update()
        moved.append((weights != before).double() - 0.5)
    for each in moved:
        assert abs(float(each.mean())) < 0.05
    assert abs(float((moved[0] * moved[1]).mean())) < 0.02, "0.25 where both steps move the same weights"


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_parameter_without_a_gradient_is_updated_all_the_same(optimizer: str) -> None:
    """Weight decay acts on it and its average follows, also where updates are made during backward."""
    ends = []
    for during_backward in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(64, 64, bias=False) for name in ("used", "unused")})
        layout = ArenaLayout([(n, tuple(p.shape)) for n, p in model.named_parameters()], optimizer, ema=True)
        scratch = Scratch([layout], layout, torch.float32, torch.device("cpu"), 0, during_backward)
        trainable = scratch.trainable(0, layout, aligned_buffer(layout.total_bytes))
        weights = parameter_views(layout, trainable.arena.weights)
        for name, value in weights.items():
            value.copy_(model.get_parameter(name).detach())
        before = weights["unused.weight"].clone()
        for step in (1, 2):
            trainable.bind(model)
            trainable.begin(step, 1e-2, CONFIG)
            model["used"](torch.ones(2, 64)).sum().backward()
            trainable.update()
        decayed = before * (1 - 1e-2 * CONFIG.weight_decay) ** 2
        torch.testing.assert_close(weights["unused.weight"], decayed, rtol=1e-6, atol=1e-8)
        assert not torch.equal(weights["unused.weight"], before)
        ends.append(trainable.arena.buffer)
    assert torch.equal(*ends)
