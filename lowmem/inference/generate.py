"""`lowmem sample`: what a finished run makes, written to a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowmem.blocks.run_dir import RunDir
from lowmem.data.config import LatentArraysData, TextConfig
from lowmem.data.datasets import describe_data
from lowmem.data.text import load_tokenizer
from lowmem.errors import ConfigError
from lowmem.inference import image_samples as images
from lowmem.inference import sampling
from lowmem.inference.evaluation import recurrent
from lowmem.inference.frozen_run import FrozenRun
from lowmem.models import model_builder
from lowmem.objectives.images import ImageDenoising
from lowmem.objectives.masked import MaskedDenoising
from lowmem.objectives.recurrent import RecurrentDenoising
from lowmem.objectives.tokens import TokenDenoising
from lowmem.planning.plan import read_plan
from lowmem.recipe import CausalLmModel


@dataclass(frozen=True)
class TextSettings:
    """How text is drawn. `prompt` and `num_tokens` are of models that predict the next token; None: as many
    tokens as a sequence has.

    A masked model fills one sequence.
    """

    prompt: str = ""
    num_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 0.95


def sample_run(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    num: int | None = None,
    seed: int = 0,
    text: TextSettings | None = None,
) -> Path:
    """Samples of a run's last commit, `num` of them, in a file. Returns its path.

    Images make a PNG, one class to a column; latents a .npy file; text a text file. Raises ResumeError if the
    folder holds no run, ConfigError if its model makes nothing, DataError if the prompt has unknown
    characters.
    """
    with open_run(run_dir) as frozen, torch.no_grad():
        model, folder = frozen.model, Path(run_dir)
        if isinstance(model.objective, ImageDenoising):
            latents = isinstance(frozen.plan.recipe.data, LatentArraysData)
            return _images(
                frozen, Path(out or folder / ("samples.npy" if latents else "samples.png")), num, seed
            )
        if isinstance(model.objective, MaskedDenoising | TokenDenoising):
            return _text(frozen, Path(out or folder / "samples.txt"), num or 4, seed, text or TextSettings())
        name = frozen.plan.recipe.model.name
    raise ConfigError(
        f"model.name: '{name}' makes no samples; allowed: dit, masked_lm, causal_lm, recurrent_lm"
    )


def open_run(run_dir: str | os.PathLike[str]) -> FrozenRun:
    """A run's last commit, for drawing from it: a causal model needs every block for every token, so those
    trained alone stay on the device.

    A model trained end to end that did not fit there streams for every token too.

    Raises ResumeError if the folder holds no run.
    """
    run = RunDir(run_dir)
    plan = read_plan(run)
    together = isinstance(plan.recipe.model, CausalLmModel) and plan.recipe.method == "diffusion_blocks"
    return FrozenRun(
        run,
        plan,
        model_builder(plan.recipe, describe_data(plan.recipe.data, plan.recipe.train.seq_len)),
        together,
    )


def draw_tokens(
    frozen: FrozenRun, prompt: Tensor, num_tokens: int, temperature: float, top_p: float, seed: int
) -> Tensor:
    """[B, L + num_tokens] of a text model that goes on from `prompt` [B, L]; of a masked one, which takes no
    prompt, B whole sequences.
    """
    recipe = frozen.plan.recipe
    if isinstance(frozen.model.objective, MaskedDenoising):
        assert recipe.train.seq_len is not None
        num_steps = recipe.train.seq_len if recipe.eval.num_steps == "auto" else recipe.eval.num_steps
        return sampling.sample_tokens(frozen, len(prompt), num_steps, seed, temperature, top_p)
    generate = (
        recurrent.generate if isinstance(frozen.model.objective, RecurrentDenoising) else sampling.generate
    )
    return generate(frozen, prompt, num_tokens, temperature, top_p, seed)


def _text(frozen: FrozenRun, path: Path, num: int, seed: int, settings: TextSettings) -> Path:
    recipe = frozen.plan.recipe
    assert isinstance(recipe.data, TextConfig) and recipe.train.seq_len is not None
    tokenizer = load_tokenizer(recipe.data)
    prompt = torch.tensor(
        [tokenizer.encode(settings.prompt)] * num, dtype=torch.long, device=frozen.device
    ).view(num, -1)
    drawn = draw_tokens(
        frozen,
        prompt,
        settings.num_tokens or recipe.train.seq_len,
        settings.temperature,
        settings.top_p,
        seed,
    )
    texts = [
        f"--- sample {index}, seed {seed}\n{tokenizer.decode(row)}\n"
        for index, row in enumerate(drawn.tolist())
    ]
    path.write_text("".join(texts), encoding="utf-8")
    return path


def _images(frozen: FrozenRun, path: Path, num: int | None, seed: int) -> Path:
    """A PNG grid; of latents, which only their autoencoder makes pictures of, an array [N, C, H, W] in
    float32, as that one gave them.
    """
    num_classes, recipe = int(frozen.model.num_classes), frozen.plan.recipe  # type: ignore[arg-type]
    labels = torch.arange(num or 8 * num_classes) % num_classes
    made = images.sample(frozen, labels, *images.sampling_settings(recipe.eval), seed)
    if isinstance(recipe.data, LatentArraysData):
        with open(path, "wb") as file:
            np.save(file, made.numpy() / np.float32(recipe.data.scale))
    else:
        images.write_grid(made, path, num_classes)
    return path
