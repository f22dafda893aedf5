"""`lowmem sample RUN --chat`: a trained decoder answers, token by token.

Every layer keeps its keys and values on the device, so a token passes the layers once. Where the layers
stream, each token moves all weights once.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from lowmem.data.chat import ChatData
from lowmem.data.chat_tokens import ChatTokenizer
from lowmem.errors import ConfigError
from lowmem.inference.frozen_run import FrozenRun, open_run
from lowmem.inference.sampling import Draw
from lowmem.models.huggingface.model import HuggingfaceLm
from lowmem.objectives.base import Entered
from lowmem.objectives.next_tokens import Calls, NextTokens
from lowmem.schedule import mix_seed
from lowmem.units import format_bytes

NUM_TOKENS = 256  # of an answer at most, where the caller does not say


def chat_run(
    run_dir: str | os.PathLike[str],
    message: str,
    num_tokens: int | None = None,
    temperature: float = 1.0,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """What a run's last commit answers to a message, at most `num_tokens` long.

    `temperature` 0 takes the likeliest token each time. Raises ResumeError if the folder holds no run,
    ConfigError for a run of another kind of model, or an answer too long for the budget, DataError where the
    tokenizer is gone or has changed.
    """
    with open_run(run_dir) as frozen, torch.no_grad():
        section = frozen.plan.recipe.data
        if not isinstance(frozen.model, HuggingfaceLm) or not isinstance(section, ChatData):
            name = frozen.plan.recipe.model.name
            raise ConfigError(f"--chat: found model.name '{name}'; allowed: huggingface; give another run")
        tokenizer = ChatTokenizer(Path(section.tokenizer))
        prompt = tokenizer.prompt([{"role": "user", "content": message}])
        start = torch.tensor([prompt], dtype=torch.long, device=frozen.device)
        wanted = num_tokens or NUM_TOKENS
        drawn = answer(frozen, start, wanted, Draw(temperature, top_p, seed), tokenizer.ends)
    return tokenizer.decode(drawn[0].tolist())


@torch.no_grad()
def answer(frozen: FrozenRun, prompt: Tensor, num_tokens: int, draw: Draw, ends: list[int]) -> Tensor:
    """[B, at most num_tokens] tokens after `prompt` [B, L], L at least 1.

    A row that has come to one of `ends` repeats it. Raises ConfigError where keys and values do not fit.
    """
    model, objective = frozen.parts(HuggingfaceLm, NextTokens)
    _require_room(frozen, model, len(prompt), prompt.shape[1] + num_tokens)
    generator = torch.Generator().manual_seed(mix_seed(draw.seed, "generate"))
    cache, fed, done = model.make_cache(), 0, torch.zeros(len(prompt), 1, dtype=torch.bool)
    new, out = prompt, list[Tensor]()
    for _ in range(num_tokens):
        positions = torch.arange(fed, fed + new.shape[1], device=new.device)[None].expand_as(new)
        h, calls = model.way_in({"tokens": new, "positions": positions}, cache)
        kept, cond = Calls(calls), h.new_zeros(len(h), 1, 1)
        logits = model.logits(_features(frozen, objective, Entered(h, cond, kept))[:, 0]).float()
        fed += new.shape[1]
        following = draw.token(logits, generator)
        new = torch.where(done.to(following.device), out[-1] if out else following, following)
        out.append(new)
        done |= torch.isin(new.cpu(), torch.tensor(ends, dtype=torch.long))
        if bool(done.all()):
            break
    return torch.cat(out, 1)


def _features(frozen: FrozenRun, objective: NextTokens, entered: Entered) -> Tensor:
    """[B, 1, D] of the last token: after all layers, or the mean of blocks that were trained alone."""
    h, cond, kept = entered
    if frozen.plan.recipe.whole:
        for layers in frozen.passed():
            h = objective.through(layers, h, cond, kept)
        return objective.model.output_part(h[:, -1:], cond)
    of_block = [
        objective.model.output_part(objective.through(layers, h, cond, kept)[:, -1:], cond)
        for _, layers in frozen.walk(frozen.blocks)
    ]
    return torch.stack(of_block).mean(0)


def _require_room(frozen: FrozenRun, model: HuggingfaceLm, rows: int, length: int) -> None:
    """The budget has room for a pass of an evaluation. A draw stays within that but for its cache."""
    taken = rows * length * model.cache_bytes_per_token(frozen.dtype)
    room = frozen.room_bytes
    if taken > room:
        raise ConfigError(
            f"--tokens: {length} tokens with the question keep {format_bytes(taken)} of keys and values; "
            f"allowed: {format_bytes(room)}, what the run's budget leaves; lower --tokens"
        )
