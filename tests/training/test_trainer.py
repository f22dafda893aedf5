"""The loop: the same bits from every tier, after every interruption, and as plain autograd gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, first_weights, recipe_with, run_short

from lowmem.blocks.run_dir import RunDir, RunState
from lowmem.data.datasets import describe_data, load_data
from lowmem.errors import BudgetError, ResumeError, StoreError
from lowmem.machine.device import Device
from lowmem.machine.monitor import Monitor, Peak
from lowmem.machine.profile import load_profile
from lowmem.models import model_builder
from lowmem.models.base import BlockModel
from lowmem.models.layers import Layer, Linear, Table, TimeEmbedding
from lowmem.objectives.base import Batch
from lowmem.objectives.labels import LabelDenoising
from lowmem.planning.plan import make_plan
from lowmem.recipe import NoiseConfig
from lowmem.reporting.report import digest, read_report
from lowmem.schedule import learning_rate
from lowmem.training.trainer import Trainer
from lowmem.units import MIB


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
@pytest.mark.parametrize(
    ("precision", "weights"),
    [
        ("float32", "float32"),
        pytest.param("bfloat16", "float32", marks=pytest.mark.slow),
        ("bfloat16", "bfloat16"),
    ],
)
def test_every_tier_prefetch_and_write_back_gives_the_same_digest(
    tmp_path: Path, optimizer: str, precision: str, weights: str
) -> None:
    common = {
        "optimizer__name": optimizer,
        "train__precision": precision,
        "train__weights": weights,
        "model__dropout": 0.1,
        "model__dim": 64,
    }
    digests = set()
    for name, changes in {
        "device": {"offload__tier": "device"},
        "host": {"offload__tier": "host"},
        "disk": {"offload__tier": "disk"},
        "disk-no-prefetch": {"offload__tier": "disk", "offload__prefetch": False},
        "disk-beside": {"offload__tier": "disk", "offload__write_back": "beside"},
        "device-beside": {"offload__tier": "device", "offload__write_back": "beside"},
    }.items():
        digests.add(digest(run_short(tmp_path / name, **{**common, **changes})))
    assert len(digests) == 1 and None not in digests


@pytest.mark.parametrize("num_blocks", [1, 2])
@pytest.mark.parametrize("write_back", ["wait", "beside"])
def test_few_blocks_take_no_more_slots_than_there_are_blocks_and_give_the_same_digest(
    tmp_path: Path, num_blocks: int, write_back: str
) -> None:
    common = {"blocks__num_blocks": num_blocks, "offload__write_back": write_back, "model__dim": 64}
    disk, device = (run_short(tmp_path / tier, offload__tier=tier, **common) for tier in ("disk", "device"))
    assert digest(disk) == digest(device)


def test_other_seeds_give_other_digests(tmp_path: Path) -> None:
    digests = {digest(run_short(tmp_path / str(seed), train__seed=seed)) for seed in (0, 1)}
    assert len(digests) == 2


@pytest.mark.parametrize("method", ["diffusion_blocks", "end_to_end"])
def test_updates_during_backward_end_with_the_digest_of_updates_after_it(tmp_path: Path, method: str) -> None:
    common = {"method": method, "optimizer__grad_clip": None, "model__dropout": 0.1}
    during, after = (
        run_short(tmp_path / str(choice), optimizer__during_backward=choice, **common)
        for choice in ("auto", False)
    )
    assert [
        json.loads((tmp_path / name / "plan.json").read_text())["settings"]["during_backward"]
        for name in ("auto", "False")
    ] == [True, False]
    assert digest(during) == digest(after)


@pytest.mark.parametrize(
    ("order", "weights"), [("round_robin", "float32"), ("random", "float32"), ("round_robin", "bfloat16")]
)
def test_a_run_interrupted_in_every_visit_ends_with_the_unbroken_digest(
    tmp_path: Path, order: str, weights: str
) -> None:
    settings = {
        "blocks__order": order,
        "offload__tier": "disk",
        "train__precision": weights,
        "train__weights": weights,
    }
    unbroken = run_short(tmp_path / "unbroken", **settings)

    class Interrupted(Exception):
        pass

    stops = 0
    while True:
        steps: list[int] = []

        def interrupt(record: dict[str, Any], steps: list[int] = steps) -> None:
            if record["event"] == "step":
                steps.append(record["step"])
                if len(steps) == 3:  # one whole visit and a step of the next
                    raise Interrupted

        try:
            state = run_short(tmp_path / "broken", [interrupt], **settings)
            break
        except Interrupted:
            stops += 1
    assert stops >= 8
    assert digest(state) == digest(unbroken)


def test_optimizer_state_survives_the_absence_of_its_block_bit_for_bit(tmp_path: Path) -> None:
    """A run in visits of one step, each block going to disk and back every time, equals one that never lets
    go.
    """
    settings = {
        "blocks__num_blocks": 3,
        "offload__tier": "disk",
        "optimizer__name": "adamw8bit",
        "model__dim": 64,
        "train__num_steps": 4,
    }
    single = run_short(tmp_path / "single", blocks__visit_steps=1, **settings)
    # with visits of one step the shared part is updated in the order block 0, 1, 2, 0, ...: keep that order,
    # but resident
    resident = run_short(
        tmp_path / "resident", blocks__visit_steps=1, **{**settings, "offload__tier": "device"}
    )
    assert digest(single) == digest(resident)


def test_end_to_end_training_equals_a_plain_pytorch_loop_bit_for_bit(tmp_path: Path) -> None:
    overrides = {
        "method": "end_to_end",
        "optimizer__name": "adamw",
        "optimizer__grad_clip": None,
        "model__dropout": 0.0,
    }
    state = run_short(tmp_path / "ours", **overrides)
    recipe = recipe_with(**{**SHORT, **overrides})
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    plan = make_plan(build, recipe, load_profile("cpu-4gib"))

    initial, first = first_weights(tmp_path / "initial", build, plan)
    model = build()
    load_weights(model, initial, first, plan)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    data = load_data(recipe.data, recipe.train.seq_len)
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.train)
        batch = {name: torch.from_numpy(array) for name, array in data.batch(0, step, 64).items()}
        optimizer.zero_grad()
        model.make_objective(recipe.noise).end_to_end_loss(model.layers, batch).mean().backward()
        optimizer.step()
    trained = build()
    load_weights(trained, RunDir(tmp_path / "ours"), state, plan)
    for (name, ours), (_, theirs) in zip(trained.named_parameters(), model.named_parameters(), strict=True):
        used = theirs.grad is not None  # the noisy label's input is not used end to end
        assert not used or torch.equal(ours, theirs), name


def load_weights(
    model: BlockModel, run: RunDir, state: RunState, plan: Any, dtype: torch.dtype = torch.float32
) -> None:
    from safetensors.torch import load_file

    tensors = {}
    for record in state.files.values():
        tensors.update(load_file(run.path / record.name))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert tensors[name].dtype == dtype
            parameter.copy_(tensors[name])


def test_micro_batches_and_recompute_add_up_to_the_whole_batchs_gradient(tmp_path: Path) -> None:
    whole = run_short(tmp_path / "whole", method="end_to_end", train__micro_batch_size=64)
    parts = run_short(tmp_path / "parts", method="end_to_end", train__micro_batch_size=16)
    recomputed = run_short(
        tmp_path / "recomputed", method="end_to_end", train__micro_batch_size=64, train__recompute=True
    )
    assert digest(recomputed) == digest(whole), "recompute changes nothing"
    for block in range(3):
        assert parts.blocks[block].loss == pytest.approx(whole.blocks[block].loss, rel=1e-3)


def test_recompute_replays_dropout(tmp_path: Path) -> None:
    digests = {
        digest(run_short(tmp_path / str(on), model__dropout=0.2, train__recompute=on)) for on in (False, True)
    }
    assert len(digests) == 1


def test_another_recipe_in_the_same_folder_is_refused_by_its_first_differing_key(tmp_path: Path) -> None:
    run_short(tmp_path / "run")
    before = (tmp_path / "run" / "state.json").read_bytes()
    with pytest.raises(ResumeError, match=r"train\.lr = 0\.002, now 0\.001"):
        run_short(tmp_path / "run", train__lr=1e-3)
    assert (tmp_path / "run" / "state.json").read_bytes() == before


def test_a_run_made_before_a_key_existed_goes_on_with_that_keys_default(tmp_path: Path) -> None:
    unbroken = run_short(tmp_path / "run")
    run = RunDir(tmp_path / "run")
    old = run.read_plan()
    del old["recipe"]["eval"]["prediction"], old["recipe"]["noise"]["sigma_max_share"]
    run.replace_plan(old)
    assert run_short(tmp_path / "run").files == unbroken.files
    with pytest.raises(ResumeError, match=r"noise\.sigma_max_share = 0\.0, now 0\.5"):
        run_short(tmp_path / "run", noise__sigma_max_share=0.5)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    first = run_short(tmp_path / "run")
    files = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.safetensors")}
    again = run_short(tmp_path / "run")
    assert digest(first) == digest(again)
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.safetensors")}


def test_a_truncated_block_is_named_with_its_sizes_and_nothing_is_overwritten(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(record: dict[str, Any]) -> None:
        if record["event"] == "visit" and record["visit"] == 4:
            raise Stop

    with pytest.raises(Stop):
        run_short(tmp_path / "run", [stop], offload__tier="disk")
    block = next((tmp_path / "run").glob("block-0002*"))
    size = block.stat().st_size
    block.write_bytes(block.read_bytes()[:-100])
    before = {
        path.name: path.read_bytes()
        for path in (tmp_path / "run").iterdir()
        if path.suffix in (".safetensors", ".json")
    }
    with pytest.raises(StoreError, match=rf"{block.name}: expected {size} bytes, found {size - 100} bytes"):
        run_short(tmp_path / "run", offload__tier="disk")
    assert before == {
        path.name: path.read_bytes()
        for path in (tmp_path / "run").iterdir()
        if path.suffix in (".safetensors", ".json")
    }


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    recipe = recipe_with()
    profile = load_profile("cpu-4gib")
    parts = {
        part: getattr(profile, part).model_copy(update={"memory_gib": 1.1}) for part in ("device", "host")
    }
    tight = profile.model_copy(update=parts)
    plan = make_plan(model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len)), recipe, tight)
    with pytest.raises(BudgetError, match="Largest part: runtime floor") as refused:
        Trainer(
            model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len)), plan, tmp_path / "run"
        )
    assert "DOES NOT FIT" in refused.value.table
    assert not (tmp_path / "run").exists()


def test_the_report_counts_traffic_of_the_disk_tier_to_the_byte(tmp_path: Path) -> None:
    state = run_short(tmp_path / "run", offload__tier="disk")
    content = read_report(tmp_path / "run").content
    sizes = {key: record.num_bytes for key, record in state.files.items()}
    visits = 3  # of each block
    blocks = sum(size for key, size in sizes.items() if key != "shared")
    assert content["traffic"]["disk_written_bytes"] == visits * blocks + visits * 3 * sizes["shared"]
    assert content["traffic"]["disk_read_bytes"] == visits * blocks + sizes["shared"]
    assert content["predicted"]["disk_bytes"] == content["measured"]["disk_bytes"]
    assert content["progress"] == {"visits_done": 9, "visits_total": 9, "steps_done": 18, "num_steps": 6}


class Mine(BlockModel):
    """A user's own model: rows of 16 numbers, 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = Linear(16, 32)
        self.label_in = Linear(32, 32)
        self.labels = Table(4, 32, std=1.0)
        self.time = TimeEmbedding(32)
        self.layers = torch.nn.ModuleList(Layer(32, 2, 2, 0.0) for _ in range(4))
        self.head = Linear(32, 4)

    def make_objective(self, noise: NoiseConfig) -> LabelDenoising:
        return LabelDenoising(self, noise)

    def example_batch(self, batch_size: int) -> Batch:
        return {"row": torch.zeros(batch_size, 16), "label": torch.zeros(batch_size, dtype=torch.long)}

    def target_table(self) -> torch.Tensor:
        return self.labels.normalized()

    def input_part(self, batch: Batch, noisy: Any, c_noise: Any) -> Any:
        h = self.inward(batch["row"])[:, None]
        if noisy is not None:
            h = torch.cat([h, self.label_in(noisy)[:, None]], 1)
        return h, self.time(torch.zeros(len(h)) if c_noise is None else c_noise)

    def output_part(self, h: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.head(h[:, 0]))


def test_first_weights_in_bf16_are_those_in_fp32_rounded(tmp_path: Path) -> None:
    first = {}
    for weights in ("float32", "bfloat16"):
        recipe = recipe_with(**{**SHORT, "train__precision": "bfloat16", "train__weights": weights})
        build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
        plan = make_plan(build, recipe, load_profile("cpu-4gib"))
        run, state = first_weights(tmp_path / weights, build, plan)
        first[weights] = build()
        load_weights(
            first[weights],
            run,
            state,
            plan,
            torch.bfloat16 if weights == "bfloat16" else torch.float32,
        )
    for (name, wide), kept in zip(
        first["float32"].named_parameters(), first["bfloat16"].parameters(), strict=True
    ):
        assert torch.equal(wide.bfloat16().float(), kept), name


@pytest.mark.slow
def test_weights_kept_in_bf16_learn_as_well_as_fp32_masters(tmp_path: Path) -> None:
    """The last visits' losses of three blocks, two seeds: within a tenth, or a hundredth of a nat, of each
    other.
    """
    common = {
        "train__num_steps": 300,
        "blocks__visit_steps": 100,
        "model__num_layers": 6,
        "model__dim": 64,
        "train__precision": "bfloat16",
    }
    for seed in (0, 1):
        masters, kept = (
            run_short(tmp_path / f"{seed}-{weights}", train__weights=weights, train__seed=seed, **common)
            for weights in ("float32", "bfloat16")
        )
        for ours, theirs in zip(kept.blocks, masters.blocks, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=0.1, abs=0.01)


def test_a_users_own_model_trains_from_python_as_the_readme_shows(tmp_path: Path) -> None:
    import lowmem

    config = lowmem.recipe_from_dict(
        {
            "schema": 1,
            "method": "diffusion_blocks",
            "model": {"name": "custom"},
            "data": {"name": "custom"},
            "blocks": {"num_blocks": 2, "visit_steps": 20},
            "train": {"num_steps": 60, "batch_size": 32, "lr": 3e-3},
        },
        "mine",
    )
    plan = lowmem.make_plan(Mine, config, lowmem.load_profile("cpu-4gib"))
    assert "fits" in plan.table()
    trainer = lowmem.Trainer(Mine, plan, run_dir=tmp_path / "mine")

    def batches(step: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        label = torch.randint(4, (32,), generator=generator)
        return {
            "row": torch.randn(32, 16, generator=generator) + 3 * torch.nn.functional.one_hot(label, 16),
            "label": label,
        }

    state = trainer.fit(batches)
    assert state.blocks[0].loss is not None and state.blocks[0].loss < 0.7, "well below ln 4 = 1.39"
    assert "block" in lowmem.read_report(tmp_path / "mine").table()


def test_weights_are_created_the_same_whatever_the_number_of_blocks(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    found = []
    for num_blocks in (1, 3):
        recipe = recipe_with(**{**SHORT, "blocks__num_blocks": num_blocks})
        build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
        plan = make_plan(build, recipe, load_profile("cpu-4gib"))
        run, state = first_weights(tmp_path / str(num_blocks), build, plan)
        tensors: dict[str, torch.Tensor] = {}
        for record in state.files.values():
            tensors.update(
                {
                    k: v
                    for k, v in load_file(run.path / record.name).items()
                    if not k.startswith(("padding", "optimizer"))
                }
            )
        found.append(tensors)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_only_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.acquire()
    try:
        with pytest.raises(ResumeError, match="another process"):
            run_short(tmp_path / "run")
    finally:
        run.release()


def test_a_blocks_peak_is_the_highest_of_all_its_visits_also_after_a_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block is visited three times; the readings fall from visit to visit."""
    readings = iter(range(9 * MIB, 0, -MIB))
    taken: list[int] = []

    def take_peak(self: Monitor) -> Peak:
        taken.append(next(readings))
        return Peak(device_bytes=taken[-1], host_bytes=taken[-1])

    monkeypatch.setattr(Monitor, "take_peak", take_peak)
    stopped: list[int] = []

    def stop(record: dict[str, Any]) -> None:
        if record["event"] == "commit" and record["visits_done"] == 4 and not stopped:
            stopped.append(4)
        if record["event"] == "visit" and stopped:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_short(tmp_path / "run", [stop])
    state = run_short(tmp_path / "run")
    first_visits = {block: taken[block] for block in range(3)}
    assert {block.block: block.measured_peak_bytes for block in state.blocks} == first_visits


def test_a_run_that_goes_on_on_another_card_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["visit"] == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_short(tmp_path, [interrupt])
    events: list[dict[str, Any]] = []
    monkeypatch.setattr(Device, "name", lambda self: "another card")
    run_short(tmp_path, [events.append])
    (said,) = [event["message"] for event in events if event["event"] == "warning"]
    assert "was on cpu and goes on on another card" in said and "digest" in said
