"""Images drawn from a trained generator, and the picture or array that they are written to."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowmem.data.config import LatentArraysData
from lowmem.data.images import pillow
from lowmem.inference.frozen_run import FrozenRun, initial_noise
from lowmem.models.base import BlockModel
from lowmem.noise import euler_step
from lowmem.objectives.images import ImageDenoising
from lowmem.planning.evaluation import sampling_settings
from lowmem.reporting.output import write_output

GRID_SIDE, GRID_GAP = 32, 2  # pixels: smaller images are magnified to about that side; between images


@torch.no_grad()
def sample(frozen: FrozenRun, labels: Tensor, num_steps: int, guidance: float, seed: int) -> Tensor:
    """Images [N, C, H, W] in [-1, 1], or latents, of the given classes [N], on the CPU.

    The blocks come in order, each for its share of the Euler steps down from sigma_max; the last call returns
    D itself (paper, section 3.3). Guidance: D_none + guidance (D_class - D_none).
    """
    model, objective = frozen.parts(BlockModel, ImageDenoising)
    sigma_max, size = objective.noise.sigma_max, frozen.sized().micro_batch_size
    classes = torch.split(labels.to(frozen.device), size)
    torch.manual_seed(seed)
    image_shape = model.example_batch(1)["image"].shape[1:]
    start = initial_noise((len(labels), *image_shape), sigma_max).to(frozen.device)
    parts = list(torch.split(start, size))
    del start
    schedule = dict(frozen.schedule(num_steps))
    for block, layers in frozen.walk_owners(list(schedule)):
        for sigma, following in schedule[block]:
            for i, (z, label) in enumerate(zip(parts, classes, strict=True)):
                level = z.new_full((len(z),), sigma)
                denoised = objective.denoised(layers, {"label": label}, z, level)
                if guidance != 1:
                    without = torch.full_like(label, objective.model.num_classes)
                    unguided = objective.denoised(layers, {"label": without}, z, level)
                    denoised = unguided + guidance * (denoised - unguided)
                parts[i] = denoised if following is None else euler_step(z, denoised, sigma, following)
    made = objective.image(torch.cat(parts)).cpu()
    return made if isinstance(frozen.plan.recipe.data, LatentArraysData) else made.clamp(-1, 1)


def write_samples(frozen: FrozenRun, path: Path, num: int | None, seed: int) -> None:
    """Writes `num` images (None: eight of each class), class after class.

    Pictures make a PNG grid with a column for each class. Latents, which only their autoencoder turns into
    pictures, make an array [N, C, H, W] in float32, on the scale that the autoencoder gave them.
    """
    _, objective = frozen.parts(BlockModel, ImageDenoising)
    recipe, num_classes = frozen.plan.recipe, objective.model.num_classes
    labels = torch.arange(num or 8 * num_classes) % num_classes
    made = sample(frozen, labels, *sampling_settings(recipe.eval), seed)
    if isinstance(recipe.data, LatentArraysData):
        buffer = io.BytesIO()
        np.save(buffer, made.numpy() / np.float32(recipe.data.scale))
        write_output(path, buffer.getvalue(), "--out")
    else:
        write_grid(made, path, num_classes)


def write_grid(images: Tensor, path: Path, columns: int) -> None:
    """Writes images [N, C, H, W] in [-1, 1], C = 1 or 3, row by row into a PNG.

    Small images are magnified.
    """
    image_module = pillow("samples: a PNG")
    count, channels, height, width = images.shape
    zoom = max(1, round(GRID_SIDE / max(height, width)))
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    step_y, step_x, rows = zoom * height + GRID_GAP, zoom * width + GRID_GAP, -(-count // columns)
    canvas = np.full((rows * step_y - GRID_GAP, columns * step_x - GRID_GAP, channels), 255, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * step_y, i % columns * step_x
        canvas[top : top + zoom * height, left : left + zoom * width] = image
    buffer = io.BytesIO()
    image_module.fromarray(canvas[..., 0] if channels == 1 else canvas).save(buffer, format="PNG")
    write_output(path, buffer.getvalue(), "--out")
