"""The order of visits, against brute force."""

from __future__ import annotations

from collections import Counter

import pytest

from lowmem.blocks.order import BlockQueue

CASES = [(1, 1, 1), (3, 10, 4), (4, 7, 7), (2, 5, 8), (5, 12, 5), (3, 12, 4)]


def queue(
    num_blocks: int,
    num_steps: int,
    visit_steps: int,
    order: str = "round_robin",
    method: str = "diffusion_blocks",
    seed: int = 0,
) -> BlockQueue:
    return BlockQueue(method, num_blocks, num_steps, visit_steps, order, seed)


def rounds(q: BlockQueue) -> list[list[int]]:
    blocks = [q.visit(i).blocks[0] for i in range(q.num_visits)]
    return [blocks[i : i + q.num_blocks] for i in range(0, len(blocks), q.num_blocks)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("order", ["round_robin", "random"])
@pytest.mark.parametrize("method", ["diffusion_blocks", "end_to_end"])
def test_every_block_gets_each_of_its_steps_once_in_order(
    case: tuple[int, int, int], order: str, method: str
) -> None:
    num_blocks, num_steps, visit_steps = case
    seen: dict[int, list[int]] = {block: [] for block in range(num_blocks)}
    for visit, _ in queue(*case, order, method).pending(0):
        assert 1 <= visit.num_steps <= visit_steps
        for block in visit.blocks:
            seen[block] += range(visit.first_step, visit.first_step + visit.num_steps)
    assert seen == {block: list(range(num_steps)) for block in range(num_blocks)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("order", ["round_robin", "random"])
@pytest.mark.parametrize("method", ["diffusion_blocks", "end_to_end"])
def test_steps_done_agrees_with_a_count_for_every_prefix(
    case: tuple[int, int, int], order: str, method: str
) -> None:
    q, counted = queue(*case, order, method), 0
    for visit, _ in q.pending(0):
        assert q.steps_done(visit.index) == counted
        counted += visit.num_steps
    assert q.steps_done(q.num_visits) == counted == q.total_steps


def test_pending_goes_on_exactly_where_visits_done_says() -> None:
    q = queue(3, 10, 4, "random")
    whole = list(q.pending(0))
    assert [visit.index for visit, _ in whole] == list(range(9))
    assert [upcoming for _, upcoming in whole] == [visit for visit, _ in whole[1:]] + [None]
    for done in range(q.num_visits + 1):
        assert list(q.pending(done)) == whole[done:]


def test_round_robin_is_the_same_ascending_order_each_round() -> None:
    assert rounds(queue(3, 10, 4)) == [[0, 1, 2]] * 3


def test_random_order_is_a_fresh_permutation_each_round() -> None:
    drawn = rounds(queue(6, 20, 1, "random"))
    assert len(drawn) == 20
    assert all(sorted(r) == list(range(6)) for r in drawn)
    assert len(Counter(map(tuple, drawn))) > 10


def test_random_order_is_a_function_of_the_seed() -> None:
    assert rounds(queue(6, 20, 1, "random", seed=3)) == rounds(queue(6, 20, 1, "random", seed=3))
    assert rounds(queue(6, 20, 1, "random", seed=3)) != rounds(queue(6, 20, 1, "random", seed=4))


def test_end_to_end_visits_all_blocks_at_once() -> None:
    visits = [visit for visit, _ in queue(4, 10, 4, method="end_to_end").pending(0)]
    assert [(visit.blocks, visit.first_step, visit.num_steps) for visit in visits] == [
        ((0, 1, 2, 3), 0, 4),
        ((0, 1, 2, 3), 4, 4),
        ((0, 1, 2, 3), 8, 2),
    ]
