"""Prints what a process takes that has imported what training imports, and computed a little.

    python -m lowmem.floor_probe cpu [bitsandbytes|compiler|transformers|peft]
    python -m lowmem.floor_probe cuda

On a CPU that is its anonymous memory, or with a library what it takes more for that; on CUDA what it takes of
the card beside torch's allocator.
`lowmem.machine.floor` runs it in a child of its own.
"""

from __future__ import annotations

import sys
from importlib import import_module

import psutil
import torch
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention
from torch.optim.adamw import adamw

import lowmem.job  # noqa: F401  (what a run imports)
from lowmem.blocks.arena import Arena, ArenaLayout, device_buffer
from lowmem.blocks.optim import Step, update
from lowmem.machine.child import LEFT_BEHIND
from lowmem.machine.device import open_device
from lowmem.machine.monitor import Monitor, NvmlReader, Sample, anonymous_bytes
from lowmem.models.huggingface.quantised import with_bitsandbytes
from lowmem.recipe import OptimizerConfig


def main() -> None:
    kind, *libraries = sys.argv[1:]
    found = _on_cuda() if kind == "cuda" else _on_cpu()
    for library in libraries:
        found = _of_library(library) - found
    print(found)


def _of_library(library: str) -> int:
    """What the process takes when it has imported what a run imports with this library."""
    if library in ("transformers", "peft"):
        for module in ("models.llama.modeling_llama", "masking_utils", "cache_utils", "models.auto"):
            import_module(f"transformers.{module}")
    if library in ("bitsandbytes", "peft"):
        with_bitsandbytes(library)
    if library == "compiler":
        import_module(LEFT_BEHIND)
    return anonymous_bytes(psutil.Process())


def _on_cpu() -> int:
    with Monitor(unified=True):
        weights = torch.randn(256, 256, requires_grad=True)
        # A product keeps the buffers that it packed its operands into. Larger ones need no larger buffers.
        torch.randn(512, 1024) @ torch.randn(1024, 4096)
        gelu(torch.randn(128, 256) @ weights).sum().backward()  # type: ignore[no-untyped-call]
        assert weights.grad is not None
        moments, step = [torch.zeros_like(weights) for _ in range(2)], [torch.zeros(())]
        adamw(
            [weights.detach()],
            [weights.grad],
            [moments[0]],
            [moments[1]],
            [],
            step,
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=0.9,
            beta2=0.95,
            lr=1e-3,
            weight_decay=0.0,
            eps=1e-8,
        )
    return anonymous_bytes(psutil.Process())


def _on_cuda() -> int:
    """CUDA loads a library of kernels when the first of them runs, so each kind runs once."""
    device, before, after = open_device("cuda"), Sample(host_bytes=0), Sample(host_bytes=0)
    reader = NvmlReader()  # before CUDA begins: where NVML does not tell processes apart, a difference counts
    reader.fill(before)
    for dtype in (torch.float32, torch.bfloat16):
        h = torch.randn(2, 8, 256, 64, dtype=dtype, device=device.torch, requires_grad=True)
        out = scaled_dot_product_attention(h, h, h, is_causal=True).flatten(2)
        weights = torch.randn(len(out[0, 0]), 256, dtype=dtype, device=device.torch)
        gelu(layer_norm(out @ weights, (256,))).float().sum().backward()  # type: ignore[no-untyped-call]
    for name in ("adamw", "adamw8bit"):
        layout = ArenaLayout([("weight", (256, 256))], name)
        arena = Arena(layout, device_buffer(device, layout.total_bytes).zero_())
        grads = torch.zeros(layout.numel, device=device.torch)
        update(arena, grads, Step(1, 1e-3, OptimizerConfig()))
    device.wait_for_compute()
    reader.fill(after)
    held = device.memory()
    taken = after.nvml_process_bytes or (after.nvml_used_bytes or 0) - (before.nvml_used_bytes or 0)
    return taken - (held.reserved if held else 0)


if __name__ == "__main__":
    main()
