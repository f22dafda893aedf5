"""Says in one line why a plan does not fit, and which settings to change.

`CURES` is a table: each row is a setting, the value to give it, and when that helps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lowmem.machine.profile import Profile
from lowmem.planning.footprint import Budget, Predicted, with_headroom
from lowmem.planning.settings import Settings
from lowmem.recipe import Recipe
from lowmem.units import format_bytes


@dataclass(frozen=True)
class Shortage:
    """A plan that needs more than its budget, as the table of cures sees it."""

    recipe: Recipe
    profile: Profile
    settings: Settings
    budget: Budget
    predicted: Predicted

    @property
    def pool(self) -> str:
        """The memory, or the disk, that is too small; the first one of several."""
        if self.predicted.device_needed_bytes > self.budget.device_bytes:
            return "device"
        return "host" if self.predicted.host_needed_bytes > self.budget.host_bytes else "disk"

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by category in the memory that is too small."""
        return self.predicted.by_category if self.pool == "device" else self.predicted.host_by_category

    @property
    def largest(self) -> str:
        """The category that takes most."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def end_to_end(self) -> bool:
        return self.recipe.method == "end_to_end"

    @property
    def together(self) -> bool:
        """Whether all blocks are on the device and are trained at once."""
        return self.end_to_end and self.settings.tier == "device"

    @property
    def trains_in_blocks(self) -> bool:
        """Whether the model can be trained block by block."""
        other = self.recipe.model_copy(update={"method": "diffusion_blocks"})
        return self.recipe.model.contradiction(other) is None

    @property
    def num_layers(self) -> int:
        """The most blocks there can be. A model of the user's own does not say: twice as many may do. One
        that streams in any case gains nothing by more.
        """
        if not self.trains_in_blocks:
            return self.settings.num_blocks
        return getattr(self.recipe.model, "num_layers", 2 * self.settings.num_blocks)

    @property
    def gradients_weigh(self) -> bool:
        """Whether gradients take at least a quarter of what the largest category takes."""
        return 4 * self.parts.get("gradients", 0) >= self.parts[self.largest]


@dataclass(frozen=True)
class Cure:
    """A change of one setting of the recipe."""

    key: str
    value: str | Callable[[Shortage], int]
    helps: Callable[[Shortage], bool]  # never where the setting has the value already
    note: str = ""

    def text(self, shortage: Shortage) -> str:
        value = self.value if isinstance(self.value, str) else self.value(shortage)
        return f"{self.key}: {value}{self.note}"


CURES = (
    Cure("offload.tier", "auto", lambda s: s.together and s.recipe.offload.tier == "device"),
    Cure("method", "diffusion_blocks", lambda s: s.end_to_end and s.trains_in_blocks),
    Cure(
        "blocks.num_blocks",
        lambda s: min(2 * s.settings.num_blocks, s.num_layers),
        lambda s: not s.together and s.settings.num_blocks < s.num_layers and s.largest != "runtime_floor",
    ),
    Cure("train.recompute", "true", lambda s: s.largest == "activations" and not s.settings.recompute),
    Cure(
        "train.micro_batch_size",
        lambda s: s.settings.micro_batch_size // 2,
        lambda s: (
            s.largest == "activations"
            and s.settings.micro_batch_size > 1
            and s.recipe.optimizer.during_backward is not True
        ),
    ),
    Cure("offload.borders", "disk", lambda s: s.largest == "borders" and s.settings.borders != "disk"),
    Cure(
        "offload.tier",
        "disk",
        lambda s: (
            s.settings.tier != "disk"
            and not s.together
            and s.largest in ("weights", "optimizer_state", "blocks")
        ),
    ),
    Cure(
        "optimizer.name",
        "adamw8bit",
        lambda s: s.settings.optimizer != "adamw8bit" and s.largest == "optimizer_state",
    ),
    Cure(
        "train.weights",
        "bfloat16",
        lambda s: (
            s.settings.weights == "float32"
            and s.settings.precision == "bfloat16"
            and s.largest in ("weights", "shared_part", "staging", "blocks")
        ),
    ),
    Cure(
        "optimizer.grad_clip",
        "null",
        lambda s: (
            s.recipe.optimizer.grad_clip is not None
            and s.gradients_weigh
            and (s.together or not s.end_to_end)
        ),
        " (with one micro-batch updates then run during backward, and no gradients gather)",
    ),
    Cure("offload.prefetch", "false", lambda s: s.largest == "staging" and s.recipe.offload.prefetch),
)


def advice_for(shortage: Shortage) -> str:
    """What is too small, by how much, what takes most of it, and what to try."""
    if shortage.pool == "disk":
        kept = shortage.recipe.offload.keep_previous
        without = "set offload.keep_previous: false, " if kept else ""
        return (
            f"plan: the run folder needs {format_bytes(shortage.predicted.disk_bytes)} of disk; "
            f"{format_bytes(shortage.budget.disk_bytes or 0)} are free after the reserve. "
            f"Free space, {without}or give another --run-dir."
        )
    predicted, settings, profile = shortage.predicted, shortage.settings, shortage.profile
    if predicted.device_needed_bytes > with_headroom(predicted.run_peak_bytes):
        return (
            f"plan: making the plan takes {format_bytes(predicted.planning_bytes)}, more than the run; "
            f"profile {profile.name} allows {format_bytes(shortage.budget.device_bytes)}. Give it as "
            "much: set device.memory_gib in a profile of your own."
        )
    evaluation = predicted.evaluation
    if evaluation and evaluation.peak_bytes > predicted.device_peak_bytes:
        need, allowed = evaluation.peak_bytes, shortage.budget.device_bytes
        return (
            f"plan: the evaluation needs {format_bytes(need)} on the device, and "
            f"{format_bytes(with_headroom(need) - need)} of headroom, with one sample at a time; "
            f"profile {profile.name} allows {format_bytes(allowed)}. Try a lower eval.num_samples "
            "or eval.num_batches."
        )
    if shortage.pool == "device":
        need, allowed = predicted.device_peak_bytes, shortage.budget.device_bytes
        memory_gib, reserve_gib = profile.device.memory_gib, profile.device.reserve_gib
    else:
        need, allowed = predicted.host_peak_bytes, shortage.budget.host_bytes
        memory_gib, reserve_gib = profile.host.memory_gib, profile.host.reserve_gib
    block = max(range(settings.num_blocks), key=predicted.block_peak_bytes.__getitem__)
    who = "the run" if shortage.together else f"block {block} of {settings.num_blocks}"
    cures = [cure.text(shortage) for cure in CURES if cure.helps(shortage)]
    return (
        f"plan: {who} needs {format_bytes(need)} on the {shortage.pool}, and "
        f"{format_bytes(with_headroom(need) - need)} of headroom, at micro_batch_size "
        f"{settings.micro_batch_size}; profile {profile.name} allows {format_bytes(allowed)} "
        f"({memory_gib:.2f} - {reserve_gib:.2f} GiB reserve). "
        f"Largest part: {shortage.largest.replace('_', ' ')} "
        f"{format_bytes(shortage.parts[shortage.largest])}. "
        f"Try {', or '.join(cures) or 'a profile with more memory'}."
    )
