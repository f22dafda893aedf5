"""Layouts, headers and views of a block's one buffer."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lowmem.blocks.arena import (
    Arena,
    ArenaLayout,
    aligned_buffer,
    bind,
    gaps,
    gathered_in,
    parameter_views,
    unbind,
)
from lowmem.units import PAGE

SHAPES = [
    ("a.weight", (70, 61)),
    ("a.bias", (70,)),
    ("b.weight", (64, 64)),
    ("b.bias", (5000,)),
    ("c.scale", ()),
    ("d.weight", (2, 3, 5)),
]
both_optimizers = pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw", "muon"])


def random_arena(optimizer: str) -> Arena:
    """Weights and state drawn at random, zero between them."""
    layout = ArenaLayout(SHAPES, optimizer)
    arena = Arena(layout, aligned_buffer(layout.total_bytes))
    for view in [*parameter_views(layout, arena.weights).values(), *arena.state.values()]:
        view.copy_(torch.randint(0, 255, view.shape))
    return arena


@both_optimizers
def test_parameters_start_on_a_group_and_no_group_spans_two(optimizer: str) -> None:
    layout = ArenaLayout(SHAPES, optimizer)
    assert sorted(slot.name for slot in layout.slots) == sorted(name for name, _ in SHAPES)
    groups_of = {
        slot.name: set(range(slot.start // 256, -(-(slot.start + slot.numel) // 256)))
        for slot in layout.slots
    }
    assert all(slot.start % 256 == 0 for slot in layout.slots)
    assert sum(map(len, groups_of.values())) == len(set().union(*groups_of.values())) == layout.numel // 256


@both_optimizers
def test_update_groups_cover_every_element_once_with_the_right_decay_and_state(optimizer: str) -> None:
    layout = ArenaLayout(SHAPES, optimizer)
    borders = [0, *(group.stop for group in layout.groups)]
    assert [group.start for group in layout.groups] == borders[:-1]
    assert borders[-1] == layout.numel
    for slot in layout.slots:
        (group,) = [g for g in layout.groups if g.start <= slot.start < g.stop]
        assert slot.start + slot.numel <= group.stop
        assert group.decay == (len(slot.shape) >= 2), slot.name
        assert group.quantized == (optimizer == "adamw8bit" and slot.numel >= 4096), slot.name
    alike = [(group.decay, group.quantized) for group in layout.groups if group.matrix is None]
    assert len(set(alike)) == len(alike)
    matrices = [group.matrix for group in layout.groups if group.matrix is not None]
    assert matrices == [shape for _, shape in SHAPES if len(shape) == 2 and optimizer == "muon"]


@both_optimizers
def test_views_share_the_memory_of_the_buffer_and_never_overlap(optimizer: str) -> None:
    arena = random_arena(optimizer)
    arena.buffer.zero_()
    views = [*parameter_views(arena.layout, arena.weights).values(), *arena.state.values()]
    for index, view in enumerate(views, start=1):
        assert view.data_ptr() % 256 == arena.buffer.data_ptr() % 256
        assert not view.any(), "an earlier view wrote here"
        view.fill_(index)
    assert int((arena.buffer != 0).sum()) > 0
    assert all(bool((view == index).all()) for index, view in enumerate(views, start=1))


@both_optimizers
def test_a_block_file_opens_with_safetensors_and_every_tensor_comes_back(
    optimizer: str, tmp_path: Path
) -> None:
    arena = random_arena(optimizer)
    path = tmp_path / "block.safetensors"
    path.write_bytes(arena.layout.header() + arena.buffer.numpy().tobytes())
    loaded = load_file(path)
    expected = parameter_views(arena.layout, arena.weights) | {
        f"optimizer.{name}": value for name, value in arena.state.items()
    }
    assert {name for name in loaded if not name.startswith("padding.")} == set(expected)
    for name, value in expected.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("a.weight").get_shape() == [70, 61]


@both_optimizers
def test_the_header_and_the_data_are_whole_pages(optimizer: str) -> None:
    layout = ArenaLayout(SHAPES, optimizer)
    many = ArenaLayout([(f"layers.{i}.weight", (8, 8)) for i in range(200)], optimizer)
    for header in (layout.header(), many.header()):
        assert len(header) % PAGE == 0
        assert struct.unpack("<Q", header[:8])[0] == len(header) - 8
        json.loads(header[8:])
    assert len(many.header()) > PAGE
    assert layout.total_bytes % PAGE == 0


@both_optimizers
def test_a_layout_depends_on_names_shapes_and_optimizer_alone(optimizer: str) -> None:
    def layout_of(model: nn.Module) -> ArenaLayout:
        return ArenaLayout(
            ((name, tuple(value.shape)) for name, value in model.named_parameters()), optimizer
        )

    first, second = (
        layout_of(nn.Linear(80, 60)),
        layout_of(nn.Linear(80, 60, device="meta", dtype=torch.bfloat16)),
    )
    assert first.header() == second.header()
    assert (first.slots, first.groups, first.fields, first.total_bytes) == (
        second.slots,
        second.groups,
        second.fields,
        second.total_bytes,
    )
    others = [
        layout_of(nn.Linear(60, 80)),
        ArenaLayout([("weight", (60, 80))], optimizer),
        ArenaLayout([("w", (60, 80)), ("bias", (60,))], optimizer),
    ]
    other_optimizer = ArenaLayout(
        [("weight", (60, 80)), ("bias", (60,))], "adamw" if optimizer != "adamw" else "adamw8bit"
    )
    assert first.header() not in [layout.header() for layout in [*others, other_optimizer]]


def test_eight_bit_state_is_about_a_quarter_of_fp32_state() -> None:
    shapes = [("weight", (512, 512))]
    assert ArenaLayout(shapes, "adamw").state_bytes == 8 * 512 * 512
    assert ArenaLayout(shapes, "adamw8bit").state_bytes == 2 * 512 * 512 + 2 * 4 * 512 * 512 // 256


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 3)))


def test_bound_gradients_gather_in_the_flat_vector_over_several_backwards() -> None:
    model, reference = small_model().to("meta"), small_model()
    layout = ArenaLayout([(name, tuple(p.shape)) for name, p in reference.named_parameters()], "adamw")
    weights, grads = torch.zeros(layout.numel), torch.zeros(layout.numel)
    for name, view in parameter_views(layout, weights).items():
        view.copy_(reference.get_parameter(name).detach())
    bind(model, parameter_views(layout, weights), parameter_views(layout, grads))
    for batch in torch.randn(3, 4, 6):
        model(batch).square().sum().backward()
        reference(batch).square().sum().backward()
    for name, view in parameter_views(layout, grads).items():
        assert view.any(), name
        assert torch.equal(view, reference.get_parameter(name).grad), name


def test_gradients_gather_over_whatever_lay_there_and_a_parameter_without_one_is_told() -> None:
    model, reference = small_model().to("meta"), small_model()
    model.register_parameter("unused", nn.Parameter(torch.ones(3, device="meta")))
    layout = ArenaLayout([(name, tuple(p.shape)) for name, p in model.named_parameters()], "adamw")
    weights, grads = torch.zeros(layout.numel), torch.full((layout.numel,), torch.nan)
    for name, view in parameter_views(layout, weights).items():
        if name != "unused":
            view.copy_(reference.get_parameter(name).detach())
    calls = list[None]()
    gathers = gathered_in(parameter_views(layout, grads), lambda: calls.append(None))
    bind(model, parameter_views(layout, weights), gathers)
    for batch in torch.randn(3, 4, 6):
        model(batch).square().sum().backward()
        reference(batch).square().sum().backward()
    assert len(calls) == 3 * len(list(reference.parameters()))
    for name, view in parameter_views(layout, grads).items():
        if name != "unused":
            assert torch.equal(view, reference.get_parameter(name).grad), name
    assert model.get_parameter("unused").grad is None
    assert parameter_views(layout, grads)["unused"].isnan().all()


@both_optimizers
def test_gaps_are_all_that_belongs_to_no_parameter(optimizer: str) -> None:
    layout = ArenaLayout(SHAPES, optimizer)
    flat = torch.zeros(layout.numel)
    for view in parameter_views(layout, flat).values():
        view.add_(1)
    for gap in gaps(layout, layout.numel):
        flat[gap].add_(1)
    assert flat.eq(1).all()


def test_bound_without_gradients_the_model_is_frozen() -> None:
    model = small_model().to("meta")
    layout = ArenaLayout([(name, tuple(p.shape)) for name, p in model.named_parameters()], "adamw")
    bind(model, parameter_views(layout, torch.ones(layout.numel)), None)
    assert not model(torch.ones(2, 6)).requires_grad


def test_unbound_parameters_are_on_meta_without_gradient() -> None:
    model = small_model()
    names = [name for name, _ in model.named_parameters()]
    layout = ArenaLayout([(name, tuple(p.shape)) for name, p in model.named_parameters()], "adamw")
    bind(
        model,
        parameter_views(layout, torch.ones(layout.numel)),
        parameter_views(layout, torch.ones(layout.numel)),
    )
    unbind(model, layout)
    assert [name for name, _ in model.named_parameters()] == names
    for parameter in model.parameters():
        assert parameter.is_meta and parameter.grad is None and not parameter.requires_grad


def test_an_aligned_buffer_starts_on_a_page_and_is_zero() -> None:
    for num_bytes in (1, 4095, 4096, 100_001):
        buffer = aligned_buffer(num_bytes)
        assert (buffer.data_ptr() % PAGE, buffer.shape, bool(buffer.any())) == (0, (num_bytes,), False)
