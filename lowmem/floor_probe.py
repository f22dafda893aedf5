"""Prints the anonymous bytes of a process that has imported what training imports, and computed a little.

`lowmem.machine.floor` runs it in a child of its own.
"""

from __future__ import annotations

import psutil
import torch
from torch.optim.adamw import adamw

import lowmem.job  # noqa: F401  (what a run imports)
from lowmem.machine.monitor import Monitor, anonymous_bytes


def main() -> None:
    with Monitor(unified=True):
        weights = torch.randn(256, 256, requires_grad=True)
        torch.nn.functional.gelu(torch.randn(128, 256) @ weights).sum().backward()  # type: ignore[no-untyped-call]
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
    print(anonymous_bytes(psutil.Process()))


if __name__ == "__main__":
    main()
