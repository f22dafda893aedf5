"""The packaged recipes: each loads, plans and has its twin; those of the paper say what the paper says, and
need no data to be planned.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import pytest
import torch
from conftest import new_cache

from lowmem.data.config import DeclaredImages, TextConfig
from lowmem.data.datasets import describe_data
from lowmem.errors import DataError
from lowmem.job import plan_recipe
from lowmem.models import model_builder
from lowmem.recipe import list_recipes, load_recipe
from lowmem.schema import profiles_dir

TWIN = "-end-to-end"
TOO_BIG = ("too-big-8gib",)  # for 16 GiB: a block of independent blocks is on the device whole


class Printed(NamedTuple):
    """A row of the paper's table of settings (App. E), and what an epoch of its data is."""

    num_layers: int
    dim: int
    num_heads: int
    num_blocks: int
    gamma: float | None
    batch_size: int
    lr: float
    seq_len: int | None
    epochs: int
    epoch_size: float  # images, or tokens


LM1B, OPENWEBTEXT, TEXT8 = 1.06e9, 9_035_582_198, 90e6
PAPER = {
    "paper-cifar100-vit": Printed(12, 128, 4, 3, 0.05, 128, 5e-4, None, 500, 50_000),
    "paper-tiny-imagenet-vit": Printed(12, 768, 12, 2, 0.05, 256, 1e-4, None, 100, 100_000),
    "paper-cifar10-dit": Printed(12, 384, 6, 3, 0.05, 512, 1e-4, None, 100, 50_000),
    "paper-imagenet256-dit": Printed(24, 1024, 16, 3, 0.05, 512, 5e-5, None, 100, 1_281_167),
    "paper-text8-masked": Printed(12, 768, 12, 3, 0.05, 256, 3e-4, 256, 100, TEXT8),
    "paper-lm1b-causal": Printed(12, 768, 12, 4, 0.1, 256, 3e-4, 256, 10, LM1B),
    "paper-openwebtext-causal": Printed(12, 768, 12, 4, 0.1, 256, 3e-4, 1024, 10, OPENWEBTEXT),
    "paper-lm1b-recurrent": Printed(8, 512, 8, 1, None, 256, 3e-4, 256, 15, LM1B),
}
MORE: dict[str, dict[str, Any]] = {  # dotted keys that only some of the experiments have
    "paper-cifar100-vit": {
        "model.patch_size": 4,
        "model.dropout": 0.1,
        "train.lr_schedule": "cosine",
        "train.warmup_steps": 10 * 50_000 // 128,
    },
    "paper-tiny-imagenet-vit": {
        "model.patch_size": 4,
        "data.image_shape": [3, 64, 64],
        "data.num_classes": 200,
    },
    "paper-cifar10-dit": {
        "model.patch_size": 2,
        "model.label_drop": 0.1,
        "eval.num_steps": 50,
        "eval.guidance": 2.0,
    },
    "paper-imagenet256-dit": {
        "model.patch_size": 2,
        "model.label_drop": 0.1,
        "eval.num_steps": 50,
        "eval.guidance": 2.0,
        "data.num_classes": 1000,
    },
    "paper-text8-masked": {
        "model.mask_schedule": "linear",
        "train.warmup_steps": 2000,
        "optimizer.weight_decay": 0.03,
    },
    "paper-lm1b-causal": {"train.warmup_steps": 2500, "data.vocab_size": 32_000},
    "paper-openwebtext-causal": {"train.warmup_steps": 2500, "data.vocab_size": 32_000},
    "paper-lm1b-recurrent": {
        "model.prelude_layers": 2,
        "model.coda_layers": 2,
        "model.iterations": 32,
        "model.backprop_iterations": 8,
    },
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", new_cache(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens data, or loads the library that fetches them, fails."""

    def opened(*_: Any) -> None:
        raise AssertionError("data were opened")

    monkeypatch.setattr(TextConfig, "open", opened)
    monkeypatch.setattr(DeclaredImages, "open", opened)
    monkeypatch.setitem(sys.modules, "datasets", None)


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_says_what_it_is_and_its_twin_differs_in_the_method_alone(name: str) -> None:
    assert (profiles_dir("recipes") / f"{name}.yaml").read_text().startswith("# ")
    base = name.removesuffix(TWIN)
    blocks, whole = (load_recipe(each).to_dict() for each in (base, base + TWIN))
    assert (blocks.pop("method"), whole.pop("method")) == ("diffusion_blocks", "end_to_end")
    assert blocks == whole


@pytest.mark.parametrize("name", [name for name in list_recipes() if not name.startswith("paper-")])
def test_a_recipe_plans_or_says_which_file_it_needs(name: str) -> None:
    if load_recipe(name).data.name == "idx_images":
        with pytest.raises(DataError, match="data/fashion_mnist"):
            plan_recipe(name, "cpu-16gib")
    else:
        assert plan_recipe(name, "cpu-16gib").fits == (name not in TOO_BIG)


def test_a_billion_parameters_fit_3_gib_from_disk_by_either_method_and_not_with_all_blocks_at_once() -> None:
    plans = [plan_recipe(name, "cpu-3gib") for name in ("too-big-cpu", "too-big-cpu" + TWIN)]
    assert (
        all(plan.fits and plan.settings.tier == "disk" for plan in plans) and plans[0].num_parameters > 10**9
    )
    assert plans[0].predicted.traffic is None and plans[1].predicted.traffic is not None
    assert not plan_recipe("too-big-cpu" + TWIN, "cpu-3gib", ["offload.tier=device"]).fits


def test_seven_billion_parameters_fit_an_8_gib_card_by_either_method_and_not_with_all_blocks_at_once() -> (
    None
):
    plans = [plan_recipe(name, "cuda-8gib-host-24gib") for name in ("too-big-8gib", "too-big-8gib" + TWIN)]
    assert all(plan.fits for plan in plans) and plans[0].num_parameters > 7 * 10**9
    assert not plan_recipe("too-big-8gib" + TWIN, "cuda-8gib-host-24gib", ["offload.tier=device"]).fits


def test_every_experiment_of_the_paper_has_its_recipe() -> None:
    assert (
        {name.removesuffix(TWIN) for name in list_recipes() if name.startswith("paper-")}
        == set(PAPER)
        == set(MORE)
    )


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_recipe_has_the_papers_settings(name: str) -> None:
    recipe, printed = load_recipe(name).to_dict(), PAPER[name]
    model, blocks, train = recipe["model"], recipe["blocks"], recipe["train"]
    assert [model[key] for key in ("num_layers", "dim", "num_heads")] == [
        printed.num_layers,
        printed.dim,
        printed.num_heads,
    ]
    assert blocks["num_blocks"] == printed.num_blocks
    assert printed.gamma in (None, blocks["overlap_gamma"])
    assert [train[key] for key in ("batch_size", "lr", "seq_len")] == [
        printed.batch_size,
        printed.lr,
        printed.seq_len,
    ]
    per_step = printed.batch_size * (printed.seq_len or 1)
    assert train["num_steps"] == pytest.approx(printed.epochs * printed.epoch_size / per_step, abs=1)
    noise = {
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "sigma_data": 0.5,
        "p_mean": -1.2,
        "p_std": 1.2,
        "sigma_max_share": 0.0,
    }
    assert {key: recipe["noise"][key] for key in noise} == noise
    assert (model.get("noisy_input", "scaled"), model.get("readout", "plain")) == ("scaled", "plain")
    for dotted, value in MORE[name].items():
        section, key = dotted.split(".")
        assert recipe[section][key] == value, dotted


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_recipe_plans_without_its_data_and_fits_8_gib(name: str, no_data: None) -> None:
    plan = plan_recipe(name, "rtx-4060-laptop-8gb", ["train.micro_batch_size=1", "train.recompute=true"])
    assert plan.fits and plan.settings.num_blocks == PAPER[name].num_blocks
    twin = load_recipe(name + TWIN)
    with torch.device("meta"):
        model = model_builder(twin, describe_data(twin.data, twin.train.seq_len))()
    assert sum(p.numel() for p in model.parameters()) == plan.num_parameters


@pytest.mark.slow
def test_the_largest_model_of_the_paper_fits_8_gib_in_blocks_or_streamed_alone(no_data: None) -> None:
    smallest = ["train.micro_batch_size=1", "train.recompute=true"]
    assert not plan_recipe(
        "paper-imagenet256-dit-end-to-end", "rtx-4060-laptop-8gb", [*smallest, "offload.tier=device"]
    ).fits
    assert (
        plan_recipe("paper-imagenet256-dit-end-to-end", "rtx-4060-laptop-8gb", smallest).settings.tier
        == "host"
    )
    assert plan_recipe("paper-imagenet256-dit-end-to-end", "rtx-3090-24gb", smallest).fits
