"""Sees that all ranks are about to train the same thing in the same folder, before anything is written."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowmem.blocks.run_dir import RunDir
from lowmem.distributed.engine import engine_refusal
from lowmem.errors import BudgetError, ConfigError, ResumeError, StoreError
from lowmem.machine.environment import read_environment
from lowmem.planning.plan import Plan, first_difference
from lowmem.schema import parse
from lowmem.training.ranks import Ranks
from lowmem.units import format_bytes


def common_plan(ranks: Ranks, make: Callable[[], Plan]) -> Plan:
    """Rank 0's plan, on every rank."""
    if ranks.leads:
        plan = make()
        ranks.told({key: value for key, value in plan.to_dict().items() if key != "fits"})
        return plan
    return parse(Plan, ranks.told(), "rank 0: plan", StoreError)


def require_agreement(ranks: Ranks, plan: Plan, folder: Path) -> None:
    """Raises on rank 0, in one line that names the rank, where ranks cannot train together. The others wait
    for its verdict. `plan`: rank 0's, with this rank's own recipe and data.
    """
    found = ranks.gathered(
        {
            "lowmem": read_environment()["lowmem"],
            "torch": torch.__version__,
            "recipe": plan.recipe.to_dict(),
            "data": None if plan.data is None else plan.data.model_dump(mode="json"),
            "folder": str(folder),
            "host": socket.gethostname(),
        }
    )
    if ranks.leads:
        _require_spread(ranks, plan)
        hosts = [str(facts.pop("host")) for facts in found]
        _require_same(found)
        _require_room(plan, hosts)
    ranks.told()
    _require_common_folder(ranks, folder)


def _require_spread(ranks: Ranks, plan: Plan) -> None:
    if plan.recipe.method == "end_to_end":
        refusal = engine_refusal(plan.recipe, plan, ranks.size)
        if refusal:
            raise ConfigError(refusal)
        return
    if plan.recipe.method == "block_coordinate":
        raise ConfigError(
            f"method: found 'block_coordinate' with {ranks.size} ranks; allowed: 1, because its blocks take "
            "turns; train on one device, or set method: end_to_end"
        )
    blocks, order = plan.settings.num_blocks, plan.recipe.blocks.order
    if order != "together":
        raise ConfigError(
            f"blocks.order: found '{order}' with {ranks.size} ranks; allowed: together, whose blocks are "
            "trained at the same time; set it (it changes what is trained), or train on one device"
        )
    if ranks.size > blocks:
        raise ConfigError(
            f"ranks: found {ranks.size} for {blocks} blocks; allowed: 1 to {blocks}, because a block is "
            "trained by one rank; start fewer, or raise blocks.num_blocks"
        )


def _require_same(found: list[dict[str, Any]]) -> None:
    for rank, facts in enumerate(found):
        difference = first_difference(found[0], facts)
        if difference:
            key, first, other = difference
            raise ConfigError(
                f"rank {rank}: {key}: found {other}; rank 0 has {first}; allowed: the same on all ranks; "
                "install the same versions, and give the same command and data; nothing was written"
            )


def _require_room(plan: Plan, hosts: list[str]) -> None:
    """The profile describes a machine; its ranks share it, except for the memory of cards."""
    unified, budget, predicted = plan.profile.unified, plan.budget, plan.predicted
    needed = predicted.device_needed_bytes if unified else predicted.host_needed_bytes
    allowed = budget.device_bytes if unified else budget.host_bytes
    host, count = max(((host, hosts.count(host)) for host in hosts), key=lambda pair: pair[1])
    if count * needed > allowed:
        raise BudgetError(
            f"plan: {count} ranks on {host} need {count} times {format_bytes(needed)}; profile "
            f"{plan.profile.name} allows {format_bytes(allowed)}; start fewer ranks there, or lower "
            "train.micro_batch_size"
        )


def _require_common_folder(ranks: Ranks, folder: Path) -> None:
    """Every rank must see the lock that rank 0 holds. A folder that was made for this goes again."""
    run, made = RunDir(folder), list[Path]()
    if ranks.leads:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        run.acquire()
    ranks.told()
    seen = ranks.gathered(True if ranks.leads else run.is_locked())
    if ranks.leads:
        run.release()
        if made:
            (folder / "lock").unlink()
            for path in made:
                path.rmdir()
        if not all(seen):
            raise ResumeError(
                f"rank {seen.index(False)}: does not see run folder {folder.absolute()} as rank 0 holds it; "
                "allowed: a folder on a file system that all ranks share, with locks; give one with "
                "--run-dir; nothing was written"
            )
    ranks.told()
