"""TODO module docstring."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lowmem.data.config import LatentArraysData
from lowmem.data.images import pillow
from lowmem.inference.frozen_run import FrozenRun, initial_noise
from lowmem.noise import euler_step
from lowmem.objectives.images import ImageDenoising
from lowmem.recipe import EvalConfig

NUM_STEPS, GUIDANCE = (
    18,
    2.0,
)  # where the recipe says auto: EDM's number of steps for small images, the paper's guidance


GRID_SIDE, GRID_GAP = 32, 2  # pixels: smaller images are magnified to about that side; between images


def sampling_settings(config: EvalConfig) -> tuple[int, float]:
    """(steps of the chain, guidance)."""
    return (
        NUM_STEPS if config.num_steps == "auto" else config.num_steps,
        GUIDANCE if config.guidance == "auto" else config.guidance,
    )


@torch.no_grad()
def sample(frozen: FrozenRun, labels: Tensor, num_steps: int, guidance: float, seed: int) -> Tensor:
    """Images [N, C, H, W] in [-1, 1], or latents, of the given classes [N], on the CPU: the blocks in order,
    each for its share of the steps.

    Euler steps down from sigma_max, the last call returns D itself (paper, section 3.3). Guidance: D_none +
    guidance (D_class - D_none).
    """
    model, objective, noise = frozen.model, frozen.model.objective, frozen.plan.noise
    assert isinstance(objective, ImageDenoising)
    size = frozen.plan.recipe.eval.batch_size
    classes = torch.split(labels.to(frozen.device), size)
    torch.manual_seed(seed)
    start = initial_noise((len(labels), *model.example_batch(1)["image"].shape[1:]), noise.sigma_max).to(
        frozen.device
    )
    parts = list(torch.split(start, size))
    schedule = dict(frozen.schedule(num_steps))
    for block, layers in _walk(frozen, list(schedule)):
        for sigma, following in schedule[block]:
            for i, (z, label) in enumerate(zip(parts, classes, strict=True)):
                level = z.new_full((len(z),), sigma)
                denoised = objective.denoised(model, layers, {"label": label}, z, level, noise)
                if guidance != 1:
                    without = torch.full_like(label, model.num_classes)  # type: ignore[arg-type]
                    unguided = objective.denoised(model, layers, {"label": without}, z, level, noise)
                    denoised = unguided + guidance * (denoised - unguided)
                parts[i] = denoised if following is None else euler_step(z, denoised, sigma, following)
    made = objective.image(torch.cat(parts), noise).cpu()
    return made if isinstance(frozen.plan.recipe.data, LatentArraysData) else made.clamp(-1, 1)


def _walk(frozen: FrozenRun, blocks: Sequence[int]) -> Iterator[tuple[int, Iterable[nn.Module]]]:
    """Each block with the layers that serve its levels: its own, or all of them in a model trained end to
    end.
    """
    if frozen.plan.recipe.method == "end_to_end":
        with frozen.on_device(range(frozen.plan.settings.num_blocks)) as layers:
            yield from ((block, layers) for block in blocks)
    else:
        yield from frozen.walk(blocks)


def write_grid(images: Tensor, path: Path, columns: int) -> None:
    """A PNG of images [N, C, H, W] in [-1, 1], C = 1 or 3, row by row; small ones are magnified by a whole
    number.
    """
    image_module = pillow("samples: a PNG")
    count, channels, height, width = images.shape
    zoom = max(1, round(GRID_SIDE / max(height, width)))
    pixels = (
        ((images.clamp(-1, 1) + 1) * 127.5)
        .round()
        .byte()
        .permute(0, 2, 3, 1)
        .numpy()
        .repeat(zoom, axis=1)
        .repeat(zoom, axis=2)
    )
    step_y, step_x, rows = zoom * height + GRID_GAP, zoom * width + GRID_GAP, -(-count // columns)
    canvas = np.full((rows * step_y - GRID_GAP, columns * step_x - GRID_GAP, channels), 255, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * step_y, i % columns * step_x
        canvas[top : top + zoom * height, left : left + zoom * width] = image
    image_module.fromarray(canvas[..., 0] if channels == 1 else canvas).save(path, format="PNG")
