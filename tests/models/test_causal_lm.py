"""The autoregressive model: who sees whom, the cache, the Bayes read-out, and the loss in chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import recipe_with, with_weights

from lowmem.blocks.run_dir import RunDir
from lowmem.inference.frozen_run import FrozenRun
from lowmem.inference.sampling import Draw, generate
from lowmem.machine.profile import load_profile
from lowmem.models.causal_lm import CausalLm
from lowmem.models.layers import clean_noisy_attention
from lowmem.models.sections import CausalLmModel
from lowmem.noise import Interval, drawn_levels
from lowmem.objectives.tokens import TokenDenoising
from lowmem.planning.plan import make_plan
from lowmem.recipe import NoiseConfig, Recipe
from lowmem.reporting.report import digest
from lowmem.training.trainer import Trainer

NOISE = NoiseConfig()
VOCAB, LENGTH = 11, 12


def config(**changes: Any) -> CausalLmModel:
    return CausalLmModel(
        **{"name": "causal_lm", "num_layers": 4, "dim": 16, "num_heads": 2, "head_chunk": 7, **changes}
    )


def built(whole: bool = False, **changes: Any) -> CausalLm:
    """Random everywhere, also where training starts from zero."""
    torch.manual_seed(0)
    model = with_weights(CausalLm(config(**changes), VOCAB, LENGTH, whole), std=0.2)
    return model.eval()


def objective_of(model: CausalLm) -> TokenDenoising:
    return model.make_objective(NOISE)


def block_logits(model: CausalLm, tokens: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    objective = objective_of(model)
    features = objective.features(model.layers[:2], {"tokens": tokens}, z, sigma)
    return objective.logits(features.flatten(0, 1), z.flatten(0, 1), sigma.flatten()).view(*tokens.shape, -1)


@pytest.mark.parametrize("noisy_input", ["scaled", "posterior", "none"])
def test_check_7_changing_clean_token_i_changes_noisy_logits_after_i_and_none_before(
    noisy_input: str,
) -> None:
    model = built(noisy_input=noisy_input)
    tokens, z, sigma = (
        torch.randint(VOCAB, (2, LENGTH)),
        torch.randn(2, LENGTH, 16),
        torch.full((2, LENGTH), 1.0),
    )
    before = block_logits(model, tokens, z, sigma)
    for i in (0, 5, LENGTH - 2):
        changed = tokens.clone()
        changed[:, i] = (changed[:, i] + 1) % VOCAB
        difference = (block_logits(model, changed, z, sigma) - before).abs().amax(dim=(0, 2))
        assert difference[: i + 1].max() == 0
        assert difference[i + 1 :].min() > 0


@pytest.mark.parametrize("noisy_input", ["scaled", "posterior", "none"])
def test_a_noisy_token_is_seen_by_itself_alone(noisy_input: str) -> None:
    model = built(noisy_input=noisy_input)
    tokens, z, sigma = (
        torch.randint(VOCAB, (2, LENGTH)),
        torch.randn(2, LENGTH, 16),
        torch.full((2, LENGTH), 1.0),
    )
    before = block_logits(model, tokens, z, sigma)
    z[:, 4] += 1.0
    difference = (block_logits(model, tokens, z, sigma) - before).abs().amax(dim=(0, 2))
    assert difference[4] > 0
    assert difference[:4].max() == 0 and difference[5:].max() == 0


def test_end_to_end_the_model_is_an_ordinary_causal_one() -> None:
    model = built(whole=True)
    tokens = torch.randint(VOCAB, (2, LENGTH))
    h, cond = model.input_part({"tokens": tokens}, None, None)

    def logits(h: torch.Tensor) -> torch.Tensor:
        for layer in model.layers:
            h = layer(h, cond)
        return model.head(model.output_part(h, cond))

    before = logits(h)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    difference = (
        (logits(model.input_part({"tokens": changed}, None, None)[0]) - before).abs().amax(dim=(0, 2))
    )
    assert difference[:6].max() == 0 and difference[6:].min() > 0


def test_attention_over_two_halves_equals_one_masked_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 2 * LENGTH, 8) for _ in range(3))
    index = torch.arange(LENGTH)
    clean = torch.cat([index[:, None] >= index, torch.zeros(LENGTH, LENGTH, dtype=torch.bool)], 1)
    noisy = torch.cat([index[:, None] > index, index[:, None] == index], 1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.cat([clean, noisy]))
    assert torch.allclose(clean_noisy_attention(q, k, v), expected, atol=1e-6)


def test_bayes_rule_factorises_so_the_best_network_needs_no_z() -> None:
    """p(y | z) under a known prior equals the read-out softmax(log prior + E z / sigma^2), by the Gaussian
    densities themselves.
    """
    torch.manual_seed(0)
    table = F.normalize(torch.randn(VOCAB, 16, dtype=torch.float64), dim=-1)
    prior = torch.rand(VOCAB, dtype=torch.float64).softmax(0)
    z, sigma = torch.randn(5, 16, dtype=torch.float64), 0.7
    density = -((z[:, None] - table) ** 2).sum(-1) / (2 * sigma**2)
    assert torch.allclose(
        (density + prior.log()).softmax(-1), (prior.log() + z @ table.T / sigma**2).softmax(-1), atol=1e-12
    )


def test_the_loss_in_chunks_equals_the_loss_at_once_and_so_do_its_gradients() -> None:
    results = []
    for chunk in (7, 10_000):
        model = built(head_chunk=chunk)
        torch.manual_seed(1)
        batch = {"tokens": torch.arange(24).view(2, 12) % VOCAB}
        loss = objective_of(model).block_loss(model.layers[:2], batch, Interval(0.1, 5.0))
        loss.mean().backward()
        results.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("weighting", ["edm", "none", "auto"])
def test_the_weighting_of_a_text_is_that_of_each_tokens_own_level(weighting: Any) -> None:
    noise = NoiseConfig(weighting=weighting)
    model, interval = built(), Interval(0.2, 5.0)
    objective = model.make_objective(noise)
    tokens = torch.arange(24).view(2, 12) % VOCAB
    torch.manual_seed(3)
    loss = objective.block_loss(model.layers[:2], {"tokens": tokens}, interval)
    torch.manual_seed(3)
    sigma = drawn_levels(tokens.shape, tokens.device, interval, noise)
    y = F.embedding(tokens, model.target_table())
    z = y + sigma[..., None] * torch.randn_like(y)
    ce = F.cross_entropy(block_logits(model, tokens, z, sigma).transpose(1, 2), tokens, reduction="none")
    weight = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2 if weighting == "edm" else torch.ones_like(sigma)
    assert torch.allclose(loss, (ce * weight).mean(1), rtol=1e-5)
    assert weight.max() > 2 * weight.min() or weighting != "edm"


def tiny(method: str, noisy_input: str = "posterior", **overrides: Any) -> Recipe:
    model = {"name": "causal_lm", "num_layers": 4, "dim": 32, "num_heads": 2, "noisy_input": noisy_input}
    changes = {
        "model": model,
        "data": {"name": "custom"},
        "train__seq_len": LENGTH,
        "train__num_steps": 4,
        "blocks__visit_steps": 2,
    }
    return recipe_with(
        **{
            "method": method,
            "blocks__num_blocks": 2,
            "train__batch_size": 8,
            "train__warmup_steps": 0,
            **changes,
            **overrides,
        }
    )


def train(folder: Path, recipe: Recipe, num_steps: int | None = None) -> Any:
    assert isinstance(recipe.model, CausalLmModel)
    settings = recipe.model

    def build() -> CausalLm:
        return CausalLm(settings, VOCAB, LENGTH, recipe.method == "end_to_end")

    def batches(step: int) -> dict[str, torch.Tensor]:
        """Counting upwards modulo the vocabulary, from a random start."""
        first = torch.randint(VOCAB, (8, 1), generator=torch.Generator().manual_seed(step))
        return {"tokens": (first + torch.arange(LENGTH)) % VOCAB}

    plan = make_plan(build, recipe, load_profile("cpu-4gib"))
    return build, plan, Trainer(build, plan, folder).fit(batches)


@pytest.mark.parametrize(
    ("method", "noisy_input"),
    [("diffusion_blocks", "posterior"), ("diffusion_blocks", "none"), ("end_to_end", "none")],
)
def test_a_trained_model_continues_and_its_cache_changes_nothing(
    tmp_path: Path, method: str, noisy_input: str
) -> None:
    changes = {
        "train__num_steps": 120,
        "blocks__visit_steps": 30,
        "train__lr": 5e-3,
        "noise__sigma_max_share": 0.5,
    }
    recipe = tiny(method, noisy_input=noisy_input, **changes)
    build, plan, _ = train(tmp_path / "run", recipe)
    with FrozenRun(RunDir(tmp_path / "run"), plan, build, for_drawing=True) as frozen:
        prompt = torch.tensor([[3, 4, 5], [9, 10, 0]])
        cached = generate(frozen, prompt, 8, Draw(temperature=1e-4))
        uncached = generate(frozen, prompt, 8, Draw(temperature=1e-4), use_cache=False)
    assert torch.equal(cached, uncached)
    assert cached[0].tolist() == [(3 + i) % VOCAB for i in range(11)]
    assert cached[1].tolist() == [(9 + i) % VOCAB for i in range(11)]


@pytest.mark.parametrize("noisy_input", ["posterior", "none"])
def test_logits_from_the_cache_equal_those_of_the_training_pass(noisy_input: str) -> None:
    from lowmem.inference.sampling import _advance
    from lowmem.models.layers import KeyValueCache

    model = built(noisy_input=noisy_input)
    objective = objective_of(model)
    tokens, z = torch.randint(VOCAB, (2, LENGTH)), torch.randn(2, LENGTH, 16) * NOISE.sigma_max
    whole = block_logits(model, tokens, z, torch.full((2, LENGTH), NOISE.sigma_max))
    caches = [KeyValueCache() for _ in range(2)]
    fed, start = 0, torch.full((2, 1), VOCAB)
    for position in range(LENGTH):
        seen = torch.cat([start, tokens[:, :position]], 1) if model.one_stream else tokens[:, :position]
        with torch.no_grad():
            logits = _advance(
                model,
                objective,
                list(model.layers[:2]),
                caches,
                seen,
                fed,
                z[:, position : position + 1],
            )
        fed = seen.shape[1]
        assert (logits - whole[:, position]).abs().max() < 1e-5


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_tier_gives_the_same_digest(tmp_path: Path, precision: str) -> None:
    digests = set()
    for tier in ("device", "disk"):
        recipe = tiny(
            "diffusion_blocks", offload__tier=tier, train__precision=precision, optimizer__name="adamw8bit"
        )
        digests.add(digest(train(tmp_path / tier, recipe)[2]))
    assert len(digests) == 1


def test_without_a_noisy_input_a_block_trained_at_sigma_max_alone_is_an_ordinary_shallow_model() -> None:
    """Same layers, same tokens: the block's loss is the end-to-end model's of those layers, up to the
    evidence of pure noise.
    """
    noise = NoiseConfig(sigma_max=1e4, sigma_max_share=1.0)
    block, whole = built(noisy_input="none"), built(whole=True)
    batch = {"tokens": torch.randint(VOCAB, (4, LENGTH))}
    drawn = block.make_objective(noise).block_loss(block.layers[:2], batch, Interval(0.1, 1e4))
    ordinary = whole.make_objective(noise).end_to_end_loss(whole.layers[:2], batch)
    assert torch.allclose(drawn, ordinary, atol=1e-3)


@pytest.mark.parametrize("noisy_input", ["posterior", "none"])
def test_an_evaluation_shows_the_chain_beside_the_oracle_and_the_joint_prediction(
    tmp_path: Path, noisy_input: str
) -> None:
    from lowmem.data.text import TextDataset
    from lowmem.inference.evaluation.tokens import evaluate

    recipe = tiny(
        "diffusion_blocks",
        noisy_input,
        train__num_steps=120,
        train__lr=5e-3,
        noise__schedule="balanced",
        noise__sigma_max_share=0.5,
    )
    build, plan, _ = train(tmp_path / "run", recipe)
    text = (torch.arange(40 * LENGTH) % VOCAB).numpy()
    with FrozenRun(RunDir(tmp_path / "run"), plan, build) as frozen, torch.no_grad():
        metrics = evaluate(frozen, TextDataset(text, text, LENGTH, VOCAB, "text"))  # type: ignore[arg-type]
    first, last = metrics["chain"]
    assert (first["sigma"], first["block"]) == (NOISE.sigma_max, 0) and (last["sigma"], last["block"]) == (
        NOISE.sigma_min,
        1,
    )
    assert first["ce"] == pytest.approx(metrics["per_block"][0]["sigma_max_ce"], abs=1e-5), (
        "the chain begins as a plain prediction"
    )
    assert last["oracle_ce"] < 1e-3 and last["oracle_cosine"] > 0.99, (
        "at sigma_min the token is read off the true z"
    )
    assert last["ce"] >= last["oracle_ce"]
    assert first["ce_shuffled"] > first["ce"] + 0.1
    blocks = [block["sigma_max_ce"] for block in metrics["per_block"]]
    assert metrics["value"] == metrics["sigma_max_ce"] <= max(blocks)


def test_the_mean_of_the_blocks_features_gives_the_mean_of_their_log_probabilities() -> None:
    """The head is linear, so the joint prediction needs one feature vector for each token, whatever the
    number of blocks and tokens' kinds.
    """
    model = built(noisy_input="none")
    objective, batch = objective_of(model), {"tokens": torch.randint(VOCAB, (3, LENGTH))}
    z, sigma = torch.randn(3, LENGTH, 16), torch.full((3, LENGTH), 2.0)
    with torch.no_grad():
        parts = [objective.features(model.layers[i : i + 2], batch, z, sigma) for i in (0, 2)]
        flat = [
            objective.logits(part.flatten(0, 1), z.flatten(0, 1), sigma.flatten()).log_softmax(-1)
            for part in parts
        ]
        expected = F.cross_entropy(
            torch.stack(flat).mean(0), batch["tokens"].flatten(), reduction="none"
        ).view(3, LENGTH)
        assert torch.allclose(
            objective.predictions(torch.stack(parts).mean(0), batch["tokens"], z, sigma)[0],
            expected,
            atol=1e-5,
        )
