"""`lowmem sample`: what a finished run makes, written to a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from lowmem.data.config import LatentArraysData
from lowmem.errors import ConfigError, DataError
from lowmem.inference.frozen_run import FrozenRun, open_run, spans
from lowmem.inference.kinds import kind_of
from lowmem.inference.sampling import Draw, rows_at_once
from lowmem.models.base import BuildModel
from lowmem.planning.run_data import tokenizer_of
from lowmem.reporting.output import check_output, write_output
from lowmem.schedule import mix_seed
from lowmem.units import shown

NUM_TEXTS = 4  # where the caller does not say


@dataclass(frozen=True)
class TextSettings:
    """How text is drawn.

    `prompt` and `num_tokens` are for models that predict the next token; None means as many tokens as a
    sequence has. A masked model fills one sequence.
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
    build_model: BuildModel | None = None,
) -> Path:
    """Samples of a run's last commit, `num` of them, in a file. Returns its path.

    Images make a PNG, one class to a column; latents a .npy file; text a text file. `build_model`: of a model
    of your own, which draws images. Raises ResumeError if the folder holds no run, ConfigError if its model
    makes nothing, DataError if the prompt has unknown characters.
    """
    with open_run(run_dir, True, build_model) as frozen, torch.no_grad():
        kind, folder = kind_of(frozen), Path(run_dir)
        if kind.write_images is not None:
            latents = isinstance(frozen.plan.recipe.data, LatentArraysData)
            path = Path(out or folder / ("samples.npy" if latents else "samples.png"))
            check_output(path, "--out")
            kind.write_images(frozen, path, num, seed)
            return path
        if kind.draw_tokens is not None and build_model is None:  # no tokenizer is known of another
            return _text(
                frozen, Path(out or folder / "samples.txt"), num or NUM_TEXTS, seed, text or TextSettings()
            )
        name = frozen.plan.recipe.model.name
    raise ConfigError(
        f"model.name: '{name}' makes no samples; allowed: dit, masked_lm, causal_lm, recurrent_lm, and "
        "huggingface with --chat"
    )


def _text(frozen: FrozenRun, path: Path, num: int, seed: int, settings: TextSettings) -> Path:
    recipe, draw_tokens = frozen.plan.recipe, kind_of(frozen).draw_tokens
    check_output(path, "--out")
    if settings.prompt != settings.prompt.encode("utf-8", "replace").decode():
        raise DataError(
            f"--prompt: found '{shown(settings.prompt, 100)}', which is no UTF-8; give text in UTF-8"
        )
    tokenizer = tokenizer_of(frozen.plan)
    assert tokenizer is not None and recipe.train.seq_len is not None and draw_tokens is not None
    rows = [tokenizer.encode(settings.prompt)] * num
    prompt = torch.tensor(rows, dtype=torch.long, device=frozen.device).view(num, -1)
    wanted, drawn = settings.num_tokens or recipe.train.seq_len, list[list[int]]()
    for start, stop in spans(num, rows_at_once(frozen, prompt.shape[1] + wanted)):
        # rows beyond those that fit are a draw of their own
        own_seed = seed if start == 0 else mix_seed(seed, "rows", start)
        draw = Draw(settings.temperature, settings.top_p, own_seed)
        drawn += draw_tokens(frozen, prompt[start:stop], wanted, draw).tolist()
    texts = [f"--- sample {index}, seed {seed}\n{tokenizer.decode(row)}\n" for index, row in enumerate(drawn)]
    return write_output(path, "".join(texts).encode("utf-8", "replace"), "--out")
