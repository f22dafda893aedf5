"""Pointer chasing: what is generated, and what a model can know of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lowmem.data.config import PointerChasingData
from lowmem.data.datasets import describe_data, identify_data, load_data
from lowmem.data.pointers import PointerDataset, floor_nats
from lowmem.data.tokenizer import characters
from lowmem.errors import ConfigError

SECTION = PointerChasingData(name="pointer_chasing", hops=3)


def followed(row: list[int], nodes: int) -> list[int]:
    """The answers by a walk of its own, from what stands before them."""
    hops, pointers = row[0] - nodes + 1, row[1 : nodes + 1]
    found = []
    for node in range(nodes):
        for _ in range(hops):
            node = pointers[node]
        found.append(node)
    return found


def test_every_answer_follows_from_what_stands_before_it() -> None:
    data = load_data(SECTION, seq_len=17)
    tokens = data.batch(0, 5, 200)["tokens"]
    assert tokens.shape == (200, 17) and tokens.dtype == np.int64
    assert all(followed(row, 8) == row[9:] for row in tokens.tolist())
    assert set(tokens[:, 0]) == {8, 9, 10}, "one to three hops"
    assert set(tokens[:, 1:].flatten()) == set(range(8))


def test_the_test_part_has_all_hops_and_is_the_same_each_time() -> None:
    first, second = (list(load_data(SECTION, seq_len=17).test_batches(256)) for _ in range(2))
    assert sum(len(batch["tokens"]) for batch in first) == 1024
    for one, two in zip(first, second, strict=True):
        assert np.array_equal(one["tokens"], two["tokens"])
        assert all(followed(row, 8) == row[9:] and row[0] == 10 for row in one["tokens"].tolist())


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    data, again = (load_data(SECTION, seq_len=17) for _ in range(2))
    assert np.array_equal(data.batch(1, 2, 8)["tokens"], again.batch(1, 2, 8)["tokens"])
    assert not np.array_equal(data.batch(1, 2, 8)["tokens"], data.batch(1, 3, 8)["tokens"])
    assert not np.array_equal(data.batch(1, 2, 8)["tokens"], data.batch(2, 2, 8)["tokens"])


def test_the_floor_is_the_entropy_of_what_is_drawn() -> None:
    assert floor_nats(2, 1) == pytest.approx(2 * math.log(2) / 5)
    assert floor_nats(8, 3) == pytest.approx((math.log(3) + 8 * math.log(8)) / 17)


def test_nodes_are_letters_and_what_tells_the_data_apart_is_its_shape() -> None:
    found = identify_data(SECTION, 17)
    assert found.alphabet is not None and characters(found.alphabet).decode([10, 0, 7]) == "3ah"
    others = (identify_data(SECTION, 15), identify_data(PointerChasingData(name="pointer_chasing"), 17))
    assert found.fingerprint == identify_data(SECTION, 17).fingerprint
    assert all(other.fingerprint != found.fingerprint for other in others)
    assert describe_data(SECTION, 17).vocab_size == 11 == PointerDataset(8, 3, "").vocab_size


@pytest.mark.parametrize("seq_len", [16, 3, 107])
def test_a_length_that_is_no_task_is_refused_in_one_line(seq_len: int) -> None:
    with pytest.raises(ConfigError, match=f"train.seq_len: found {seq_len}; allowed .* 5 to 105") as caught:
        load_data(SECTION, seq_len=seq_len)
    assert "\n" not in str(caught.value)
