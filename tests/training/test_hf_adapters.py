"""LoRA over frozen layers: trained as peft trains it, streamed as resident, and frozen files stay."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_folders import FAMILIES, make_folder
from hf_training import BATCH, STEPS, batches, setting, trained, uncounted
from torch import Tensor

from lowmem.blocks.run_dir import RunDir
from lowmem.errors import ConfigError
from lowmem.models.huggingface.model import HuggingfaceLm
from lowmem.recipe import Recipe
from lowmem.schedule import learning_rate, mix_seed

uncounted_activations = pytest.fixture(autouse=True)(uncounted)
OTHERS = ("gemma2", "gpt_neox", "phi3")
LORA = {"name": "lora", "r": 4, "alpha": 8.0, "base": "float32"}
# one of each kind by default: plain, tied with windows, transposed weights
KINDS = ["llama", "qwen2", "gpt2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]


@pytest.fixture(autouse=True)
def second_matrices_that_are_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that both matrices have gradients from the first step on."""
    draw = HuggingfaceLm.draw_weights

    def drawn(self: HuggingfaceLm, module: torch.nn.Module) -> None:
        draw(self, module)
        for value in getattr(module, "lora_B", {}).values():
            torch.nn.init.normal_(value.weight, std=0.1)

    monkeypatch.setattr(HuggingfaceLm, "draw_weights", drawn)


def peft_loop(folder: Path, recipe: Recipe, kind: str, first: dict[str, Tensor]) -> dict[str, Tensor]:
    """peft's model of transformers' own from the folder, begun with the first adapter's weights."""
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        ours = setting(folder, "device", adapter=LORA)[1]()
    assert isinstance(ours, HuggingfaceLm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FAMILIES[kind].model_class().from_pretrained(folder, dtype=torch.float32)
        model.set_attn_implementation(FAMILIES[kind].attention)
        targets = sorted(ours.peft_config.target_modules)
        config = LoraConfig(
            r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=FAMILIES[kind].transposed
        )
        model = get_peft_model(model, config).train()
    mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
    starts = f"base_model.model.{FAMILIES[kind].body}.{FAMILIES[kind].layers}."
    names = {name: "layers." + name.removeprefix(starts) for name in mine}
    assert set(names.values()) == {name.removesuffix(" weight") for name in first}
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(first[f"{names[name]} weight"])
    betas = recipe.optimizer.betas
    optimizer = torch.optim.AdamW(
        mine.values(), betas=(betas[0], betas[1]), eps=recipe.optimizer.eps, weight_decay=0.1
    )
    for step in range(STEPS):
        torch.manual_seed(mix_seed(recipe.train.seed, "step", 0, step, 0))
        batch = batches(step)
        logits = model(input_ids=batch["tokens"]).logits
        losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        (losses.view(BATCH, -1).sum(1) * batch["share"]).mean().backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, recipe.train)
        optimizer.step()
        optimizer.zero_grad()
    return {f"{names[name]} weight": parameter.detach() for name, parameter in mine.items()}


def adapter_of(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if ".lora_" in name and name.endswith(" weight")}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_trained_as_peft_trains_it_and_streamed_equals_resident(
    kind: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model", kind)
    plan, resident = trained(tmp_path / "resident", folder, "device", adapter=LORA)
    _, streamed = trained(tmp_path / "streamed", folder, "disk", adapter=LORA)
    assert plan.settings.frozen == "float32"
    for name, value in resident.items():
        assert torch.equal(value, streamed[name]), name
    recipe, _ = setting(folder, "device", adapter=LORA)
    _, first = trained(tmp_path / "first", folder, "device", adapter=LORA, train__lr=1e-30)
    theirs = peft_loop(folder, recipe, kind, adapter_of(first))
    for name, value in adapter_of(resident).items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)
        assert not torch.equal(value, first[name]), name


def test_frozen_files_are_never_written_and_hold_the_folders_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    trained(tmp_path / "run", folder, "disk", adapter=LORA)
    state = RunDir(tmp_path / "run").read_state()
    assert state is not None
    assert {key: record.name.split(".")[1] for key, record in state.files.items()} == {
        **{f"block-{n}": "000000" for n in range(3)},
        "base": "000000",
        "shared": "000002",
    }


def test_frozen_weights_in_bf16_are_the_folders_rounded(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    _, exact = trained(tmp_path / "exact", folder, "disk", adapter=LORA)
    _, rounded = trained(tmp_path / "rounded", folder, "disk", adapter={**LORA, "base": "bfloat16"})
    for name, value in exact.items():
        if ".lora_" not in name:
            assert torch.equal(rounded[name], value.bfloat16()), name
    moved = max(float((rounded[n] - v).abs().max()) for n, v in adapter_of(exact).items())
    assert 0 < moved < 0.05


def test_dropout_of_an_adapter_repeats_in_the_backward_pass(tmp_path: Path) -> None:
    folder, adapter = make_folder(tmp_path / "model", "llama"), {**LORA, "dropout": 0.3}
    _, resident = trained(tmp_path / "resident", folder, "device", adapter=adapter)
    _, streamed = trained(tmp_path / "streamed", folder, "disk", adapter=adapter)
    assert all(torch.equal(value, streamed[name]) for name, value in resident.items())


def test_targets_that_match_nothing_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    adapter: dict[str, Any] = {**LORA, "targets": ["query"]}
    with pytest.raises(ConfigError) as caught:
        trained(tmp_path / "run", folder, "disk", adapter=adapter)
    assert str(caught.value) == (
        "adapter.targets: found query; allowed: ends of names of linear modules, such as "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; name some of these"
    )
    assert not (tmp_path / "run").exists()
