"""An image classifier of transformers: its own logits, trained exactly, and a folder again at the end."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import recipe_with
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem.blocks.run_dir import RunDir
from lowmem.data.datasets import DataSpec, describe_data, load_data
from lowmem.errors import ConfigError
from lowmem.inference.evaluate import evaluate_run
from lowmem.inference.export import export_run
from lowmem.machine.profile import load_profile
from lowmem.models import model_builder
from lowmem.models.base import check_model
from lowmem.models.huggingface.families import CLASSIFIERS, config_of
from lowmem.planning.plan import Plan, make_plan
from lowmem.recipe import Recipe
from lowmem.reporting.report import digest
from lowmem.schedule import learning_rate
from lowmem.training.trainer import Trainer

SHAPE: dict[str, Any] = {
    "model_type": "vit",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "initializer_range": 0.2,
    "id2label": {str(n): f"digit {n}" for n in range(10)},
    "label2id": {f"digit {n}": n for n in range(10)},
}
STEPS, BATCH = 4, 16


def library() -> Any:
    return CLASSIFIERS["vit"].model_class()


def folder_of(path: Path, pooled: bool = False, **changes: Any) -> Path:
    """As the library writes it. `pooled`: with weights of a layer that a classifier does not use."""
    torch.manual_seed(0)
    model = library()(config_of({**SHAPE, **changes}, "test"))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases begin as ones and zeros
            torch.nn.init.normal_(parameter, 0.0 if "bias" in name else 1.0, 0.3)
    model.save_pretrained(path)
    if pooled:
        file = path / "model.safetensors"
        save_file({**load_file(file), "vit.pooler.dense.bias": torch.zeros(32)}, file, {"format": "pt"})
    return path


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    overrides: dict[str, Any] = {
        "method": "end_to_end",
        "model": {"name": "huggingface", "path": str(folder)},
        "data": {"name": "digits"},
        "train": {"num_steps": STEPS, "batch_size": BATCH, "micro_batch_size": BATCH, "lr": 1e-3},
        "train__warmup_steps": 2,
        "blocks": {"num_blocks": 3, "visit_steps": 2},
        "optimizer": {"name": "adamw", "grad_clip": None, "weight_decay": 0.1},
        "offload__resident_layers": 0,
        "eval__batch_size": 64,
    }
    return recipe_with(**{**overrides, **changes})


def planned(folder: Path, **changes: Any) -> tuple[Plan, Any]:
    recipe = recipe_of(folder, **changes)
    build = model_builder(recipe, describe_data(recipe.data))
    return make_plan(build, recipe, load_profile("cpu-4gib")), build


def batches(step: int) -> dict[str, Tensor]:
    batch = load_data(recipe_of(Path()).data).batch(0, step, BATCH)
    return {name: torch.as_tensor(values) for name, values in batch.items()}


def trained(run: Path, folder: Path, **changes: Any) -> str:
    plan, build = planned(folder, **changes)
    return digest(Trainer(build, plan, run).fit(batches))


def opened(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library().from_pretrained(folder, dtype=torch.float32)


def plain_loop(folder: Path, recipe: Recipe) -> dict[str, Tensor]:
    """The library's own model and torch's AdamW."""
    model = opened(folder).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    betas = recipe.optimizer.betas
    optimizer = torch.optim.AdamW(groups, betas=(betas[0], betas[1]), eps=recipe.optimizer.eps, fused=True)
    for step in range(STEPS):
        batch = batches(step)
        logits = model(pixel_values=batch["image"]).logits
        F.cross_entropy(logits, batch["label"], reduction="none").mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.train)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_streamed_and_resident_are_the_plain_loop_to_the_bit_and_the_export_opens(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", pooled=True)
    digests = [trained(tmp_path / tier, folder, offload__tier=tier) for tier in ("device", "disk")]
    rests = trained(tmp_path / "rests", folder, offload__tier="disk", offload__shared="tier")
    assert len({*digests, rests}) == 1
    out = export_run(tmp_path / "disk", tmp_path / "out")
    found = dict(opened(out).named_parameters())
    expected = plain_loop(folder, recipe_of(folder))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert json.loads((out / "config.json").read_text())["id2label"]["3"] == "digit 3"


def test_the_figures_before_training_are_those_of_the_librarys_model(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    plan, build = planned(folder)
    Trainer(build, plan, tmp_path / "run").begin()
    found = evaluate_run(tmp_path / "run")
    data = load_data(plan.recipe.data)
    model, right, count = opened(folder), 0, 0
    for batch in data.test_batches(64):
        with torch.no_grad():
            guess = model(pixel_values=torch.as_tensor(batch["image"])).logits.argmax(-1)
        right, count = right + int((guess == torch.as_tensor(batch["label"])).sum()), count + len(guess)
    assert found["metric"] == "accuracy" and found["value"] == pytest.approx(right / count)


def test_with_other_classes_the_head_alone_is_new_and_the_folder_names_them(tmp_path: Path) -> None:
    names = {str(n): f"old {n}" for n in range(7)}
    folder = folder_of(tmp_path / "model", id2label=names, label2id={v: int(k) for k, v in names.items()})
    plan, build = planned(folder)
    Trainer(build, plan, tmp_path / "run").begin()
    found, old = (load_weights(f) for f in (export_run(tmp_path / "run", tmp_path / "out"), folder))
    assert found["classifier.weight"].shape == (10, 32) and found["classifier.weight"].std() > 0.1
    assert all(torch.equal(found[name], old[name]) for name in old if not name.startswith("classifier."))
    model = opened(tmp_path / "out")
    assert model.config.num_labels == 10 and not any("old" in name for name in model.config.label2id)


def load_weights(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_random_weights_are_drawn_and_learn(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    (folder / "model.safetensors").unlink()  # not needed
    more = {"train__num_steps": 60, "train__lr": 3e-3, "blocks__visit_steps": 60, "offload__tier": "device"}
    assert trained(tmp_path / "run", folder, model__weights="random", **more)
    state = RunDir(tmp_path / "run").read_state()
    assert state is not None and state.blocks[0].loss < 2.2  # of ln 10 = 2.30 by chance
    assert evaluate_run(tmp_path / "run")["value"] > 0.5


def test_the_model_may_be_planned_from_its_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    spec = DataSpec(image_shape=(3, 224, 224), num_classes=1000)
    recipe = recipe_of(tmp_path, data={"name": "custom"})
    build = recipe.model.builder(recipe, spec)
    with torch.device("meta"):
        model = build()
    check_model(model)
    assert sum(p.numel() for p in model.parameters()) == 86_567_656  # of ViT-B/16, as published


@pytest.mark.parametrize(
    ("config", "recipe", "message"),
    [
        ({}, {"adapter": {"name": "lora"}}, "found an adapter with an image classifier"),
        ({}, {"model__trainable": "head"}, "found model.trainable head with an image classifier"),
        ({"image_size": 16}, {}, r"takes images of 1 x 16 x 16 .* the data are 1 x 8 x 8"),
        ({"num_channels": 3}, {}, r"takes images of 3 x 8 x 8"),
        ({"patch_size": 0}, {}, "transformers does not build it"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, config: dict[str, Any], recipe: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, **config}))
    with pytest.raises(ConfigError, match=message):
        planned(tmp_path, **recipe)


def test_images_that_the_model_knows_in_another_scale_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.485], "image_std": [0.5]}))
    with pytest.raises(
        ConfigError, match=r"preprocessor_config\.json: image_mean: found \[0\.485\]; allowed"
    ):
        planned(folder)
