"""What a run with given settings will take, in bytes, by category and by tier.

State is counted to the byte from the block layouts. Activations are counted by running one forward and backward pass of a
block under fake tensors, following every storage from birth to death: the peak is the peak, with what autograd keeps, what
recompute frees and what backward needs for a moment. The runtime floor is a constant of the device type or of the profile.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem.arena import ArenaLayout, bind, parameter_views, unbind
from lowmem.borders import BorderBytes, border_bytes
from lowmem.config import OptimizerName, Precision, Recipe, Tier
from lowmem.errors import ConfigError, ProfileError
from lowmem.hardware import Profile
from lowmem.models.base import Batch, BlockModel, named_layer_parameters, named_shared_parameters
from lowmem.objectives.base import Entered
from lowmem.objectives.recurrent import RecurrentDenoising
from lowmem.optim import workspace_bytes
from lowmem.stream import staging_bytes
from lowmem.strict import Section
from lowmem.traffic import StreamedTraffic, streamed_traffic
from lowmem.units import MIB, from_gib

COMPUTE_DTYPE: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BITSANDBYTES_BYTES = 44 * MIB  # what its import takes on the host, measured
HOST_RUNTIME_GIB = 1.2  # a process that uses CUDA, on the host: libraries and driver; typical, not measured here


class Settings(Section):
    """Everything that a recipe may leave `auto`, settled."""

    num_blocks: int
    micro_batch_size: int
    precision: Precision
    weights: Precision = "float32"  # as they are kept
    recompute: bool
    optimizer: OptimizerName
    during_backward: bool = False  # each parameter is updated, and its gradient freed, as soon as that is whole
    ema: bool = False  # an average of the weights is kept
    tier: Tier
    borders: Tier = "device"  # where activations at block borders rest, while a model trained end to end streams
    write_back: Literal["beside", "wait"]


class Predicted(Section):
    """Peaks in bytes. `by_category` adds up to the device's peak; on unified memory that is also the host's."""

    device_peak_bytes: int
    host_peak_bytes: int
    disk_bytes: int
    by_category: dict[str, int]
    host_by_category: dict[str, int]
    block_peak_bytes: list[int]  # the device's peak while each block is visited
    traffic: StreamedTraffic | None = None  # of a model trained end to end that streams


def check_model(model: BlockModel) -> None:
    """Raises ConfigError for a model that cannot be given weights block by block."""
    if not len(model.layers):
        raise ConfigError("build_model: the model has no layers; put its residual layers in `layers`, an nn.ModuleList")
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)) and not hasattr(module, "reset_parameters"):
            raise ConfigError(f"build_model: module '{name}' ({type(module).__name__}) owns parameters but has no reset_parameters(); add one")
    for name, buffer in model.named_buffers():
        raise ConfigError(f"build_model: buffer '{name}' {tuple(buffer.shape)} would not stream with its block; compute it, or make it a parameter")


def layouts_of(model: BlockModel, settings: Settings) -> tuple[list[ArenaLayout], ArenaLayout]:
    """The arenas of the blocks, and of the shared part."""

    def layout(parameters: Iterable[tuple[str, nn.Parameter]]) -> ArenaLayout:
        return ArenaLayout([(n, tuple(p.shape)) for n, p in parameters], settings.optimizer, settings.ema, COMPUTE_DTYPE[settings.weights])

    blocks = [layout(named_layer_parameters(model, layers)) for layers in model.block_slices(settings.num_blocks)]
    return blocks, layout(named_shared_parameters(model))


def training_device(profile: Profile) -> torch.device:
    """The device to train on. Raises ProfileError if this machine has none of the profile's type."""
    kind = profile.device.type
    if kind == "mps":
        raise ProfileError(f"profile {profile.name}: training on device type 'mps' is not supported; use a cpu profile on this machine")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ProfileError(
            f"profile {profile.name}: needs a CUDA device and none is found here; use --dry-run, or a cpu profile (`lowmem profiles` lists them)"
        )
    return torch.device(kind)


def is_resident(settings: Settings, unified: bool) -> bool:
    return settings.tier == "device" or (settings.tier == "host" and unified)


# ---------------------------------------------------------------------------------------------------------------------
# Counting


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages born under the mode and still alive, and their peak. `existing` tensors, and views of them, do not count."""

    def __init__(self, *existing: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in existing:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._born(leaf.untyped_storage())
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        nbytes = storage.nbytes()

        def died(_: object) -> None:
            self.live -= nbytes
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, died)
        self.live += nbytes
        self.peak = max(self.peak, self.live)


class ActivationCounter:
    """Peak bytes of one forward and backward pass beyond weights and gradients, remembered per kind of pass.

    Updated during backward, parameters have gradients that come and go: they, and the updates' temporaries, count here.
    """

    def __init__(self, model: BlockModel, recipe: Recipe) -> None:
        self._model, self._recipe = model, recipe
        self._known: dict[Any, int] = {}

    def __call__(self, layers: range, settings: Settings) -> int:
        shapes = tuple(tuple(tuple(p.shape) for p in self._model.layers[i].parameters()) for i in layers)
        key: tuple[object, ...] = (shapes, settings.micro_batch_size, settings.precision, settings.recompute)
        if settings.during_backward:
            key = (*key, settings.optimizer, settings.weights)
        if key not in self._known:
            self._known[key] = self._count(layers, settings)
        return self._known[key]

    def streamed(self, layers: range, settings: Settings) -> int:
        """The same of one block of a model that is trained end to end and streams, its micro-batch waiting at the border (see `waiting`).

        Input and output part belong to the first and the last block's pass.
        """
        ends = layers.start == 0, layers.stop == len(self._model.layers)
        shapes = tuple(tuple(tuple(p.shape) for p in self._model.layers[i].parameters()) for i in layers)
        key = ("streamed", ends, shapes, settings.micro_batch_size, settings.precision, settings.recompute)
        if key not in self._known:
            self._known[key] = self._count_streamed(layers, settings, *ends)
        return self._known[key]

    def waiting(self, settings: Settings) -> tuple[int, int]:
        """(bytes of one micro-batch at one border, bytes of what else of it waits on the device for the whole step)."""
        with self._bound(range(0), settings):
            entered, batch = self._enter(settings)
            others = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors([entered.cond, entered.kept, batch])}
            return entered.h.numel() * entered.h.element_size(), sum(others.values())

    @contextlib.contextmanager
    def _bound(self, layers: range, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
        """Fake weights of some layers and of the shared part, and their gradients or what updates them, in the compute dtype."""
        parameters = [*named_layer_parameters(self._model, layers), *named_shared_parameters(self._model)]
        layout = ArenaLayout([(n, tuple(p.shape)) for n, p in parameters], settings.optimizer)
        slots, dtype = {slot.name: slot for slot in layout.slots}, COMPUTE_DTYPE[settings.precision]
        if isinstance(self._model.objective, RecurrentDenoising):  # more iterations than are back-propagated take no more memory
            self._model.objective.fixed_iterations = self._model.objective.config.backprop_iterations + 1

        def updated(name: str, parameter: nn.Parameter) -> None:
            slot = slots[name]
            torch.empty(workspace_bytes(slot.numel, layout.group_of(slot).quantized, COMPUTE_DTYPE[settings.weights], dtype), dtype=torch.uint8)
            parameter.grad = None
            torch.autograd.graph.increment_version(parameter)

        with FakeTensorMode():
            flat, grads = (torch.zeros(layout.numel, dtype=dtype) for _ in range(2))
            bind(self._model, parameter_views(layout, flat), updated if settings.during_backward else parameter_views(layout, grads))
            yield flat, grads
            unbind(self._model, layout)

    @torch.no_grad()
    def _enter(self, settings: Settings) -> tuple[Entered, Batch]:
        batch = self._model.example_batch(settings.micro_batch_size)
        return self._model.objective.enter(self._model, batch, self._recipe.noise), batch

    def _count(self, layers: range, settings: Settings) -> int:
        model, recipe = self._model, self._recipe
        block = [model.layers[i] for i in layers]
        with self._bound(layers, settings) as weights, LiveBytes(*weights) as bytes_:
            batch = model.example_batch(settings.micro_batch_size)
            if recipe.method == "end_to_end":
                loss = model.objective.end_to_end_loss(model, block, batch, recipe.noise, settings.recompute)
            else:
                interval = model.objective.interval(0, 1, recipe.noise, 0.0)
                loss = model.objective.block_loss(model, block, batch, interval, recipe.noise, settings.recompute)
            try:
                loss.mean().backward()  # type: ignore[no-untyped-call]
            except RuntimeError as problem:
                if not settings.during_backward or "inplace" not in str(problem):
                    raise
                raise ConfigError(
                    "optimizer.during_backward: found true; allowed with this model, which needs a weight again after its gradient is whole: "
                    "false; set optimizer.during_backward: false"
                ) from None
            del loss, batch
        return int(bytes_.peak)

    def _count_streamed(self, layers: range, settings: Settings, first: bool, last: bool) -> int:
        model, objective, noise = self._model, self._model.objective, self._recipe.noise
        with self._bound(layers, settings) as weights:
            (h, cond, kept), batch = self._enter(settings)
            h, cond = h.detach().requires_grad_(), cond.detach().requires_grad_()
            h_grad, cond_grad = torch.zeros_like(h), torch.zeros_like(cond)
            with LiveBytes(*weights, *_tensors([h, cond, kept, batch, h_grad, cond_grad])) as bytes_:
                out = objective.through(model, [model.layers[i] for i in layers], h, cond, kept, settings.recompute)
                if last:
                    objective.leave(model, out, cond, kept, batch, noise).mean().backward()  # type: ignore[no-untyped-call]
                else:
                    torch.autograd.backward([out, cond], [h_grad, cond_grad])
                del out
                if first:
                    roots = [root for root in objective.enter(model, batch, noise)[:2] if root.requires_grad]
                    torch.autograd.backward(roots, [torch.zeros_like(root) for root in roots])
        return int(bytes_.peak)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def predict(model: BlockModel, recipe: Recipe, profile: Profile, settings: Settings, counter: ActivationCounter, data_bytes: int = 0) -> Predicted:
    """`data_bytes`: what the data hold in host memory."""
    layouts, shared = layouts_of(model, settings)
    slices = model.block_slices(settings.num_blocks)
    whole = recipe.method == "end_to_end"
    resident = is_resident(settings, profile.unified)
    together = whole and resident  # all blocks are trained at once
    compute_bytes = COMPUTE_DTYPE[settings.precision].itemsize
    copies = 0 if settings.weights == settings.precision else compute_bytes  # bytes per weight of the copy that computes, where there is one
    grad_bytes = 0 if settings.during_backward else compute_bytes
    visited = layouts if together else [max(layouts, key=lambda layout: layout.total_bytes)]
    on_device = layouts if resident else visited
    slot_bytes = max(layout.total_bytes for layout in layouts)

    if together:
        passes = [counter(range(len(model.layers)), settings)]
    else:
        passes = [(counter.streamed if whole else counter)(layers, settings) for layers in slices]
    workspace = 0  # of an update, while no activation is alive
    if not settings.during_backward:
        groups = [group for layout in (*layouts, shared) for group in layout.groups]
        dtypes = COMPUTE_DTYPE[settings.weights], COMPUTE_DTYPE[settings.precision]
        workspace = max(workspace_bytes(group.stop - group.start, group.quantized, *dtypes) for group in groups)
    activations = [max(peak, workspace) for peak in passes]
    slots, ring = staging_bytes(slot_bytes, resident, recipe.offload.prefetch, copied=profile.device.type == "cuda")
    host_staging = shared.total_bytes + ring + (slots if profile.unified else 0)
    device_staging = host_staging if profile.unified else slots
    borders, traffic = BorderBytes(), None
    if whole and not resident:
        parts, two_passes = recipe.train.batch_size // settings.micro_batch_size, recipe.optimizer.clips_whole
        borders = border_bytes(settings.borders, profile.unified, *counter.waiting(settings), settings.num_blocks, parts, two_passes)
        traffic = streamed_traffic(layouts, shared, profile, settings.tier, two_passes, settings.recompute, borders)

    category = {
        "weights": sum(layout.weights_bytes for layout in on_device) + copies * sum(layout.numel for layout in visited),
        "gradients": grad_bytes * sum(layout.numel for layout in visited),
        "optimizer_state": sum(layout.state_bytes for layout in on_device),
        "activations": max(activations),
        "borders": borders.device + (borders.host if profile.unified else 0),
        "shared_part": shared.total_bytes + (grad_bytes + copies) * shared.numel,
        "staging": device_staging,
        "runtime_floor": profile.runtime_floor_bytes,
    }
    if profile.unified:
        category["data"] = data_bytes
        if settings.optimizer == "adamw8bit" and profile.device.type == "cpu":
            category["runtime_floor"] += BITSANDBYTES_BYTES
    device_peak = sum(category.values())
    if profile.unified:
        host_category = category
    else:
        host_copies = sum(layout.total_bytes for layout in (*layouts, shared)) if settings.tier == "host" else 0
        host_category = {
            "blocks": host_copies,
            "borders": borders.host,
            "staging": host_staging,
            "data": data_bytes,
            "runtime_floor": from_gib(HOST_RUNTIME_GIB),
        }
    files = sum(layout.total_bytes + len(layout.header()) for layout in (*layouts, shared))
    written = layouts if whole else visited  # between two commits, beside the files of the last one
    return Predicted(
        device_peak_bytes=device_peak,
        host_peak_bytes=sum(host_category.values()),
        disk_bytes=files + sum(layout.total_bytes + len(layout.header()) for layout in (*written, shared)) + borders.disk,
        by_category=category,
        host_by_category=host_category,
        block_peak_bytes=[
            device_peak - category["activations"] + (activations[0] if together else activations[block]) for block in range(settings.num_blocks)
        ],
        traffic=traffic,
    )
