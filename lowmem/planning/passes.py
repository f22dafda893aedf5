"""What one pass of a block takes: its peak of memory, and the operations it makes.

Both are counted by running one forward and backward pass of the block under fake tensors. Every storage is
followed from birth to death: the peak is the peak, with what autograd keeps, what recompute frees and what
backward needs for a moment.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lowmem.blocks.arena import ArenaLayout, bind, gathered_in, parameter_views, unbind
from lowmem.blocks.optim import workspace_bytes
from lowmem.errors import ConfigError
from lowmem.machine.heap import GAPS, MMAP_THRESHOLD_BYTES
from lowmem.machine.pool import LENT_BYTES, lends
from lowmem.models.base import (
    BlockModel,
    named_base_parameters,
    named_layer_parameters,
    named_shared_parameters,
)
from lowmem.objectives.alike import one_for_all, times
from lowmem.objectives.base import Batch, Entered, Objective
from lowmem.planning.duration import Work
from lowmem.planning.settings import COMPUTE_DTYPE, Settings, frozen_layout
from lowmem.recipe import Recipe

DEVICE_OF = torch.ops.prim.device.default
PROBED = 3  # layers that tell what more of the same take
PROBED_CHUNKS = 3  # chunks of logits that tell what more of them take


class Large(NamedTuple):
    """Storages that the C library serves from maps of their own (`heap`), of one pass."""

    peak_bytes: int = 0
    born_bytes: int = 0
    unlent_peak_bytes: int = 0  # of those that no pool lends (`machine.pool`)

    def plus(self, other: Large, count: int = 1) -> Large:
        return Large(*(mine + count * more for mine, more in zip(self, other, strict=True)))


class Pass(NamedTuple):
    peak_bytes: int  # beyond weights and gradients
    work: Work  # forward and backward
    forward_work: Work  # of a forward pass alone, where the block streams and makes one; else none
    large: Large = Large()

    def with_more(self, fewer: Pass, count: int) -> Pass:
        """With `count` layers, or chunks of logits, more. Each adds what this pass has beyond one with one
        fewer.
        """
        more = {kind: number * count for kind, number in (self.work - fewer.work).items()}
        peak_bytes = self.peak_bytes + count * (self.peak_bytes - fewer.peak_bytes)
        large = self.large.plus(self.large.plus(fewer.large, -1), count)
        return Pass(peak_bytes, self.work + Work(more), self.forward_work, large)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages born under the mode and still alive, and their peak. `existing` tensors, and
    views of them, do not count.

    Also the work of every operation; views make none. `in_heap`: small storages lie in the C library's heap,
    and gaps between them count too.
    """

    def __init__(self, *existing: Tensor, in_heap: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._in_heap = in_heap
        self.live: int = 0
        self.peak: int = 0
        self.large = Large()
        self._large_live = Counter[bool]()  # by whether a pool lends them
        self.work = Work()
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in existing:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is DEVICE_OF and isinstance(args[0], FakeTensor):  # most calls, so it is answered here
            self.work[0, 0] += times()
            return torch.device("meta") if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
        out = func(*args, **kwargs)
        leaves = _tensors(out)
        lent = self._in_heap and lends(func, args, kwargs)
        for leaf in leaves:
            self._born(leaf.untyped_storage(), lent)
        if func.namespace == "prim":  # it asks what a tensor is, and touches no data
            self.work[0, 0] += times()
        elif not _is_view(func):
            num_bytes = sum(
                leaf.numel() * leaf.element_size() for leaf in (*leaves, *_tensors((args, kwargs)))
            )
            self.work[_operations(func, args, kwargs, out), num_bytes] += times()
        return out

    def _born(self, storage: torch.UntypedStorage, lent: bool) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        nbytes = storage.nbytes()
        least = LENT_BYTES if lent else MMAP_THRESHOLD_BYTES
        large = nbytes if self._in_heap and nbytes >= least else 0
        if self._in_heap and not large:
            nbytes = round((1 + GAPS) * nbytes)

        def died(_: object) -> None:
            self.live -= nbytes
            self._large_live[lent] -= large
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, died)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        self._large_live[lent] += large
        self.large = Large(
            max(self.large.peak_bytes, self._large_live.total()),
            self.large.born_bytes + times() * large,
            max(self.large.unlent_peak_bytes, self._large_live[False]),
        )


@functools.cache
def _is_view(func: Any) -> bool:
    return any(
        given.alias_info is not None and not given.alias_info.is_write for given in func._schema.returns
    )


def _operations(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating-point operations of matrix products and attention; all others are bound by memory."""
    packet = func._overloadpacket
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))  # type: ignore[no-untyped-call]
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        shapes = (tensor.shape for tensor in args[:4])
        return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


class PassCounter:
    """What one forward and backward pass takes. Each kind of pass is counted once and remembered.

    Where parameters are updated during backward, their gradients come and go: they, and the temporaries of
    the updates, count here.
    """

    def __init__(
        self, model: BlockModel, objective: Objective[Any, Any], recipe: Recipe, in_heap: bool = False
    ) -> None:
        """`objective`: bound to `model`. `in_heap`: see `LiveBytes`."""
        self._model, self._objective, self._recipe, self._in_heap = (
            model,
            objective.counted(),
            recipe,
            in_heap,
        )
        # Of each layer: the shapes of its parameters, and whether they are an adapter's.
        self._shapes = [
            tuple(
                (tuple(parameter.shape), model.is_adapter(f"layers.{index}.{name}"))
                for name, parameter in layer.named_parameters()
            )
            for index, layer in enumerate(model.layers)
        ]
        self._shared = _shapes(named_shared_parameters(model))
        self._known: dict[Any, Pass] = {}
        self._known_waiting: dict[Any, tuple[int, int]] = {}

    def __call__(self, layers: range, settings: Settings) -> Pass:
        kind = (settings.optimizer, settings.weights) if settings.during_backward else ()

        def counted(layers: range) -> Pass:
            return self._remembered(kind, layers, settings, lambda: self._count(layers, settings))

        if self._model.layers_alike and len(layers) > PROBED:
            fewer, more = (counted(range(layers.start, layers.start + n)) for n in (PROBED - 1, PROBED))
            return more.with_more(fewer, len(layers) - PROBED)
        return counted(layers)

    def streamed(self, layers: range, settings: Settings) -> Pass:
        """The pass of one unit of a model that is trained end to end and streams; see `waiting`.

        The input part belongs to the first unit's pass, the output part to the last unit's. A unit's forward
        is made again from its border in any case, so within the unit nothing is recomputed.
        """
        settings = settings.model_copy(update={"recompute": False})
        ends = layers.start == 0, layers.stop == len(self._model.layers)
        count = partial(self._count_streamed, layers, settings, *ends)
        return self._remembered(("streamed", ends), layers, settings, count, scored=ends[1])

    def frozen(self, layers: range, settings: Settings) -> Pass:
        """`streamed`, of a unit whose weights are only read: its backward pass is for its input alone."""
        settings = settings.model_copy(update={"recompute": False})
        last = layers.stop == len(self._model.layers)
        count = partial(self._count_streamed, layers, settings, False, last, range(0))
        return self._remembered(("frozen", last), layers, settings, count, scored=last)

    def coordinate(self, trained: range, settings: Settings) -> Pass:
        """The pass of all layers of which only those of one block are trained.

        Of layers that are alike a few tell the rest.
        """
        total = len(self._model.layers)
        if not self._model.layers_alike:
            return self._of_one_block(range(total), trained, settings)
        own, after = len(trained), total - trained.stop
        few_own, few_after = min(own, PROBED), min(after, PROBED)
        taken = self._with_few(trained.start > 0, few_own, few_after, settings)
        if own > PROBED:
            fewer = self._with_few(trained.start > 0, few_own - 1, few_after, settings)
            taken = taken.with_more(fewer, own - PROBED)
        if after > PROBED:
            few = self._with_few(trained.start > 0, few_own, few_after, settings)
            fewer = self._with_few(trained.start > 0, few_own, few_after - 1, settings)
            more = few.with_more(fewer, after - PROBED)
            taken = taken._replace(
                peak_bytes=taken.peak_bytes + more.peak_bytes - few.peak_bytes,
                work=taken.work + (more.work - few.work),
                large=taken.large.plus(more.large).plus(few.large, -1),
            )
        before = self.frozen(range(1), settings).forward_work
        return taken._replace(work=taken.work + Work({k: n * trained.start for k, n in before.items()}))

    def _with_few(self, above: bool, own: int, after: int, settings: Settings) -> Pass:
        """`above`: blocks come before the trained one, so that the input part is only read."""
        first = len(self._model.layers) - own - after
        return self._of_one_block(
            range(first, first + own + after), range(first, first + own), settings, above
        )

    def _of_one_block(
        self, layers: range, trained: range, settings: Settings, above: bool | None = None
    ) -> Pass:
        above = trained.start > 0 if above is None else above
        kind = ("coordinate", above, len(layers), trained.start - layers.start, len(trained))
        return self._remembered(kind, layers, settings, lambda: self._count(layers, settings, trained, above))

    @property
    def objective(self) -> Objective[Any, Any]:
        """The objective whose passes are counted."""
        return self._objective

    def evaluated(self, layers: range, settings: Settings, size: int) -> Pass:
        """The largest call of an evaluation, on `size` samples."""
        sized = settings.model_copy(update={"micro_batch_size": size, "during_backward": False})
        count = partial(self._count_evaluated, layers, sized)
        return self._remembered(("evaluated",), layers, sized, count, scored=False)

    @torch.no_grad()
    def _count_evaluated(self, layers: range, settings: Settings) -> Pass:
        with self._bound(layers, settings) as weights:
            batch = self._model.example_batch(settings.micro_batch_size)
            with LiveBytes(*weights, *batch.values(), in_heap=self._in_heap) as bytes_:
                block = [self._model.layers[i] for i in layers]
                whole = self._recipe.whole
                (self._objective.end_to_end_loss if whole else self._objective.evaluation_call)(block, batch)
        return Pass(bytes_.peak, bytes_.work, Work())

    def _remembered(
        self,
        kind: tuple[object, ...],
        layers: range,
        settings: Settings,
        count: Callable[[], Pass],
        scored: bool = True,
    ) -> Pass:
        """`scored`: the pass makes logits, of which backward makes every chunk again."""
        shapes = tuple(self._shapes[i] for i in layers)
        key = (kind, shapes, settings.micro_batch_size, settings.precision, settings.recompute)
        if key not in self._known:
            self._known[key] = self._with_all_chunks(settings, count) if scored else count()
        return self._known[key]

    def _with_all_chunks(self, settings: Settings, count: Callable[[], Pass]) -> Pass:
        """Of many chunks of logits a few are counted, because all are alike."""
        objective = self._objective
        chunks = objective.num_chunks(settings.micro_batch_size)
        if chunks <= PROBED_CHUNKS:
            return count()
        found = []
        for objective.most_chunks in (PROBED_CHUNKS - 1, PROBED_CHUNKS):
            found.append(count())
        objective.most_chunks = None
        fewer, more = found
        return more.with_more(fewer, chunks - PROBED_CHUNKS)

    def waiting(self, settings: Settings) -> tuple[int, int]:
        """Bytes of one micro-batch at one border, and bytes of what else of it waits on the device for the
        step.
        """
        key = settings.micro_batch_size, settings.precision
        if key not in self._known_waiting:
            with self._bound(range(0), settings):
                (h, cond, kept), batch = self._enter(settings)
                others = [cond, *kept.tensors(), *batch.values()]
                storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in others}
                self._known_waiting[key] = h.numel() * h.element_size(), sum(storages.values())
        return self._known_waiting[key]

    @contextlib.contextmanager
    def _bound(
        self,
        layers: range,
        settings: Settings,
        trained: range | None = None,
        above: bool = False,
        passing: bool = False,
    ) -> Iterator[tuple[Tensor, ...]]:
        """Binds fake weights of some layers and of the shared part, in the compute dtype, and the gradients
        of those that are trained. `trained`: the only ones of the layers; None: what the settings say.
        `above`: and nothing of the shared part that the input part uses. `passing`: the layers are a unit
        that streams.
        """
        blocks = _shapes(named_layer_parameters(self._model, layers))
        # Adapters of other layers take no part in a pass.
        elsewhere = tuple(f"layers.{i}." for i in range(len(self._model.layers)) if i not in layers)
        shared = [(name, shape) for name, shape in self._shared if not name.startswith(elsewhere)]
        base = _shapes(named_base_parameters(self._model))
        layout = ArenaLayout(shared if settings.frozen else [*blocks, *shared], settings.optimizer)
        slots, dtype = {slot.name: slot for slot in layout.slots}, COMPUTE_DTYPE[settings.precision]
        still = frozen_layout(self._model, [*blocks, *base] if settings.frozen else [], dtype)

        def updated(name: str, parameter: nn.Parameter) -> None:
            slot, kept_as = slots[name], COMPUTE_DTYPE[settings.weights]
            group = layout.group_of(slot)
            taken = workspace_bytes(slot.numel, group.quantized, kept_as, dtype, matrix=group.matrix)
            torch.empty(taken, dtype=torch.uint8)
            parameter.grad = None
            torch.autograd.graph.increment_version(parameter)

        with FakeTensorMode(), one_for_all():
            flat, grads = (torch.zeros(layout.numel, dtype=dtype) for _ in range(2))
            weights, views = parameter_views(layout, flat), parameter_views(layout, grads)
            own = {name for name, _ in blocks if name in weights} if passing else set()
            others = {name: view for name, view in weights.items() if name not in own}
            bind(self._model, others, updated if settings.during_backward else views)
            gathers = gathered_in(views, lambda: None)
            bind(self._model, {name: weights[name] for name in own}, gathers)
            read = torch.zeros(still.numel, dtype=still.weights_dtype)
            bind(self._model, parameter_views(still, read), None)
            for index in layers if trained is not None else ():
                self._model.layers[index].requires_grad_(trained is None or index in trained)
            for name, _ in shared if above else ():
                self._model.get_parameter(name).requires_grad_(False)
            yield flat, grads, read
            unbind(self._model, layout)
            unbind(self._model, still)

    @torch.no_grad()
    def _enter(self, settings: Settings) -> tuple[Entered, Batch]:
        batch = self._model.example_batch(settings.micro_batch_size)
        return self._objective.enter(batch), batch

    def _count(
        self, layers: range, settings: Settings, trained: range | None = None, above: bool = False
    ) -> Pass:
        """`trained`, `above`: see `_bound`."""
        model, objective = self._model, self._objective
        block = [model.layers[i] for i in layers]
        with (
            self._bound(layers, settings, trained, above) as weights,
            LiveBytes(*weights, in_heap=self._in_heap) as bytes_,
        ):
            batch = model.example_batch(settings.micro_batch_size)
            if self._recipe.whole:
                loss = objective.end_to_end_loss(block, batch, settings.recompute)
            else:
                loss = objective.block_loss(block, batch, objective.interval(0, 1), settings.recompute)
            try:
                loss.mean().backward()  # type: ignore[no-untyped-call]
            except RuntimeError as problem:
                if not settings.during_backward or "inplace" not in str(problem):
                    raise
                raise ConfigError(
                    "optimizer.during_backward: found true; allowed with this model, which needs a weight "
                    "again "
                    "after its gradient is whole: false; set optimizer.during_backward: false"
                ) from None
            del loss, batch
        return Pass(bytes_.peak, bytes_.work, Work(), bytes_.large)

    def _count_streamed(
        self, layers: range, settings: Settings, first: bool, last: bool, trained: range | None = None
    ) -> Pass:
        """`trained`: see `_bound`."""
        objective = self._objective
        with self._bound(layers, settings, trained, passing=True) as weights:
            (h, cond, kept), batch = self._enter(settings)
            h, cond = h.detach().requires_grad_(), cond.detach().requires_grad_()
            h_grad, cond_grad = torch.zeros_like(h), torch.zeros_like(cond)
            existing = [*weights, h, cond, *kept.tensors(), *batch.values(), h_grad, cond_grad]
            with LiveBytes(*existing, in_heap=self._in_heap) as bytes_:
                block = [self._model.layers[i] for i in layers]
                out = objective.through(block, h, cond, kept)
                forward = bytes_.work.copy()
                if last:
                    objective.leave(out, cond, kept, batch).mean().backward()  # type: ignore[no-untyped-call]
                else:
                    torch.autograd.backward([out, cond], [h_grad, cond_grad])
                del out
                if first:
                    roots = [root for root in objective.enter(batch)[:2] if root.requires_grad]
                    torch.autograd.backward(roots, [torch.zeros_like(root) for root in roots])
        return Pass(bytes_.peak, bytes_.work, forward, bytes_.large)


def _shapes(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in parameters]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
