"""A decoder from a folder in blocks that are trained alone: unchanged layers, the Bayes read-out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_folders import BYTES_VOCAB, FAMILIES, make_folder, make_tokenizer
from hf_training import batches, setting, trained
from safetensors.torch import load_file
from torch import Tensor, nn

import lowmem
from lowmem.inference.chat import chat_run
from lowmem.noise import Interval, drawn_levels
from lowmem.objectives.block_tokens import BlockTokens


def in_blocks(folder: Path, tier: str = "device", **overrides: Any) -> Any:
    model = {"name": "huggingface", "path": str(folder), "weights": "random"}
    return setting(folder, tier, **{"method": "diffusion_blocks", "model": model, **overrides})


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_blocks_loss_is_that_of_the_librarys_own_layers_with_the_analytic_term(
    tmp_path: Path, kind: str
) -> None:
    """The library's model is built with the layers of the block alone, and given the same weights."""
    folder = make_folder(tmp_path / "model", kind)
    _, build = in_blocks(folder)
    model, family = build(), FAMILIES[kind]
    whole = family.model_class().from_pretrained(folder, dtype=torch.float32).eval()
    whole.set_attn_implementation(family.attention)
    model.load_state_dict(
        {ours: whole.get_parameter(theirs).detach() for ours, theirs in model.file_names().items()}
    )
    model.eval()
    recipe, chosen = in_blocks(folder)[0], range(1, len(model.layers))
    objective, batch = model.make_objective(recipe.noise), batches(0)
    assert isinstance(objective, BlockTokens)
    interval = Interval(0.5, 20.0)
    torch.manual_seed(5)
    found = objective.block_loss([model.layers[i] for i in chosen], batch, interval)
    body = getattr(whole, family.body)
    for index in range(len(model.layers)):
        if index not in chosen:
            getattr(body, family.layers)[index] = Through()
    labels = batch["labels"]
    torch.manual_seed(5)
    sigma = drawn_levels(labels.shape, labels.device, interval, objective.noise)
    with torch.no_grad():
        table = body.get_input_embeddings().weight
        unit = table / table.norm(dim=-1, keepdim=True).clamp_min(0.01)
        y = unit[labels.clamp_min(0)]
        z = y + sigma[..., None] * torch.randn_like(y)
        logits = whole(input_ids=batch["tokens"]).logits.float() + z @ unit.T / sigma[..., None] ** 2
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    torch.testing.assert_close(found, losses.sum(1) * batch["share"], rtol=1e-5, atol=1e-6)


class Through(nn.Module):
    attention_type = "full_attention"

    def forward(self, h: Tensor, *_: Any, **__: Any) -> Tensor:
        return h


def test_blocks_that_come_from_disk_end_with_the_bits_of_resident_ones(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    model = {"name": "huggingface", "path": str(folder), "weights": "random"}
    found = [
        trained(tmp_path / tier, folder, tier, method="diffusion_blocks", model=model)[1]
        for tier in ("device", "disk")
    ]
    assert found[0].keys() == found[1].keys() and len(found[0]) > 30
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small decoder in two blocks, on rows whose answers follow from the question."""
    root = tmp_path_factory.mktemp("blocks")
    folder = make_tokenizer(make_folder(root / "model", "llama", vocab_size=BYTES_VOCAB))
    rows = root / "rows.jsonl"
    lines = [{"prompt": f"q{n % 4}", "completion": "abcd"[n % 4] * 3} for n in range(60)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sets = [
        "method=diffusion_blocks",
        "model.weights=random",
        "train.num_steps=60",
        "train.seq_len=64",
        "train.batch_size=8",
        "train.lr=0.01",
        "blocks.num_blocks=2",
        "blocks.visit_steps=30",
    ]
    return lowmem.finetune(folder, rows, "cpu-4gib", root / "run", sets)


def test_its_blocks_learn_from_the_tokens_and_not_from_the_noise_alone(run: Path) -> None:
    metrics = lowmem.read_report(run).content["metrics"]
    assert metrics["value"] < 2.5, "below ln 258 = 5.6 of an untrained model"
    assert len(metrics["per_block"]) == 2 and metrics["sigma_max_ce"] == metrics["value"]
    levels = sorted(metrics["levels"], key=lambda level: level["sigma"])
    assert levels[0]["ce"] < 0.05, "at the lowest level z tells the token"
    assert levels[-1]["ce"] < levels[-1]["ce_shuffled"], "at the highest the context tells it"


def test_it_answers_and_is_written_as_plain_files(run: Path, tmp_path: Path) -> None:
    assert isinstance(chat_run(run, "q1", num_tokens=3, seed=0), str)
    out = lowmem.export_run(run, tmp_path / "out")
    assert not (out / "config.json").exists()
    names = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert "norm.weight" in names and any(name.startswith("layers.0.") for name in names)


def test_the_joint_prediction_is_the_mean_of_the_blocks_features(run: Path) -> None:
    """Computed from the exported weights, block after block, beside the run's own figure."""
    from lowmem.inference.frozen_run import open_run
    from lowmem.planning.run_data import own_data

    with open_run(run) as frozen, torch.no_grad():
        batch = next(own_data(frozen.plan).test_batches(1000))
        rows = {name: torch.from_numpy(value) for name, value in batch.items()}
        features = [frozen.objective.features(layers, rows) for _, layers in frozen.walk(frozen.blocks)]
        logits = frozen.model.logits(sum(features) / len(features))
        loss = F.cross_entropy(logits.flatten(0, 1), rows["labels"].flatten(), ignore_index=-100)
    assert lowmem.read_report(run).content["metrics"]["value"] == pytest.approx(float(loss), rel=1e-5)
