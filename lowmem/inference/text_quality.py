"""How good and how varied generated text is: what an independent judge makes of it, and how much of it
repeats.

A low temperature makes any model's text likelier and duller, so one figure alone says little. The judge is an
ordinary model, trained end to end on the same tokens; it gives nats per token. Distinct-n gives the share of
n-grams that are not repeats. Two models are compared where their texts are equally varied. Distinct-n falls
as a sample grows, so every row has as many tokens as the others.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowmem.blocks.run_dir import RunDir
from lowmem.data.tokenizer import Tokenizer
from lowmem.errors import ConfigError, DataError
from lowmem.inference.evaluation.common import headline
from lowmem.inference.frozen_run import FrozenRun, open_run
from lowmem.inference.kinds import kind_of
from lowmem.inference.sampling import Draw
from lowmem.planning.plan import Plan, read_plan
from lowmem.planning.run_data import own_data, tokenizer_of

NGRAMS = (1, 2, 3, 4)
NUM_TEXTS = 3  # samples of each row that are shown as text
RunPath = str | os.PathLike[str]


def distinct_n(tokens: Tensor, n: int) -> float:
    """The share of the n-grams of tokens [N, L], within each row and over all rows, that are distinct.

    Raises ConfigError if L < n.
    """
    if tokens.shape[1] < n:
        raise ConfigError(
            f"distinct-{n}: found sequences of {tokens.shape[1]} tokens; allowed: at least {n}; give longer "
            "ones, or a smaller n"
        )
    grams = tokens.unfold(1, n, 1).flatten(0, 1)
    return len(torch.unique(grams, dim=0)) / len(grams)


@torch.no_grad()
def judge_nats(judge: FrozenRun, tokens: Tensor) -> Tensor:
    """[N]: mean nats per token of each of tokens [N, L] under the judge, each token given those before it in
    its row.

    Raises ConfigError if the judge is not a causal model trained end to end.
    """
    plan = judge.plan
    _check_judge(plan)
    parts = torch.split(tokens.to(judge.device), plan.recipe.eval.batch_size)
    return judge.losses([{"tokens": part} for part in parts]).cpu()


Curve = Sequence[tuple[float, float]]


class Matched(NamedTuple):
    """Nats per token of two models at one diversity, the middle of what both reach."""

    diversity: float
    nats_a: float
    nats_b: float

    @property
    def difference(self) -> float:
        """Below 0: the judge finds a's text likelier."""
        return self.nats_a - self.nats_b


def at_matched_diversity(curve_a: Curve, curve_b: Curve) -> Matched:
    """Two curves of (diversity, nats per token) points in any order, each joined by straight lines.

    Raises ConfigError if they reach no diversity in common.
    """
    (xs_a, ys_a), (xs_b, ys_b) = _joined(curve_a), _joined(curve_b)
    low, high = max(xs_a[0], xs_b[0]), min(xs_a[-1], xs_b[-1])
    if low > high:
        reached = " and ".join(f"{xs[0]:.4f} to {xs[-1]:.4f}" for xs in (xs_a, xs_b))
        raise ConfigError(
            f"matched diversity: the two reach {reached}; allowed: ranges with a part in common; "
            "draw at more temperatures"
        )
    middle = (low + high) / 2
    return Matched(middle, float(np.interp(middle, xs_a, ys_a)), float(np.interp(middle, xs_b, ys_b)))


def _joined(curve: Curve) -> tuple[list[float], list[float]]:
    """Diversities, ascending, and the mean nats at each."""
    xs = sorted({diversity for diversity, _ in curve})
    return xs, [fmean(nats for diversity, nats in curve if diversity == x) for x in xs]


def judge_runs(
    runs: Sequence[RunPath],
    judge: RunPath,
    num: int,
    temperatures: Sequence[float],
    top_p: float,
    seed: int,
    matched_on: int,
) -> dict[str, Any]:
    """Draws `num` sequences from each text run at each temperature and scores them, beside held-out text.

    One model is in memory at a time. `matched_on` is the n of distinct-n at which each two runs are compared;
    two runs that reach no diversity in common have `refused`, the reason. Raises ConfigError before anything
    is drawn if the runs and the judge do not go together.
    """
    plans = {str(run): read_plan(RunDir(run)) for run in runs}
    judge_plan = read_plan(RunDir(judge))
    _check_together(plans, str(judge), judge_plan)
    seq_len, real = _seq_len(judge_plan), _real_text(judge_plan, num)
    drawn = {
        (run, temperature): tokens
        for run in plans
        for temperature, tokens in _drawn(run, num, seq_len, temperatures, top_p, seed)
    }
    with open_run(judge) as opened:
        score = partial(_figures, opened, _tokenizer(judge_plan))
        rows = {run: [{"temperature": t, **score(drawn[run, t])} for t in temperatures] for run in plans}
        reference = score(real)
    curves = {run: [(row[f"distinct_{matched_on}"], row["nats"]) for row in rows[run]] for run in plans}
    return {
        "judge": str(judge),
        "num_samples": num,
        "seq_len": seq_len,
        "top_p": top_p,
        "seed": seed,
        "real_text": reference,
        "runs": [
            {"run": run, "model": plan.recipe.model.name, "method": plan.recipe.method, "rows": rows[run]}
            for run, plan in plans.items()
        ],
        "matched_on": f"distinct_{matched_on}",
        "at_matched_diversity": [_compared(a, b, curves) for a, b in itertools.combinations(plans, 2)],
    }


def _drawn(
    run: RunPath, num: int, seq_len: int, temperatures: Sequence[float], top_p: float, seed: int
) -> Iterator[tuple[float, Tensor]]:
    """(temperature, tokens [num, seq_len] on the CPU), each."""
    with open_run(run, for_drawing=True) as frozen, torch.no_grad():
        draw_tokens = kind_of(frozen).draw_tokens
        assert draw_tokens is not None, "_check_together has let text models pass alone"
        start = torch.zeros(num, 0, dtype=torch.long, device=frozen.device)
        for temperature in temperatures:
            yield temperature, draw_tokens(frozen, start, seq_len, Draw(temperature, top_p, seed)).cpu()


def _figures(judge: FrozenRun, tokenizer: Tokenizer, tokens: Tensor) -> dict[str, Any]:
    """What the judge makes of tokens [N, L], how varied they are, and the first of them as text."""
    scores = headline(judge_nats(judge, tokens))
    distinct = {f"distinct_{n}": distinct_n(tokens, n) for n in NGRAMS}
    texts = [tokenizer.decode(row) for row in tokens[:NUM_TEXTS].tolist()]
    return {"nats": scores["value"], "nats_std_error": scores["value_std_error"], **distinct, "texts": texts}


def _compared(a: str, b: str, curves: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    try:
        matched = at_matched_diversity(curves[a], curves[b])
    except ConfigError as problem:
        return {"a": a, "b": b, "refused": str(problem)}
    return {"a": a, "b": b, **matched._asdict(), "difference": matched.difference}


def _real_text(plan: Plan, num: int) -> Tensor:
    """[num, L]: windows of the judge's test part, evenly spaced."""
    data = own_data(plan)
    if data.num_test < num:
        raise DataError(
            f"held-out text: found {data.num_test} windows of train.seq_len tokens; allowed: at least the "
            f"{num} samples; lower --num"
        )
    wanted = {index * data.num_test // num for index in range(num)}
    windows = (batch["tokens"] for index, batch in enumerate(data.test_batches(1)) if index in wanted)
    return torch.from_numpy(np.concatenate(list(windows)))


def _check_judge(plan: Plan) -> None:
    recipe = plan.recipe
    if not recipe.whole or recipe.model.name != "causal_lm":
        found = f"method {recipe.method} with model {recipe.model.name}"
        raise ConfigError(
            f"judge: found {found}; allowed: method end_to_end or block_coordinate with model causal_lm; "
            "train such a one on the same text"
        )


def _check_together(plans: dict[str, Plan], judge: str, judge_plan: Plan) -> None:
    """The runs make text of the judge's tokens, in sequences as long as the judge's, and none of them is the
    judge.
    """
    _check_judge(judge_plan)
    length, vocabulary = judge_plan.recipe.train.seq_len, _vocabulary(judge_plan)
    for run, plan in plans.items():
        recipe = plan.recipe
        if os.path.realpath(run) == os.path.realpath(judge):
            raise ConfigError(
                f"judge: {run} is one of the runs it is to judge; allowed: one trained apart; train it with "
                "another seed"
            )
        if recipe.train.seq_len is None or recipe.model.name not in (
            "causal_lm",
            "masked_lm",
            "recurrent_lm",
        ):
            raise ConfigError(
                f"judge: {run} holds model {recipe.model.name}; allowed: causal_lm, masked_lm, recurrent_lm; "
                "leave it out"
            )
        if recipe.train.seq_len != length:
            raise ConfigError(
                f"judge: {run} has train.seq_len {recipe.train.seq_len}; allowed: {length}, the judge's; "
                "train one of them anew"
            )
        found = _vocabulary(plan)
        if found != vocabulary:
            sizes = f"{len(found)} tokens to the judge's {len(vocabulary)}"
            raise ConfigError(
                f"judge: {run} has another vocabulary ({sizes}); allowed: the same; train both on one "
                "tokenizer"
            )


def _seq_len(plan: Plan) -> int:
    assert plan.recipe.train.seq_len is not None, "a recipe of text has it"
    return plan.recipe.train.seq_len


def _tokenizer(plan: Plan) -> Tokenizer:
    tokenizer = tokenizer_of(plan)
    assert tokenizer is not None, "_check_together has let text models pass alone"
    return tokenizer


def _vocabulary(plan: Plan) -> list[str]:
    """What each token stands for."""
    tokenizer = _tokenizer(plan)
    return [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
