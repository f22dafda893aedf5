"""The flat updates against the stock optimizers, parameter by parameter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowmem.blocks import eight_bit, optim
from lowmem.blocks.arena import MIN_8BIT_NUMEL, Arena, ArenaLayout, aligned_buffer, parameter_views
from lowmem.planning.passes import LiveBytes
from lowmem.recipe import OptimizerConfig

SHAPES = [
    ("a.weight", (70, 61)),
    ("b.bias", (5000,)),
    ("c.weight", (33, 17)),
    ("d.bias", (7,)),
    ("e.weight", (64, 64)),
    ("f.weight", (1, 4099)),
]
STEPS = 5
LEARNING_RATES = [1e-3, 2e-3, 3e-3, 2e-3, 1e-3]
CONFIG = OptimizerConfig(betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, grad_clip=None)


def fresh_arena(optimizer: str) -> Arena:
    layout = ArenaLayout(SHAPES, optimizer)
    arena = Arena(layout, aligned_buffer(layout.total_bytes))
    generator = torch.Generator().manual_seed(1)
    for value in parameter_views(layout, arena.weights).values():
        value.copy_(torch.randn(value.shape, generator=generator))
    return arena


def gradients(layout: ArenaLayout, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """One flat vector a step, zero between the parameters."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        flat = torch.zeros(layout.numel, dtype=dtype)
        for view in parameter_views(layout, flat).values():
            view.copy_(torch.randn(view.shape, generator=generator) * 0.01)
        yield flat


def train(arena: Arena, dtype: torch.dtype = torch.float32, upcast: bool = False) -> Arena:
    for step, (grads, lr) in enumerate(
        zip(gradients(arena.layout, dtype), LEARNING_RATES, strict=True), start=1
    ):
        optim.update(arena, grads.float() if upcast else grads, optim.Step(step, lr, CONFIG))
    return arena


def train_stock(
    make: type[torch.optim.Optimizer], start: Arena, **options: object
) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    """Trains the same weights with a stock optimizer; returns the parameters by name, and the optimizer."""
    layout = start.layout
    parameters = {
        name: torch.nn.Parameter(value.clone())
        for name, value in parameter_views(layout, start.weights).items()
    }
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": CONFIG.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    stock = make(groups, lr=1.0, betas=tuple(CONFIG.betas), eps=CONFIG.eps, **options)  # type: ignore[call-arg]
    for grads, lr in zip(gradients(layout), LEARNING_RATES, strict=True):
        for name, view in parameter_views(layout, grads).items():
            parameters[name].grad = view.clone()
        for group in stock.param_groups:
            group["lr"] = lr
        stock.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}, stock


@pytest.fixture(scope="module")
def stock_8bit() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    eight_bit.bitsandbytes_functional()  # quiets its logger
    from bitsandbytes.optim import AdamW8bit

    start = fresh_arena("adamw8bit")
    weights, stock = train_stock(AdamW8bit, start)
    states = {p.data_ptr(): state for p, state in stock.state.items()}
    return weights, {name: states[value.data_ptr()] for name, value in weights.items()}


def test_flat_8bit_update_is_bit_equal_to_bitsandbytes_per_parameter(
    stock_8bit: tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]],
) -> None:
    expected, states = stock_8bit
    arena = train(fresh_arena("adamw8bit"))
    weights, checked = parameter_views(arena.layout, arena.weights), 0
    for slot in arena.layout.slots:
        if slot.numel < MIN_8BIT_NUMEL:
            continue
        checked += 1
        state, rows = states[slot.name], slice(slot.start, slot.start + slot.numel)
        groups = slice(slot.start // 256, slot.start // 256 + len(state["absmax1"]))
        assert torch.equal(weights[slot.name], expected[slot.name]), slot.name
        for name in ("state1", "state2"):
            assert state[name].dtype == torch.uint8
            assert torch.equal(arena.state[name][rows], state[name].flatten()), (slot.name, name)
        for name in ("absmax1", "absmax2"):
            assert torch.equal(arena.state[name][groups], state[name]), (slot.name, name)
    assert checked == 4


def test_the_8_bit_kernel_comes_without_torchs_compiler() -> None:
    """It would stay in memory for the whole run. In a process of its own: here it may be imported already."""
    program = (
        "import sys, torch; compiles = torch.compile; from lowmem.blocks import eight_bit; "
        "functional = eight_bit.bitsandbytes_functional(); assert torch.compile is compiles; "
        "maps = functional.create_dynamic_map(); functional.quantize_blockwise(torch.ones(4096), maps); "
        "print(*[name for name in ('bitsandbytes', 'torch._dynamo', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "bitsandbytes\n"


def test_small_parameters_keep_fp32_state_close_to_that_of_bitsandbytes(
    stock_8bit: tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]],
) -> None:
    expected, states = stock_8bit
    arena = train(fresh_arena("adamw8bit"))
    weights, first, checked = parameter_views(arena.layout, arena.weights), arena.layout.fp32_state_start, 0
    for slot in arena.layout.slots:
        if slot.numel >= MIN_8BIT_NUMEL:
            continue
        checked += 1
        rows = slice(slot.start - first, slot.start - first + slot.numel)
        torch.testing.assert_close(weights[slot.name], expected[slot.name], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            arena.state["exp_avg"][rows], states[slot.name]["state1"].flatten(), rtol=1e-5, atol=1e-9
        )
        torch.testing.assert_close(
            arena.state["exp_avg_sq"][rows], states[slot.name]["state2"].flatten(), rtol=1e-5, atol=1e-12
        )
    assert checked == 2


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_slices_smaller_than_the_buffer_give_the_same_bits(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(fresh_arena(optimizer))
    for table in (optim.SLICE_NUMEL, optim.EIGHT_BIT_SLICE_NUMEL):
        monkeypatch.setitem(table, "cpu", 1536)
    assert all(
        (group.stop - group.start) % 1536 for group in whole.layout.groups
    )  # the last slice is shorter
    assert torch.equal(train(fresh_arena(optimizer)).buffer, whole.buffer)


def test_fp32_update_is_bit_equal_to_fused_torch_and_close_to_the_plain_one() -> None:
    arena = train(fresh_arena("adamw"))
    fused, _ = train_stock(torch.optim.AdamW, fresh_arena("adamw"), fused=True)
    plain, _ = train_stock(torch.optim.AdamW, fresh_arena("adamw"), foreach=False)
    for name, value in parameter_views(arena.layout, arena.weights).items():
        assert torch.equal(value, fused[name]), name
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_bf16_gradients_give_the_bits_of_the_same_gradients_in_fp32(optimizer: str) -> None:
    arena = train(fresh_arena(optimizer), torch.bfloat16)
    assert not torch.equal(arena.weights, fresh_arena(optimizer).weights)
    assert torch.equal(arena.buffer, train(fresh_arena(optimizer), torch.bfloat16, upcast=True).buffer)


def test_padding_between_parameters_stays_exactly_zero_in_fp32() -> None:
    """Not so in 8 bits: bitsandbytes' CPU quantizer has no code for 0.

    Parameters are bit-equal all the same, see above.
    """
    arena = train(fresh_arena("adamw"))
    padding = torch.ones(arena.layout.numel, dtype=torch.bool)
    for view in parameter_views(arena.layout, padding).values():
        view.fill_(False)
    assert padding.any()
    assert not arena.weights[padding].any()
    for name in ("exp_avg", "exp_avg_sq"):
        state = arena.state[name]
        assert state.any()
        assert not state[padding[arena.layout.numel - len(state) :]].any()


# ------------------------------------------------------------------------------------------------------------
# Weights kept in bf16


def rounded(value: float, seed: int = 0, count: int = 1 << 17) -> Tensor:
    """`count` stochastic roundings of one fp32 value, widened again."""
    target = torch.empty(count, dtype=torch.bfloat16)
    optim.Rounding(seed, torch.device("cpu")).round(torch.full((count,), value), 0, target)
    return target.double()


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, 1e-3 * 1.2345, -7.0e-20, 1.999])
def test_stochastic_rounding_takes_the_two_neighbours_and_is_right_on_average(value: float) -> None:
    exact, found = float(torch.tensor(value)), rounded(value)
    low, high = found.unique().tolist()
    assert low < exact < high
    spread = (
        (high - low)
        * ((exact - low) / (high - low) * (high - exact) / (high - low)) ** 0.5
        / len(found) ** 0.5
    )
    assert abs(float(found.mean()) - exact) < max(5 * spread, (high - low) / 65536)


def test_what_bf16_has_exactly_stays() -> None:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[~values.isnan()]
    target = torch.empty_like(values)
    optim.Rounding(0, torch.device("cpu")).round(values.float(), 0, target)
    assert torch.equal(target.view(torch.int16), values.view(torch.int16))
    nan = torch.tensor([float("nan"), 0.0, float("inf")]).mul(0)  # not a number stays none
    optim.Rounding(0, torch.device("cpu")).round(nan, 0, target[:3])
    assert target[:3].isnan().tolist() == [True, False, True]


def test_the_odds_of_elements_and_of_steps_are_independent() -> None:
    """For half-way values: neighbours, parts drawn apart, two steps, and the four 16-bit words of a draw."""
    count = 4 * optim.ODDS_NUMEL["cpu"]
    ups = [(rounded(1 + 2**-8, seed, count) > 1).double() - 0.5 for seed in (0, 1)]
    for other in (*(ups[0].roll(by) for by in (1, 2, 3, 4, 4096, optim.ODDS_NUMEL["cpu"])), ups[1]):
        assert abs(float((ups[0] * other).mean())) < 5 * 0.25 / count**0.5
    assert (ups[0].view(-1, 4).mean(0).abs() < 5 * 0.5 / (count / 4) ** 0.5).all()


def test_a_weight_that_rounding_to_nearest_would_freeze_moves_on_average_as_in_fp32() -> None:
    """At 1 bf16 numbers lie 1/128 apart (1/256 below), a step is a fortieth of that."""
    steps, lr, ends = 100, 1e-4, {}
    for dtype in (torch.float32, torch.bfloat16):
        layout = ArenaLayout([("weight", (64, 256))], "adamw", weights_dtype=dtype)
        arena = Arena(layout, aligned_buffer(layout.total_bytes))
        arena.weights.fill_(1.0)
        for number in range(1, steps + 1):
            step = optim.Step(number, lr, CONFIG, optim.Rounding(number, torch.device("cpu")))
            optim.update(arena, torch.ones(layout.numel, dtype=dtype), step)
        ends[dtype] = arena.weights.double()
        nearest = torch.tensor(1 - lr * (1 + CONFIG.weight_decay)).bfloat16()
        assert float(nearest) == 1, "to nearest, the first step already ends where it began"
    moved = 1 - ends[torch.float32].mean()
    assert moved > 0.5 * steps * lr
    assert abs((1 - ends[torch.bfloat16].mean()) / moved - 1) < 0.02


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_the_odds_depend_on_no_slicing(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> Arena:
        layout = ArenaLayout(SHAPES, optimizer, ema=True, weights_dtype=torch.bfloat16)
        arena = Arena(layout, aligned_buffer(layout.total_bytes))
        arena.weights.copy_(torch.randn(layout.numel, generator=torch.Generator().manual_seed(1)))
        for number, grads in enumerate(gradients(layout, torch.bfloat16), start=1):
            rounding = optim.Rounding(number, torch.device("cpu"))
            optim.update(
                arena, grads, optim.Step(number, 1e-3, CONFIG.model_copy(update={"ema": 0.9}), rounding)
            )
        return arena

    whole = trained()
    for table in (optim.SLICE_NUMEL, optim.EIGHT_BIT_SLICE_NUMEL):
        monkeypatch.setitem(table, "cpu", 1536)
    assert torch.equal(trained().buffer, whole.buffer)


def test_the_odds_depend_on_no_order() -> None:
    values, ends = torch.full((3 * optim.ODDS_NUMEL["cpu"],), 1 + 2**-8), []
    for step in (1, -1):
        rounding, target = (
            optim.Rounding(7, torch.device("cpu")),
            torch.empty(len(values), dtype=torch.bfloat16),
        )
        for first in range(0, len(values), 100 * 1024)[::step]:
            rows = slice(first, first + 100 * 1024)
            rounding.round(values[rows].clone(), first, target[rows])
        ends.append(target)
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("weights", "grads"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
)
def test_an_update_allocates_what_the_plan_counts(weights: str, grads: str) -> None:
    dtype = getattr(torch, grads)
    layout = ArenaLayout(
        [("weight", (1500, 2048)), ("bias", (5000,))],
        "adamw",
        ema=True,
        weights_dtype=getattr(torch, weights),
    )
    arena, flat = Arena(layout, aligned_buffer(layout.total_bytes)), torch.ones(layout.numel, dtype=dtype)
    with LiveBytes(arena.buffer, flat) as counter:
        rounding = optim.Rounding(1, torch.device("cpu")) if weights == "bfloat16" else None
        optim.update(
            arena,
            flat,
            optim.Step(1, 1e-3, CONFIG.model_copy(update={"grad_clip": 1.0, "ema": 0.9}), rounding),
        )
    counted = optim.workspace_bytes(layout.groups[0].stop, False, arena.weights.dtype, dtype)
    assert counted <= counter.peak <= counted + 1024, "but for a few scalars"


def test_the_average_follows_the_weights_closely_in_the_first_steps_and_less_and_less() -> None:
    """With decay (1 + step) / (10 + step), until that reaches `optimizer.ema`; after every step."""
    layout = ArenaLayout([("weight", (4, 64))], "adamw", ema=True)
    arena = Arena(layout, aligned_buffer(layout.total_bytes))
    config = CONFIG.model_copy(update={"ema": 0.4})
    average, decays = arena.weights.clone().double(), []
    for number in range(1, 9):
        optim.update(arena, torch.ones(layout.numel), optim.Step(number, 1e-2, config))
        decays.append([2 / 11, 3 / 12, 4 / 13, 5 / 14, 0.4, 0.4, 0.4, 0.4][number - 1])
        average = decays[-1] * average + (1 - decays[-1]) * arena.weights.double()
        torch.testing.assert_close(arena.state["ema"].double(), average, rtol=1e-5, atol=1e-9)


@pytest.mark.skipif(not optim.has_muon(), reason="torch has no Muon before 2.9")
def test_muon_is_torchs_for_matrices_and_fused_adamw_for_the_rest() -> None:
    arena = train(fresh_arena("muon"))
    start = parameter_views(arena.layout, fresh_arena("muon").weights)
    matrices = {n: torch.nn.Parameter(start[n].clone()) for n, shape in SHAPES if len(shape) == 2}
    stock = torch.optim.Muon(
        matrices.values(), weight_decay=CONFIG.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    for grads, lr in zip(gradients(arena.layout), LEARNING_RATES, strict=True):
        for name, view in parameter_views(arena.layout, grads).items():
            if name in matrices:
                matrices[name].grad = view.clone()
        stock.param_groups[0]["lr"] = lr
        stock.step()
    rest, _ = train_stock(torch.optim.AdamW, fresh_arena("muon"), fused=True)
    assert len(matrices) == 4 < len(SHAPES)
    for name, value in parameter_views(arena.layout, arena.weights).items():
        assert torch.equal(value, matrices[name].detach() if name in matrices else rest[name]), name
    for name, parameter in matrices.items():
        slot = next(slot for slot in arena.layout.slots if slot.name == name)
        momentum = arena.state["momentum"][slot.start : slot.start + slot.numel]
        assert torch.equal(momentum, stock.state[parameter]["momentum_buffer"].flatten())


@pytest.mark.skipif(not optim.has_muon(), reason="torch has no Muon before 2.9")
@pytest.mark.parametrize("shape", [(600, 1024), (1024, 600)])
@pytest.mark.parametrize(
    ("weights", "grads"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
)
def test_a_muon_update_allocates_what_the_plan_counts(
    shape: tuple[int, int], weights: str, grads: str
) -> None:
    dtype, kept = getattr(torch, grads), getattr(torch, weights)
    layout = ArenaLayout([("weight", shape)], "muon", weights_dtype=kept)
    arena, flat = Arena(layout, aligned_buffer(layout.total_bytes)), torch.ones(layout.numel, dtype=dtype)
    with LiveBytes(arena.buffer, flat) as counter:
        rounding = optim.Rounding(1, torch.device("cpu")) if weights == "bfloat16" else None
        optim.update(arena, flat, optim.Step(1, 1e-3, CONFIG, rounding))
    counted = optim.workspace_bytes(layout.numel, False, kept, dtype, matrix=shape)
    assert 0.9 * counted <= counter.peak <= counted + 1024, (counter.peak, counted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_norm_is_that_of_fp32_whatever_the_gradients_dtype(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 would keep three digits of it. Several slices, the last one shorter."""
    monkeypatch.setitem(optim.SLICE_NUMEL, "cpu", 1024)
    for seed in range(5):
        grads = torch.randn(5000, generator=torch.Generator().manual_seed(seed)).to(dtype)
        norm = optim.gradient_norm(grads)
        assert norm.dtype == torch.float32
        assert float(norm) == pytest.approx(float(grads.double().norm()), rel=1e-6)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_clipping_equals_that_of_torch(dtype: torch.dtype, rtol: float) -> None:
    flat = torch.randn(3000, generator=torch.Generator().manual_seed(3)).to(dtype)
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (1000, 1999, 1)]
    for parameter, part in zip(parameters, flat.split([1000, 1999, 1]), strict=True):
        parameter.grad = part.clone()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optim.clip_gradients(flat, 1.0)
    assert float(flat.float().norm()) == pytest.approx(1.0, rel=rtol)
    torch.testing.assert_close(
        flat, torch.cat([p.grad for p in parameters if p.grad is not None]), rtol=rtol, atol=1e-8
    )


def test_clipping_leaves_small_gradients_untouched() -> None:
    flat = torch.randn(3000, generator=torch.Generator().manual_seed(3)) * 1e-3
    before = flat.clone()
    optim.clip_gradients(flat, 1.0)
    assert torch.equal(flat, before)


def test_an_update_clips_where_the_recipe_says_so() -> None:
    clipped, given = fresh_arena("adamw"), fresh_arena("adamw")
    grads = next(gradients(clipped.layout)) * 1000
    by_hand = grads.clone()
    optim.clip_gradients(by_hand, 0.5)
    optim.update(given, by_hand, optim.Step(1, 1e-3, CONFIG))
    optim.update(clipped, grads, optim.Step(1, 1e-3, CONFIG.model_copy(update={"grad_clip": 0.5})))
    assert torch.equal(clipped.buffer, given.buffer)
