"""A user's own layers through `lowmem.wrap`, batches of a DataLoader, and a run opened with `build_model`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, TensorDataset

import lowmem
from lowmem.errors import ConfigError, DataError, LowmemError
from lowmem.recipe import Recipe, TrainConfig
from lowmem.schedule import learning_rate
from lowmem.training.given_batches import LoaderBatches

DIM, ROWS, BATCH = 16, 64, 16
EXAMPLE = torch.zeros(1, 4), torch.zeros(1, dtype=torch.long)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.drop = nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.Dropout(0.1)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.drop(F.gelu(self.up(self.norm(h))))


class Conditioned(Residual):
    def forward(self, h: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        return super().forward(h + cond)


class WithCondition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.cond = nn.Linear(4, DIM), nn.Linear(4, DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.into(x), self.cond(x)


def plain() -> lowmem.BlockModel:
    return lowmem.wrap(
        nn.Linear(4, DIM), [Residual() for _ in range(4)], nn.Linear(DIM, 3), F.cross_entropy, EXAMPLE
    )


def conditioned() -> lowmem.BlockModel:
    layers = [Conditioned() for _ in range(4)]
    return lowmem.wrap(WithCondition(), layers, nn.Linear(DIM, 3), F.cross_entropy, EXAMPLE)


def recipe(**changes: Any) -> Recipe:
    train = {"num_steps": 12, "batch_size": BATCH, "micro_batch_size": 8, "lr": 1e-2, "precision": "float32"}
    return lowmem.recipe_from_dict(
        {
            "schema": 1,
            "method": changes.pop("method", "end_to_end"),
            "model": {"name": "custom"},
            "data": {"name": "custom"},
            "blocks": {"num_blocks": 2, "visit_steps": 4},
            "offload": {"tier": changes.pop("tier", "disk"), "resident_layers": 0},
            "optimizer": {"name": "adamw", "weight_decay": 0.0, "grad_clip": None, "betas": [0.9, 0.95]},
            "train": {**train, **changes},
        },
        "own",
    )


def rows() -> TensorDataset:
    draw = torch.Generator().manual_seed(1)
    label = torch.randint(3, (ROWS,), generator=draw)
    return TensorDataset(torch.randn(ROWS, 4, generator=draw) + F.one_hot(label, 4).float() * 2, label)


def batches(step: int) -> tuple[Tensor, Tensor]:
    first = step * BATCH % ROWS
    x, y = rows().tensors
    return x[first : first + BATCH], y[first : first + BATCH]


def trained(
    folder: Path, build: Callable[[], lowmem.BlockModel], source: Any = batches, **changes: Any
) -> Any:
    plan = lowmem.make_plan(build, recipe(**changes), lowmem.load_profile("cpu-4gib"))
    return lowmem.Trainer(build, plan, folder).fit(source)


def weights_of(folder: Path, state: Any) -> dict[str, Tensor]:
    return {k: v for record in state.files.values() for k, v in load_file(folder / record.name).items()}


@pytest.mark.parametrize("build", [plain, conditioned])
def test_wrapped_layers_are_trained_streamed_to_the_bits_of_a_resident_run(
    tmp_path: Path, build: Callable[[], lowmem.BlockModel]
) -> None:
    found = [
        weights_of(tmp_path / tier, trained(tmp_path / tier, build, tier=tier, micro_batch_size=16))
        for tier in ("disk", "device")
    ]
    assert found[0].keys() == found[1].keys() and found[0]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_wrapped_model_makes_the_steps_of_a_plain_loop(tmp_path: Path) -> None:
    """The first weights are read back from the run; dropout is off, so that both draw nothing."""

    def build() -> lowmem.BlockModel:
        model = plain()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    plan = lowmem.make_plan(build, recipe(), lowmem.load_profile("cpu-4gib"))
    trainer = lowmem.Trainer(build, plan, tmp_path / "run")
    trainer.begin()
    model = build()
    names = dict(model.named_parameters())
    state = trainer.run.read_state()
    first = weights_of(tmp_path / "run", state)
    model.load_state_dict({name: first[name] for name in names})
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(12):
        x, y = batches(step)
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = learning_rate(step, plan.recipe.train)
        h = model.embed(x)
        for layer in model.layers:
            h = layer(h)
        F.cross_entropy(model.head(h), y).backward()
        optimizer.step()
    ours = weights_of(tmp_path / "run", trainer.fit(batches))
    for name, parameter in names.items():
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=2e-4, atol=2e-5, msg=name)


# ------------------------------------------------------------------------------------------------------------
# A DataLoader


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Rows whose transform draws from torch, numpy and Python."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = rows()[index]
        return x + 0.1 * torch.randn(4) + 0.1 * float(np.random.rand()) + 0.1 * random.random(), y


def settings() -> TrainConfig:
    return recipe().train


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loaders_batch_of_a_step_is_the_same_wherever_a_run_begins(workers: int) -> None:
    whole = LoaderBatches(DataLoader(Noisy(), BATCH, shuffle=True), settings())
    straight = [whole(step) for step in range(10)]  # two epochs and a half
    again = LoaderBatches(DataLoader(Noisy(), BATCH, shuffle=True, num_workers=workers), settings())
    torch.manual_seed(77)
    random.seed(77)
    for step in (6, 7, 8, 2, 9, 3):
        assert same(again(step), straight[step]), step
    assert not same(straight[0], straight[4]), "each epoch has an order and draws of its own"
    seen = torch.cat([y for _, y in straight[:4]]).sort().values
    assert torch.equal(seen, rows().tensors[1].sort().values), "an epoch passes every row once"


def test_a_sampler_with_a_generator_of_its_own_draws_the_same_epoch_again() -> None:
    def loader() -> LoaderBatches:
        sampler = RandomSampler(rows(), replacement=True, generator=torch.Generator().manual_seed(5))
        return LoaderBatches(DataLoader(rows(), BATCH, sampler=sampler), settings())

    straight, again = loader(), loader()
    expected = [straight(step) for step in range(6)]
    assert same(again(5), expected[5]) and same(again(1), expected[1])


def test_a_run_from_a_loader_that_is_stopped_goes_on_to_the_same_digest(tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(Noisy(), BATCH, shuffle=True)

    trained(tmp_path / "whole", plain, loader())

    def stop(record: dict[str, Any]) -> None:
        if record["event"] == "step" and record["step"] == 6:
            raise KeyboardInterrupt

    plan = lowmem.make_plan(plain, recipe(), lowmem.load_profile("cpu-4gib"))
    with pytest.raises(KeyboardInterrupt):
        lowmem.Trainer(plain, plan, tmp_path / "stopped", [stop]).fit(loader())
    lowmem.Trainer(plain, plan, tmp_path / "stopped").fit(loader())
    digests = [lowmem.read_report(tmp_path / name).content["digest"] for name in ("whole", "stopped")]
    assert digests[0] == digests[1]


def test_a_loader_leaves_the_programs_generators_as_they_are() -> None:
    loader = LoaderBatches(DataLoader(Noisy(), BATCH, shuffle=True), settings())
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    loader(0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield torch.zeros(4)


class Mine(Sampler[int]):
    def __init__(self) -> None:
        pass

    def __iter__(self) -> Iterator[int]:
        return iter(range(ROWS))

    def __len__(self) -> int:
        return ROWS


@pytest.mark.parametrize(
    "loader, words",
    [
        (DataLoader(Endless(), BATCH), "found Endless"),
        (DataLoader(rows(), batch_size=None), "without batches"),
        (DataLoader(rows(), BATCH, sampler=Mine()), "the sampler Mine"),
        (DataLoader(rows(), 8), "8 batches of 8"),
        (DataLoader(TensorDataset(torch.zeros(BATCH + 1, 4)), BATCH), "the last one smaller"),
    ],
    ids=["endless", "no-batches", "sampler", "size", "short"],
)
def test_a_loader_that_cannot_be_read_again_is_refused_by_name(loader: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        LoaderBatches(loader, settings())
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# What is refused


def given(**arrays: Any) -> Callable[[int], Any]:
    x, y = batches(0)
    return lambda _: {
        name: value for name, value in {"input": x, "target": y, **arrays}.items() if value is not None
    }


@pytest.mark.parametrize(
    "source, words",
    [
        (given(target=None), "'target' is not in it, but input; allowed: input, target"),
        (given(target=torch.zeros(4, dtype=torch.long)), "'target' has 4 rows; allowed: 16"),
        (given(input=torch.zeros(BATCH, 5)), r"rows of shape \[5\]; allowed: at most \[4\]"),
        (given(input=["a"] * BATCH), "found no array of numbers"),
        (lambda _: 5, "found int; allowed: arrays by name"),
    ],
    ids=["missing", "rows", "shape", "words", "no-batch"],
)
def test_a_batch_that_is_not_like_the_example_is_refused_in_one_line(
    tmp_path: Path, source: Callable[[int], Any], words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        trained(tmp_path / "run", plain, source)
    assert "\n" not in str(caught.value) and "step 0" in str(caught.value)


def wrapped(**changes: Any) -> lowmem.BlockModel:
    parts = {"embed": nn.Linear(4, DIM), "layers": [Residual(), Residual()], "head": nn.Linear(DIM, 3)}
    return lowmem.wrap(**{**parts, "loss": F.cross_entropy, "example": EXAMPLE, **changes})


def twice() -> lowmem.BlockModel:
    layer = Residual()
    return wrapped(layers=[layer, layer])


def tied() -> lowmem.BlockModel:
    table, head = nn.Embedding(3, DIM), nn.Linear(DIM, 3)
    head.weight = table.weight
    return wrapped(embed=table, head=head)


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: wrapped(embed=F.gelu), "embed: found"),
        (twice, "hold the same parameter"),
        (tied, "'embed' and 'head' hold the same parameter"),
        (lambda: wrapped(example=(1, 2)), "has no rows"),
        (lambda: wrapped(example=(1, 2, 3)), "found tuple of 3"),
        (lambda: wrapped(loss=lambda out, y: out - 0), r"loss: found numbers of shape \[16, 3\]"),
    ],
    ids=["no-module", "twice", "tied", "no-rows", "triple", "loss"],
)
def test_parts_that_cannot_be_trained_are_refused_in_one_line(build: Any, words: str) -> None:
    with pytest.raises(LowmemError, match=words) as caught:
        lowmem.make_plan(build, recipe(micro_batch_size=16), lowmem.load_profile("cpu-4gib"))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_blocks_of_a_wrapped_model_are_not_trained_alone() -> None:
    with pytest.raises(ConfigError, match="method: found diffusion_blocks"):
        lowmem.make_plan(plain, recipe(method="diffusion_blocks"), lowmem.load_profile("cpu-4gib"))


# ------------------------------------------------------------------------------------------------------------
# A run that is opened again


def test_a_run_is_evaluated_and_exported_with_its_build_model(tmp_path: Path) -> None:
    trained(tmp_path / "run", plain)
    data = DataLoader(rows(), 24)
    found = lowmem.evaluate_run(tmp_path / "run", data, build_model=plain)
    out = lowmem.export_run(tmp_path / "run", tmp_path / "out", build_model=plain)
    model = plain().eval()
    model.load_state_dict({k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()})
    x, y = rows().tensors
    with torch.no_grad():
        h = model.embed(x)
        for layer in model.layers:
            h = layer(h)
        loss = float(F.cross_entropy(model.head(h), y))
    assert found["metric"] == "loss" and found["value"] == pytest.approx(loss, rel=1e-5)


def test_a_run_of_an_own_model_asks_for_its_build_model_and_for_no_other(tmp_path: Path) -> None:
    trained(tmp_path / "run", plain)

    def wider() -> lowmem.BlockModel:
        return wrapped(head=nn.Linear(DIM, 4))

    with pytest.raises(ConfigError, match="build_model: found none, with model.name 'custom'"):
        lowmem.export_run(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ConfigError, match="as the run's"):
        lowmem.export_run(tmp_path / "run", tmp_path / "out", build_model=wider)
    with pytest.raises(ConfigError, match="makes no samples"):
        lowmem.sample_run(tmp_path / "run", build_model=plain)
    with pytest.raises(DataError, match="found no batches"):
        lowmem.evaluate_run(tmp_path / "run", build_model=plain)
    assert not (tmp_path / "out").exists()


def test_torchs_own_transformer_layers_are_given_first_weights() -> None:
    def build() -> lowmem.BlockModel:
        layers = [nn.TransformerEncoderLayer(DIM, 2, 32, batch_first=True) for _ in range(2)]
        return wrapped(layers=layers, embed=nn.Linear(4, DIM), example=EXAMPLE)

    assert lowmem.make_plan(build, recipe(), lowmem.load_profile("cpu-4gib")).fits
