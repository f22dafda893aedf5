"""Plans a recipe on several devices: what they send to each other, how long that takes, how it scales."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lowmem.distributed.exchange import Cluster, gradient_link_bytes, round_bytes, round_link_bytes
from lowmem.errors import ConfigError
from lowmem.job import Named, machine_of, plan_on, settled_recipe
from lowmem.models import model_builder
from lowmem.planning.plan import Plan
from lowmem.planning.run_data import spec_of
from lowmem.planning.settings import COMPUTE_DTYPE, layouts_of
from lowmem.recipe import Recipe, recipe_from_dict, with_overrides
from lowmem.reporting.tables import text_table
from lowmem.units import GIB, format_bytes, format_seconds

BLOCKS, EXACT = "independent blocks", "end to end"
CHANGES = {
    BLOCKS: ("method=diffusion_blocks", "blocks.order=together"),
    EXACT: ("method=end_to_end", "blocks.order=round_robin"),
}
COLUMNS = ("method", "sent by all", "over a link", "every", "takes", "compute", "efficiency")


class Spread(NamedTuple):
    """A method on a cluster: what happens between two exchanges, and in one."""

    method: str
    every_steps: int
    sent_bytes: int  # by all ranks
    link_bytes: int  # over the busiest link, one way
    exchange_s: float
    compute_s: float | None  # of a rank between two exchanges; None: the profile lacks a rate
    ideal_s: float | None  # the same if the work were spread evenly

    @property
    def efficiency(self) -> float | None:
        if self.compute_s is None or self.ideal_s is None:
            return None
        return self.ideal_s / (self.compute_s + self.exchange_s)

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "efficiency": self.efficiency}

    def cells(self) -> list[str]:
        rate = self.efficiency
        return [
            self.method,
            format_bytes(self.sent_bytes),
            format_bytes(self.link_bytes),
            "step" if self.every_steps == 1 else f"{self.every_steps} steps",
            format_seconds(self.exchange_s),
            "unknown" if self.compute_s is None else format_seconds(self.compute_s),
            "unknown" if rate is None else f"{rate:.1%}",
        ]


def plan_cluster(
    recipe: Named,
    profile: str | os.PathLike[str] | None,
    overrides: Sequence[str],
    cluster: Cluster,
    link_bytes_per_s: float,
    folder: Path | None = None,
) -> list[Spread]:
    """The recipe by both methods on such machines. Raises ConfigError for what cannot be spread."""
    if not 1 <= cluster.machines <= cluster.ranks:
        raise ConfigError(
            f"--machines: found {cluster.machines} for {cluster.ranks} devices; allowed: 1 to "
            f"{cluster.ranks}; change it"
        )
    machine, settled = machine_of(profile), settled_recipe(recipe, overrides)
    found = []
    for method, changes in CHANGES.items():
        plan = plan_on(machine, _changed(settled, changes), folder)
        spread = _blocks if method == BLOCKS else _exact
        found.append(spread(plan, cluster, link_bytes_per_s))
    return found


def _changed(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    raw = recipe.to_dict()
    raw["blocks"] |= {"sweep_steps": 1, "grow_at": None}
    with_overrides(raw, list(changes))
    return recipe_from_dict(raw, "cluster")


def shared_bytes_of(plan: Plan) -> int:
    """Bytes of the shared part's arena."""
    import torch

    with torch.device("meta"):
        model = model_builder(plan.recipe, spec_of(plan))()
    _, shared = layouts_of(model, plan.settings)
    return shared.total_bytes


def _blocks(plan: Plan, cluster: Cluster, rate: float) -> Spread:
    blocks, steps = plan.settings.num_blocks, min(plan.recipe.blocks.visit_steps, plan.recipe.train.num_steps)
    if cluster.ranks > blocks:
        raise ConfigError(
            f"--devices: found {cluster.ranks} for {blocks} blocks; allowed: 1 to {blocks}, because a block "
            f"is trained by one rank; set blocks.num_blocks={cluster.ranks}, or give fewer"
        )
    shared, time = shared_bytes_of(plan), plan.predicted.time
    link = round_link_bytes(shared, blocks, cluster)
    visit_s = None if time is None else steps * time.step_s
    return Spread(
        BLOCKS,
        steps,
        round_bytes(shared, blocks, cluster.ranks),
        link,
        link / rate,
        None if visit_s is None else -(-blocks // cluster.ranks) * visit_s,
        None if visit_s is None else blocks * visit_s / cluster.ranks,
    )


def _exact(plan: Plan, cluster: Cluster, rate: float) -> Spread:
    gradient = plan.num_parameters * COMPUTE_DTYPE[plan.settings.precision].itemsize
    link, time = gradient_link_bytes(gradient, cluster.ranks), plan.predicted.time
    compute_s = None if time is None else time.step_s / cluster.ranks
    return Spread(EXACT, 1, cluster.ranks * link, link, link / rate, compute_s, compute_s)


def cluster_table(spreads: Sequence[Spread], cluster: Cluster, rate: float) -> str:
    where = f"{cluster.ranks} devices on {cluster.machines} machines, links of {rate / GIB:g} GiB/s"
    notes = [
        "an exchange is not hidden behind compute here; a link's delay is not counted",
        "end to end: each device takes its part of the batch, and a gradient is exchanged in every step",
    ]
    return text_table(where, COLUMNS, [spread.cells() for spread in spreads], notes)
