"""Tells which block is visited when, and in which order a step goes through the blocks.

A visit is one stay on the device: `num_steps` optimizer steps of one block (diffusion_blocks,
block_coordinate), or of all of them (end_to_end). The order follows from the recipe alone, so a run's place
in it is a single number.

With the order `together` the visits of a round all begin from the same shared part, and are committed as
one. So they can be made one after another, or by several ranks at the same time: the bits are the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Visit:
    index: int
    blocks: tuple[int, ...]
    first_step: int  # the blocks' own step count before this visit
    num_steps: int


@dataclass(frozen=True)
class BlockQueue:
    """`num_steps` steps for every block, `visit_steps` at a time; a block's last visit may be shorter."""

    method: str
    num_blocks: int
    num_steps: int
    visit_steps: int
    order: str
    seed: int
    grow_visits: int = 0  # the first ones, in which the first block is the whole model (blocks.grow_at)
    visit_batches: int | None = None  # see `BlocksConfig`

    @classmethod
    def of(cls, recipe: Mapping[str, Any], num_blocks: int) -> BlockQueue:
        """The queue of a run. A visit is made of whole sweeps.

        `recipe`: a plain dict, as in plan.json; `num_blocks`: as the plan settled it.
        """
        blocks, train = recipe["blocks"], recipe["train"]
        sweep_steps, grow_at = blocks.get("sweep_steps", 1), blocks.get("grow_at")
        num_steps, visit_steps = train["num_steps"], -(-blocks["visit_steps"] // sweep_steps) * sweep_steps
        grow_visits = 0
        if grow_at is not None:  # at least one visit before it and one after it
            last = -(-num_steps // visit_steps) - 1
            grow_visits = max(min(round(grow_at * num_steps / visit_steps), last), 1)
        method, order, seed = recipe["method"], blocks["order"], train["seed"]
        again = blocks.get("visit_batches")
        return cls(method, num_blocks, num_steps, visit_steps, order, seed, grow_visits, again)

    @property
    def visits_per_round(self) -> int:
        return 1 if self.method == "end_to_end" else self.num_blocks

    @property
    def grow_steps(self) -> int:
        """Steps that the first block makes before the model grows."""
        return self.grow_visits * self.visit_steps

    @property
    def kept_batches(self) -> int:
        """Batches of a visit that come back in it, so that what has left the blocks before is kept."""
        batches = self.visit_batches
        return 0 if batches is None or batches >= min(self.visit_steps, self.num_steps) else batches

    @property
    def num_visits(self) -> int:
        return -(-self.num_steps // self.visit_steps) * self.visits_per_round

    @property
    def total_steps(self) -> int:
        return self.num_steps * self.visits_per_round

    def visit(self, index: int) -> Visit:
        round_index, place = divmod(index, self.visits_per_round)
        first_step = round_index * self.visit_steps
        return Visit(
            index,
            self._blocks(round_index, place),
            first_step,
            min(self.visit_steps, self.num_steps - first_step),
        )

    @property
    def together(self) -> bool:
        """Whether the visits of a round all begin from the same shared part."""
        return self.order == "together" and self.method != "end_to_end"

    def round_of(self, visits_done: int) -> list[Visit]:
        """The visits of the round that comes after `visits_done` visits, which are whole rounds."""
        return [self.visit(index) for index in range(visits_done, visits_done + self.visits_per_round)]

    def shared_steps(self, visit: Visit) -> int:
        """Steps that the shared part has made before a visit."""
        return visit.first_step if self.together else self.steps_done(visit.index)

    def draw_of(self, visit: Visit, step: int) -> int:
        """The number of what a step draws: its batch, and its random numbers.

        Every block passes the same batches where blocks are trained alone. Steps of the whole model go on
        through the data.
        """
        if self.method != "block_coordinate":
            return step
        place = step - visit.first_step
        return self.steps_done(visit.index) + (place % self.visit_batches if self.visit_batches else place)

    def pending(self, visits_done: int) -> Iterator[tuple[Visit, Visit | None]]:
        """Yields each visit still to make, with the one after it (None at the end): its block can then be
        fetched early.
        """
        for index in range(visits_done, self.num_visits):
            yield self.visit(index), self.visit(index + 1) if index + 1 < self.num_visits else None

    def steps_done(self, visits_done: int) -> int:
        """Optimizer steps of all blocks in the first `visits_done` visits."""
        rounds, places = divmod(visits_done, self.visits_per_round)
        whole = min(rounds * self.visit_steps, self.num_steps) * self.visits_per_round
        return whole + (places * self.visit(visits_done).num_steps if places else 0)

    def _blocks(self, round_index: int, place: int) -> tuple[int, ...]:
        blocks = list(range(self.num_blocks))
        if round_index < self.grow_visits:
            return (0,)
        if self.method == "end_to_end":
            return tuple(blocks)
        if self.order == "random":
            random.Random(f"{self.seed}/{round_index}").shuffle(blocks)
        return (blocks[place],)


Place = tuple[int, int]  # row, micro-batch


class Course(NamedTuple):
    """How a step of back-propagation goes through the blocks."""

    lowest: int = 0  # the block at which the backward pass ends; 0: it goes on to the input part
    first: int = 0  # the block at which the forward pass begins; above 0 its input is kept already
    entry: int | None = None  # the row that keeps the input of block `lowest`; None: its own

    def row(self, block: int) -> int:
        """Where the input of a block is kept."""
        return self.entry if self.entry is not None and block == self.lowest else block


WHOLE = Course()


def border_calls(
    num_blocks: int, parts: int, two_passes: bool, course: Course = WHOLE
) -> Iterator[tuple[bool, Place]]:
    """Yields the calls of `Borders` in a step of exact back-propagation: (whether it is a put, the place).

    `parts`: micro-batches. `two_passes`: backward is made twice, first for the whole model's gradient norm.
    """
    every, gradient, row = range(parts), num_blocks, course.row
    if not course.first:
        yield from ((True, (row(0), part)) for part in every)
    for block in range(course.first, num_blocks - 1):
        for part in every:
            yield from ((False, (row(block), part)), (True, (row(block + 1), part)))
    for _ in range(2 if two_passes else 1):
        for block in reversed(range(course.lowest, num_blocks)):
            for part in every:
                yield False, (row(block), part)
                if block < num_blocks - 1:
                    yield False, (gradient, part)
                yield True, (gradient, part)
        if not course.lowest:
            yield from ((False, (gradient, part)) for part in every)
