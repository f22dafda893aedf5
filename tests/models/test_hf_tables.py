"""Products and look-ups with a table: gradients are autograd's own, and take no memory of its size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.models.huggingface import tables
from lowmem.models.huggingface.tables import looked_up, product
from lowmem.objectives import alike
from lowmem.objectives.base import in_chunks
from lowmem.planning import passes
from lowmem.planning.passes import LiveBytes

VOCAB, DIM, TOKENS = 96, 32, 40


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SLICE_NUMEL", 16 * DIM)


def table_of(dtype: torch.dtype) -> nn.Embedding:
    torch.manual_seed(0)
    table = nn.Embedding(VOCAB, DIM, padding_idx=3, dtype=dtype)
    nn.init.normal_(table.weight)
    return table


def some_tokens() -> Tensor:
    """Some come often, one is padding, and most of the vocabulary does not come."""
    tokens = torch.randint(VOCAB // 3, (2, TOKENS // 2), generator=torch.Generator().manual_seed(1))
    tokens[0, :5], tokens[1, 2:9] = 3, 7
    return tokens


def loss_of(table: nn.Embedding, features: Tensor, times: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Of rows with their number as the label, seven at a time, so that the last chunk is smaller."""

    def losses(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(times(rows, table.weight).float(), labels, reduction="none")

    return in_chunks(losses, 7, features, torch.arange(len(features))).sum()


every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@every_dtype
def test_the_gradients_of_logits_in_chunks_are_autograds_to_the_bit(dtype: torch.dtype) -> None:
    table, given = table_of(dtype), torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(2))
    found = []
    for times in (F.linear, product):
        features = given.to(dtype).requires_grad_()
        table.weight.grad = torch.zeros_like(table.weight)
        loss = loss_of(table, features, times)
        loss.backward()  # type: ignore[no-untyped-call]
        assert features.grad is not None
        found.append((loss.detach(), features.grad, table.weight.grad))
    assert all(torch.equal(mine, theirs) for theirs, mine in zip(*found, strict=True))
    assert found[0][2].abs().sum() > 0


@every_dtype
def test_the_gradient_of_a_look_up_is_autograds_to_the_bit_and_padding_has_none(dtype: torch.dtype) -> None:
    table, tokens = table_of(dtype), some_tokens()
    weights = torch.randn(*tokens.shape, DIM, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = []
    for rows_of in (
        lambda: F.embedding(tokens, table.weight, table.padding_idx),
        lambda: looked_up(table, tokens),
    ):
        table.weight.grad = torch.zeros_like(table.weight)
        rows = rows_of()
        (rows * weights).sum().backward()
        found.append((rows.detach(), table.weight.grad))
    assert all(torch.equal(mine, theirs) for theirs, mine in zip(*found, strict=True))
    assert not found[1][1][3].any() and found[1][1][7].all()


def test_a_tied_table_gathers_both_gradients_in_the_order_of_the_backward_pass() -> None:
    table, tokens = table_of(torch.float32), some_tokens()
    found = []
    for rows_of, times in ((table, F.linear), (lambda t: looked_up(table, t), product)):
        table.weight.grad = torch.zeros_like(table.weight)
        loss_of(table, torch.tanh(rows_of(tokens)).flatten(0, 1), times).backward()  # type: ignore[no-untyped-call]
        found.append(table.weight.grad)
    assert torch.equal(*found)


def test_gradients_take_a_slice_of_the_table_and_of_a_table_that_is_used_up_during_backward_all() -> None:
    """In the second case `grad` is None, and a hook takes the gradient as soon as it is whole."""
    peaks = []
    for gathers in (True, False):
        table, tokens = table_of(torch.float32), some_tokens()
        table.weight.grad = torch.zeros_like(table.weight) if gathers else None
        with LiveBytes(table.weight, tokens, *([table.weight.grad] if gathers else [])) as taken:
            loss = loss_of(table, looked_up(table, tokens).flatten(0, 1), product)
            loss.backward()  # type: ignore[no-untyped-call]
        assert table.weight.grad is not None and table.weight.grad.any()
        peaks.append(taken.peak)
    assert peaks[1] - peaks[0] > VOCAB * DIM * 4


def test_without_gradients_nothing_is_gathered() -> None:
    table, tokens = table_of(torch.float32), some_tokens()
    table.weight.grad = torch.zeros_like(table.weight)
    with torch.no_grad():
        rows = looked_up(table, tokens)
        assert torch.equal(rows, table(tokens)) and rows.grad_fn is None
    table.weight.requires_grad_(False)
    assert looked_up(table, tokens).grad_fn is None and product(rows[0], table.weight).grad_fn is None


@pytest.mark.parametrize("rows", [16, 20, 95, 96, 200])
def test_one_slice_stands_for_all_of_a_size_where_a_pass_is_counted(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(tables, "SLICE_NUMEL", rows * DIM)
    for least in ("MMAP_THRESHOLD_BYTES", "LENT_BYTES"):
        monkeypatch.setattr(passes, least, 1)  # so that all of them count as large
    found = []
    for counted in (contextlib.nullcontext, alike.one_for_all):
        table = table_of(torch.float32)
        table.weight.grad = torch.zeros_like(table.weight)
        features = torch.ones(TOKENS, DIM, requires_grad=True)
        with counted(), LiveBytes(table.weight, features, table.weight.grad, in_heap=True) as taken:
            loss_of(table, features, product).backward()  # type: ignore[no-untyped-call]
        found.append((taken.peak, taken.work, taken.large))
    assert found[0] == found[1]
    assert alike.times() == 1


def test_the_parts_are_those_of_a_range_and_each_size_comes_once_where_they_are_counted() -> None:
    for total, size in ((7, 3), (6, 3), (3, 3), (2, 3), (5, 1)):
        assert list(alike.starts(total, size)) == list(range(0, total, size))
        with alike.one_for_all():
            counted = [(alike.times(), min(size, total - start)) for start in alike.starts(total, size)]
        assert sum(often * part for often, part in counted) == total
        assert len({part for _, part in counted}) == len(counted)
