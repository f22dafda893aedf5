"""Exact back-propagation with blocks that come and go: the bits of plain autograd from every tier, and the bytes that the plan names."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recipe_with
from safetensors.torch import load_file
from torch import Tensor, nn

from lowmem import trainer as trainer_module
from lowmem.borders import AwayBorders, BorderBytes, Borders, border_bytes, border_calls
from lowmem.config import Recipe
from lowmem.duration import Work
from lowmem.evaluation import images, labels, masked, recurrent, tokens
from lowmem.hardware import load_profile
from lowmem.models.base import Batch, BlockModel, BuildModel
from lowmem.models.causal_lm import CausalLm
from lowmem.models.dit import Dit
from lowmem.models.layers import Layer, Table, TimeEmbedding
from lowmem.models.masked_lm import MaskedLm
from lowmem.models.recurrent_lm import RecurrentLm
from lowmem.models.vit import Vit
from lowmem.noise import Interval, sample_sigma
from lowmem.objectives.tokens import TokenDenoising
from lowmem.passes import Pass, PassCounter
from lowmem.plan import Plan, make_plan
from lowmem.report import digest, read_report
from lowmem.run_dir import RunDir, RunState
from lowmem.sampler import FrozenRun
from lowmem.schedule import learning_rate, mix_seed
from lowmem.store import HostStore
from lowmem.stream import BlockStream
from lowmem.trainer import Trainer
from lowmem.weights import layouts_by_key

VOCAB, LENGTH, CLASSES, SIDE = 32, 12, 16, 8  # widths that fill vector registers: in a rest of one torch rounds otherwise
SIZES: dict[str, Any] = {"num_layers": 5, "dim": 32, "num_heads": 2, "mlp_ratio": 3, "dropout": 0.1}
RECURRENT = {**SIZES, "prelude_layers": 2, "coda_layers": 1, "iterations": 4, "backprop_iterations": 3, "head_chunk": 17}
MODELS: dict[str, tuple[dict[str, Any], Callable[[Any], BlockModel]]] = {
    "vit": ({**SIZES, "patch_size": 4}, lambda c: Vit(c, (1, SIDE, SIDE), CLASSES)),
    "dit": ({**SIZES, "patch_size": 4}, lambda c: Dit(c, (1, SIDE, SIDE), CLASSES)),
    "masked_lm": ({**SIZES, "head_chunk": 17}, lambda c: MaskedLm(c, VOCAB, LENGTH)),
    "causal_lm": ({**SIZES, "noisy_input": "none", "head_chunk": 17}, lambda c: CausalLm(c, VOCAB, LENGTH, whole=True)),
    "recurrent_lm": (RECURRENT, lambda c: RecurrentLm(c, VOCAB, LENGTH)),
}
BATCH, STEPS = 8, 10


class Tied(BlockModel):
    """One table of words: the way in and, transposed, the way out."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = VOCAB
        self.words = Table(VOCAB, 32, std=0.3)
        self.time = TimeEmbedding(32)
        self.layers = nn.ModuleList(Layer(32, 2, 3, 0.1, "causal", llama=True) for _ in range(5))
        self.objective = TiedLoss("none", "plain", head_chunk=17)

    def example_batch(self, batch_size: int) -> Batch:
        return {"tokens": torch.zeros(batch_size, LENGTH, dtype=torch.long)}

    def target_table(self) -> Tensor:
        return self.words.normalized()

    def input_part(self, batch: Batch, noisy: Tensor | None, c_noise: Tensor | None) -> tuple[Tensor, Tensor]:
        h = nn.functional.embedding(batch["tokens"].roll(1, 1), self.words.weight)
        return h, self.time(torch.zeros(len(h), device=h.device))

    def output_part(self, h: Tensor, cond: Tensor) -> Tensor:
        return h + cond


class TiedLoss(TokenDenoising):
    def logits(self, model: BlockModel, features: Tensor, z: Tensor | None, sigma: Tensor | None) -> Tensor:
        return (features @ model.words.weight.T).float()  # type: ignore[union-attr,operator]


def short(num_steps: int, micro_batch_size: int = 4) -> dict[str, Any]:
    warmup_steps = min(3, num_steps - 1)
    sizes = {"batch_size": BATCH, "micro_batch_size": micro_batch_size, "seq_len": LENGTH}
    return {"num_steps": num_steps, "lr": 1e-2, "warmup_steps": warmup_steps, **sizes}


def setting(name: str, **overrides: Any) -> tuple[Recipe, BuildModel]:
    """A recipe of ten steps in visits of three, and its model."""
    model = {"name": "custom"} if name == "tied" else {"name": name, **MODELS[name][0]}
    changes: dict[str, Any] = {"method": "end_to_end", "data": {"name": "custom"}, "model": model, "train": short(STEPS)}
    recipe = recipe_with(**{**changes, "blocks__num_blocks": 3, "blocks__visit_steps": 3, **overrides})
    return recipe, Tied if name == "tied" else lambda: MODELS[name][1](recipe.model)


def batches(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "tokens": torch.randint(VOCAB, (BATCH, LENGTH), generator=generator),
        "image": torch.rand(BATCH, 1, SIDE, SIDE, generator=generator) * 2 - 1,
        "label": torch.randint(CLASSES, (BATCH,), generator=generator),
    }


def trained(folder: Path, name: str, listeners: Any = (), **overrides: Any) -> tuple[RunState, Plan]:
    recipe, build = setting(name, **overrides)
    plan = make_plan(build, recipe, load_profile("cpu-4gib"))
    return Trainer(build, plan, folder, listeners).fit(batches), plan


def through_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that rest in RAM apart from the device's memory, as beside a CUDA device."""

    def opened(run: RunDir, plan: Plan, model: BlockModel, files: Any) -> BlockStream:
        from lowmem.settings import layouts_of

        layouts, shared = layouts_of(model, plan.settings)
        store = HostStore(run, layouts_by_key(layouts, shared), files)
        return BlockStream(store, layouts, shared, torch.device("cpu"), False, plan.recipe.offload.prefetch)

    monkeypatch.setattr(trainer_module, "open_stream", opened)


@pytest.fixture(autouse=True)
def uncounted_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """To count them takes longer than the runs do, and every run here fits."""
    for name in ("_count", "_count_streamed"):
        monkeypatch.setattr(PassCounter, name, lambda *_: Pass(1, Work(), Work()))


# ---------------------------------------------------------------------------------------------------------------------
# Tiers


@pytest.mark.parametrize("name", [*MODELS, "tied"])
def test_every_tier_gives_the_same_digest(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, and two micro-batches but for a tied table (see `exact`)."""
    common = {"train": short(4, 8 if name == "tied" else 4)}
    arms: dict[str, dict[str, Any]] = {
        "device": {"offload__tier": "device"},
        "disk": {"offload__tier": "disk"},
        "recompute": {"offload__tier": "disk", "train": {**common["train"], "recompute": True}},
    }
    digests = {arm: digest(trained(tmp_path / arm, name, **{**common, **changes})[0]) for arm, changes in arms.items()}
    through_ram(monkeypatch)
    digests["host"] = digest(trained(tmp_path / "host", name, **common, offload__tier="disk")[0])
    assert len(set(digests.values())) == 1 and None not in digests.values(), digests


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_optimizers_and_precisions_give_the_resident_digest(tmp_path: Path, optimizer: str, precision: str) -> None:
    common = {"optimizer__name": optimizer, "train": {**short(4), "precision": precision}, "optimizer__ema": 0.9, "model__dim": 64}
    resident = trained(tmp_path / "device", "causal_lm", **common, offload__tier="device")[0]
    for name, changes in {"disk": {}, "waiting": {"offload__prefetch": False, "offload__write_back": "wait"}}.items():
        assert digest(trained(tmp_path / name, "causal_lm", **common, offload__tier="disk", **changes)[0]) == digest(resident)


@pytest.mark.parametrize("num_blocks", [2, 5])
@pytest.mark.parametrize("clip", ["block", "global"])
def test_any_number_of_blocks_gives_the_resident_digest(tmp_path: Path, num_blocks: int, clip: str) -> None:
    common = {"train": short(4), "blocks__num_blocks": num_blocks, "optimizer__clip": clip, "optimizer__grad_clip": 0.01}
    digests = {digest(trained(tmp_path / tier, "dit", **common, offload__tier=tier)[0]) for tier in ("device", "disk")}
    assert len(digests) == 1 and None not in digests


# ---------------------------------------------------------------------------------------------------------------------
# Plain autograd


def tensors_of(folder: Path, state: RunState) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, record in state.files.items():
        content = load_file(folder / record.name)
        found.update({f"{key}/{name}" if name.startswith("optimizer.") else name: value for name, value in content.items()})
    return found


def plain(recipe: Recipe, build: BuildModel, plan: Plan, folder: Path) -> nn.Module:
    """The same run by a loop of torch's own parts alone, from the same first weights; moments are in the optimizer's state."""
    first = Trainer(build, plan, folder)
    first.run.acquire()
    start = tensors_of(folder, first._open())
    first.run.release()
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name])
    model.train()
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) == wanted] for wanted in (True, False))
    config = recipe.optimizer
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)
    size = plan.settings.micro_batch_size
    for step in range(recipe.train.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.train)
        optimizer.zero_grad()
        for part in range(BATCH // size):
            micro = {key: value[part * size : (part + 1) * size] for key, value in batches(step).items()}
            torch.manual_seed(mix_seed(recipe.train.seed, "step", 0, step, part))
            loss = whole_loss(model, micro, recipe)
            (loss.mean() / (BATCH // size)).backward()
        if config.clips_whole:
            assert config.grad_clip is not None
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
    for parameter in model.parameters():
        parameter.moments = optimizer.state[parameter]  # type: ignore[attr-defined]
    return model


def whole_loss(model: Any, batch: Batch, recipe: Recipe) -> Tensor:
    """[B], written out for each model."""
    if isinstance(model, Vit):
        h, cond = model.input_part(batch, None, None)
        for layer in model.layers:
            h = layer(h, cond)
        return nn.functional.cross_entropy(model.output_part(h, cond).float(), batch["label"], reduction="none")
    if isinstance(model, Dit):
        noise, image = recipe.noise, batch["image"]
        y = image * noise.sigma_data
        sigma = sample_sigma(torch.rand(len(y)), Interval(noise.sigma_min, noise.sigma_max), noise)
        level, sd = sigma[:, None, None, None], noise.sigma_data
        z = y + level * torch.randn_like(y)
        label = torch.where(torch.rand(len(y)) < 0.1, CLASSES, batch["label"])
        h, cond = model.input_part({"label": label}, 1 / (level**2 + sd**2).sqrt() * z, sigma.log() / 4)
        for layer in model.layers:
            h = layer(h, cond)
        denoised = sd**2 / (level**2 + sd**2) * z + level * sd / (level**2 + sd**2).sqrt() * model.output_part(h, cond).float()
        return (denoised - y).square().flatten(1).mean(1) * ((sigma**2 + sd**2) / (sigma * sd) ** 2)
    words = batch["tokens"]
    if isinstance(model, MaskedLm):
        t = ((torch.rand(1) + torch.arange(len(words)) / len(words)) % 1).clamp(min=1e-4)
        mask = torch.rand(words.shape) < t[:, None]
        h, cond = model.input_part({"tokens": words}, words.masked_fill(mask, VOCAB), t.log() / 4)
        for layer in model.layers:
            h = layer(h, cond)
        rows = model.output_part(h, cond).flatten(0, 1).split(17)
        losses = [nn.functional.cross_entropy(model.head(x), y, reduction="none") for x, y in zip(rows, words.flatten().split(17), strict=True)]
        return (torch.cat(losses).view(words.shape) * mask).mean(1) / t
    if isinstance(model, RecurrentLm):
        generator = random.Random(torch.initial_seed())
        iterations, clock = 0, generator.expovariate(1.0)
        while clock < model.config.iterations:
            iterations, clock = iterations + 1, clock + generator.expovariate(1.0)
        cond, e = model.time(torch.zeros(len(words))), model.shifted(words)
        for layer in model.layers[:2]:
            e = layer(e, cond)
        h = torch.randn_like(e)
        for iteration in range(max(iterations, 1)):
            with torch.set_grad_enabled(iteration >= iterations - model.config.backprop_iterations):
                h = model.adapter(torch.cat([h, e], dim=-1))
                for layer in model.layers[2:4]:
                    h = layer(h, cond)
        h = model.layers[4](h, cond)
        features = model.features(h, cond)
    else:
        h, cond = model.input_part(batch, None, None)
        for layer in model.layers:
            h = layer(h, cond)
        features = model.output_part(h, cond)
    rows = features.flatten(0, 1).split(17)
    head = (lambda x: x @ model.words.weight.T) if isinstance(model, Tied) else model.head
    losses = [nn.functional.cross_entropy(head(x), y, reduction="none") for x, y in zip(rows, words.flatten().split(17), strict=True)]
    return torch.cat(losses).view(words.shape).mean(1)


@pytest.mark.parametrize("name", [*MODELS, "tied"])
def test_ten_streamed_steps_leave_the_weights_and_moments_of_plain_autograd(tmp_path: Path, name: str) -> None:
    changes = {"optimizer__grad_clip": None, "offload__tier": "disk", **({"train__micro_batch_size": 8} if name == "tied" else {})}
    state, plan = trained(tmp_path / "ours", name, **changes)
    model = plain(*setting(name, **changes), plan, tmp_path / "first")
    assert not compared(tmp_path / "ours", state, plan, model)


def compared(folder: Path, state: RunState, plan: Plan, model: nn.Module) -> dict[str, float]:
    """Parameters whose weights or moments differ, with the largest difference."""
    found, different = tensors_of(folder, state), {}
    assert plan.settings.tier == "disk"
    with torch.device("meta"):
        layouts, shared = trainer_module.layouts_of(setting_model(plan), plan.settings)
    used = 0
    for key, layout in layouts_by_key(layouts, shared).items():
        for slot in layout.slots:
            parameter: Any = model.get_parameter(slot.name)
            if parameter.grad is None:  # not used end to end
                continue
            used += 1
            rows = slice(slot.start, slot.start + slot.numel)
            pairs = [(found[slot.name].flatten(), parameter.detach().flatten())]
            for moment in ("exp_avg", "exp_avg_sq"):
                pairs.append((found[f"{key}/optimizer.{moment}"][rows], parameter.moments[moment].flatten()))
            if not all(torch.equal(ours, theirs) for ours, theirs in pairs):
                different[slot.name] = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    assert used > 50
    return different


def setting_model(plan: Plan) -> BlockModel:
    name = plan.recipe.model.name
    return Tied() if name == "custom" else MODELS[name][1](plan.recipe.model)


def test_a_tied_table_over_several_micro_batches_differs_by_rounding_alone(tmp_path: Path) -> None:
    changes = {"optimizer__grad_clip": None, "offload__tier": "disk", "train__num_steps": 1, "train__warmup_steps": 0}
    state, plan = trained(tmp_path / "ours", "tied", **changes)
    model = plain(*setting("tied", **changes), plan, tmp_path / "first")
    different = compared(tmp_path / "ours", state, plan, model)
    assert set(different) <= {"words.weight"} and different.get("words.weight", 0.0) < 1e-5


def test_a_global_clip_is_torchs_clip_grad_norm(tmp_path: Path) -> None:
    changes = {"optimizer__grad_clip": 0.05, "optimizer__clip": "global", "offload__tier": "disk", "model__dropout": 0.0}
    state, plan = trained(tmp_path / "ours", "causal_lm", **changes)
    model = plain(*setting("causal_lm", **changes), plan, tmp_path / "first")
    assert max(compared(tmp_path / "ours", state, plan, model).values(), default=0.0) < 1e-5
    free = plain(*setting("causal_lm", **{**changes, "optimizer__grad_clip": None}), plan, tmp_path / "free")
    assert max(compared(tmp_path / "ours", state, plan, free).values()) > 1e-3, "the norm was above the bound"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class HeldOut:
    """What the evaluations ask of a data set."""

    num_test = 12

    def test_batches(self, size: int) -> Iterator[dict[str, Any]]:
        for start in range(0, self.num_test, size):
            whole = {name: torch.cat([value, value.flip(0)]).numpy() for name, value in batches(99).items()}
            yield {name: value[start : min(start + size, self.num_test)] for name, value in whole.items()}


def read(name: str, frozen: FrozenRun) -> list[Any]:
    data: Any = HeldOut()
    prompt = torch.zeros(2, 1, dtype=torch.long)
    if name == "vit":
        return [labels.evaluate(frozen, data)]
    if name == "dit":
        return [images.sample(frozen, torch.arange(6), 4, 2.0, 0).tolist(), images._losses(frozen, data, 0)]
    if name == "masked_lm":
        return [masked.evaluate(frozen, data), masked.sample_tokens(frozen, 2, 4, 0).tolist()]
    if name == "causal_lm":
        return [tokens.evaluate(frozen, data), tokens.generate(frozen, prompt, 4, 1.0, 0.9, 0).tolist()]
    return [recurrent.evaluate(frozen, data), recurrent.generate(frozen, prompt, 4, 1.0, 0.9, 0).tolist()]


@pytest.mark.parametrize("name", MODELS)
def test_a_run_that_streams_is_read_with_the_figures_of_a_resident_one(tmp_path: Path, name: str) -> None:
    eval_config = {"batch_size": 4}
    _, plan = trained(tmp_path, name, offload__tier="disk", train=short(2), eval=eval_config)
    figures = []
    for resident in (False, True):
        with FrozenRun(RunDir(tmp_path), plan, lambda: setting_model(plan), resident) as frozen, torch.no_grad():
            assert frozen.stream.resident == resident
            figures.append(read(name, frozen))
    assert figures[0] == figures[1]


# ---------------------------------------------------------------------------------------------------------------------
# Borders


@pytest.mark.parametrize("num_blocks, parts", [(2, 1), (2, 2), (3, 3), (4, 7)])
@pytest.mark.parametrize("two_passes", [False, True])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_borders_away_from_the_device_give_back_what_was_put_last(tmp_path: Path, num_blocks: int, parts: int, two_passes: bool, tier: str) -> None:
    shape = num_blocks, parts, two_passes
    away = AwayBorders(*shape, torch.device("cpu"), tmp_path if tier == "disk" else None)
    near = Borders(*shape)
    for _ in range(2):  # steps
        for borders in (near, away):
            borders.begin()
        for is_put, place in border_calls(*shape):
            if is_put:
                h = torch.randn(2, 700)
                for borders in (near, away):
                    borders.put(place, h)
            else:
                assert torch.equal(away.get(place), near.get(place))
    away.close()
    assert list(tmp_path.iterdir()) == []
    counted = border_bytes(tier, True, 5600, 0, *shape)  # type: ignore[arg-type]
    assert (away.disk_read_bytes, away.disk_written_bytes) == (2 * counted.disk_read, 2 * counted.disk_written)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


@pytest.mark.parametrize("clip", ["block", "global"])
@pytest.mark.parametrize("micro_batch_size", [8, 4, 1])
def test_the_bytes_moved_are_those_of_the_plan_with_borders_on_disk(tmp_path: Path, clip: str, micro_batch_size: int) -> None:
    changes = {"offload__tier": "disk", "offload__borders": "disk", "optimizer__clip": clip, "train": short(3, micro_batch_size)}
    state, plan = trained(tmp_path / "run", "masked_lm", **changes)
    traffic = plan.predicted.traffic
    assert traffic is not None
    assert (traffic.step.disk_read_bytes > 0) and list((tmp_path / "run").glob("*.tmp")) == []
    for name, counted in state.traffic.items():
        assert counted == getattr(traffic.start, name) + 3 * getattr(traffic.step, name) + getattr(traffic.commit, name), name
    resident = trained(tmp_path / "resident", "masked_lm", **{**changes, "offload__tier": "device"})[0]
    assert digest(state) == digest(resident)


@pytest.mark.parametrize("clip", ["block", "global"])
@pytest.mark.parametrize("tier", ["disk", "host"])
def test_the_bytes_moved_are_those_of_the_plan(tmp_path: Path, tier: str, clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if tier == "host":
        through_ram(monkeypatch)
    state, plan = trained(tmp_path / "run", "causal_lm", offload__tier="disk", optimizer__clip=clip)
    content = read_report(tmp_path / "run").content
    assert tier == "host" or content["predicted"]["traffic"] == content["traffic"]
    assert plan.predicted.traffic is not None
    traffic = plan.predicted.traffic
    if tier == "host":
        from lowmem.settings import layouts_of
        from lowmem.traffic import streamed_traffic

        traffic = streamed_traffic(*layouts_of(setting_model(plan), plan.settings), plan.profile, "host", clip == "global", False, BorderBytes())
    visits = -(-STEPS // 3)
    for name, counted in state.traffic.items():
        assert counted == getattr(traffic.start, name) + STEPS * getattr(traffic.step, name) + visits * getattr(traffic.commit, name), name
    assert state.measured["disk_bytes"] == plan.predicted.disk_bytes
