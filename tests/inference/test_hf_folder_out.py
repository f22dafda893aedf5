"""Finetuned runs are exported as folders that the library opens, answer as it would, and go on from there."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import new_cache
from hf_folders import BYTES_VOCAB, FAMILIES, chat_model, chat_rows, make_folder

from lowmem import job
from lowmem.data.datasets import load_data
from lowmem.errors import ConfigError, DataError
from lowmem.finetuning import finetune_recipe
from lowmem.inference.chat import answer, chat_run
from lowmem.inference.evaluate import evaluate_run
from lowmem.inference.evaluation.common import open_batches
from lowmem.inference.export import export_run
from lowmem.inference.frozen_run import FrozenRun, open_run
from lowmem.inference.sampling import Draw
from lowmem.models.huggingface.model import HuggingfaceLm
from lowmem.objectives.next_tokens import IGNORED
from lowmem.planning.duration import Work
from lowmem.planning.passes import Pass, PassCounter
from lowmem.planning.run_data import own_data
from lowmem.recipe import Recipe
from lowmem.reporting.report import read_report

SHORT = [
    "train.num_steps=3",
    "train.lr=0.01",
    "train.seq_len=48",
    "train.batch_size=4",
    "blocks.visit_steps=2",
    "optimizer.name=adamw",
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To count activations takes longer than the runs do, and every run here fits."""
    monkeypatch.setenv("XDG_CACHE_HOME", new_cache(tmp_path / "cache"))
    for name in ("_count", "_count_streamed", "_count_evaluated"):
        monkeypatch.setattr(PassCounter, name, lambda *_: Pass(1, Work(), Work()))


def finetuned(tmp_path: Path, kind: str = "llama", tier: str = "disk", *overrides: str) -> Path:
    folder, data = chat_model(tmp_path / kind, kind), chat_rows(tmp_path / "rows.jsonl")
    recipe = finetune_recipe(folder, data, [*SHORT, f"offload.tier={tier}", *overrides])
    return job.train(recipe, "cpu-4gib", tmp_path / "run")


def library(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder).eval()


FIRST = ("llama", "mistral", "gemma2", "gpt2", "gpt_neox")  # one of each kind of mask and of names


@pytest.mark.parametrize(
    "kind", [kind if kind in FIRST else pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILIES]
)
def test_an_exported_folder_opens_with_the_library_with_equal_logits_and_the_same_answer(
    kind: str, tmp_path: Path
) -> None:
    out = export_run(finetuned(tmp_path, kind), tmp_path / "out")
    tokens, prompt = torch.randint(BYTES_VOCAB, (2, 30)), torch.randint(BYTES_VOCAB - 3, (1, 9))
    theirs = library(out)
    theirs.set_attn_implementation(FAMILIES[kind].attention)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        greedy = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
    with open_run(tmp_path / "run") as frozen, torch.no_grad():
        torch.testing.assert_close(outputs_of(theirs, tokens), logits_of(frozen, tokens), rtol=0, atol=1e-6)
        answered = answer(frozen, prompt, 12, Draw(temperature=0), [])
    assert theirs.dtype == torch.float32
    assert answered.tolist() == greedy[:, 9:].tolist()
    names = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json"}
    assert names <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # a head of its own, and a table that is tied to it
def test_a_folder_of_which_some_parts_were_trained_opens_with_equal_logits(kind: str, tmp_path: Path) -> None:
    run = finetuned(tmp_path, kind, "disk", "model.trainable=1", "train.lr=0.1")
    tokens = torch.randint(BYTES_VOCAB, (2, 20))
    with open_run(run) as frozen, torch.no_grad():
        ours = logits_of(frozen, tokens)
    theirs = library(export_run(run, tmp_path / "out"))
    torch.testing.assert_close(outputs_of(theirs, tokens), ours, rtol=0, atol=1e-6)
    assert (outputs_of(library(tmp_path / kind), tokens) - ours).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="--merge: found a run without an adapter"):
        export_run(run, tmp_path / "whole", merge=True)


def logits_of(frozen: FrozenRun, tokens: torch.Tensor) -> torch.Tensor:
    """As a streamed evaluation makes them."""
    assert isinstance(frozen.model, HuggingfaceLm)
    entered = frozen.objective.enter({"tokens": tokens})
    h = entered.h
    for layers in frozen.passed():
        h = frozen.objective.through(layers, h, entered.cond, entered.kept)
    return frozen.model.logits(frozen.model.output_part(h, entered.cond))


def test_the_held_out_loss_is_the_mean_over_the_labels_that_are_looked_at(tmp_path: Path) -> None:
    more = ["data.test_fraction=0.4", "eval.batch_size=2", "eval.num_batches=2"]
    run = finetuned(tmp_path, "llama", "disk", *more)
    found, theirs = evaluate_run(run), library(export_run(run, tmp_path / "out"))
    with open_run(run) as frozen:
        batches = list(open_batches(frozen, own_data(frozen.plan)))
    assert len(batches) == 2
    losses = []
    for batch in batches:
        with torch.no_grad():
            logits = theirs(input_ids=batch["tokens"]).logits
        known = batch["labels"] != IGNORED
        losses += torch.nn.functional.cross_entropy(logits[known], batch["labels"][known], reduction="none")
    assert found["value"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert found["num_labels"] == len(losses)


def test_a_chat_ends_where_the_answer_ends(tmp_path: Path) -> None:
    run = finetuned(tmp_path, "llama", "device")
    with open_run(run) as frozen:
        start = torch.randint(BYTES_VOCAB, (1, 5))
        free = answer(frozen, start, 8, Draw(temperature=0), [])[0].tolist()
        stopped = answer(frozen, start, 8, Draw(temperature=0), [free[2]])[0].tolist()
    assert stopped == free[: free.index(free[2]) + 1]
    said = chat_run(run, "hello", 5, temperature=0)
    assert said == chat_run(run, "hello", 5, temperature=0)
    with pytest.raises(ConfigError, match="lower --tokens"):
        chat_run(run, "hello", 100_000_000)


def test_a_run_goes_on_from_an_exported_folder_with_its_loss(tmp_path: Path) -> None:
    first = finetuned(tmp_path)
    out = export_run(first, tmp_path / "out")
    found = evaluate_run(first)["value"]
    recipe = finetune_recipe(out, tmp_path / "rows.jsonl", [*SHORT, "train.lr=1.0e-30", "train.num_steps=1"])
    again = job.train(recipe, "cpu-4gib", tmp_path / "again")
    assert evaluate_run(again)["value"] == pytest.approx(found, abs=1e-6)


def test_a_changed_configuration_or_tokenizer_is_seen(tmp_path: Path) -> None:
    run = finetuned(tmp_path)
    for name, message in {"config.json": "model.path: ", "tokenizer_config.json": "data.tokenizer: "}.items():
        path = tmp_path / "llama" / name
        kept = path.read_text()
        content = json.loads(kept)
        path.write_text(json.dumps({**content, "rms_norm_eps": 0.5}))
        with pytest.raises(DataError, match=message):
            export_run(run, tmp_path / "out")
        path.write_text(kept)


def test_sequences_are_as_long_as_the_rows_ask_for(tmp_path: Path) -> None:
    """Else the plan counts activations of batches that do not come."""
    folder, data = chat_model(tmp_path / "model", "gpt2"), chat_rows(tmp_path / "rows.jsonl")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_positions": 512}))
    recipe = finetune_recipe(folder, data)
    found = load_data(recipe.data, recipe.train.seq_len)
    widths = [found.batch(0, step, 1)["tokens"].shape[1] for step in range(found.num_train)]
    assert recipe.train.seq_len == max(widths) < 512
    longer = finetune_recipe(folder, data, ["train.seq_len=512"])
    assert longer.train.seq_len == 512
    assert load_data(longer.data, 512).num_train == found.num_train, "nothing is cut"
    assert finetune_recipe(folder, data, ["data.pack=true"]).train.seq_len == 512


def test_the_epochs_say_the_steps(tmp_path: Path) -> None:
    folder, data = chat_model(tmp_path / "model", "llama"), chat_rows(tmp_path / "rows.jsonl")
    recipe = finetune_recipe(folder, data, ["train.batch_size=5"], epochs=3)
    assert isinstance(recipe, Recipe)
    assert recipe.train.num_steps == 14  # 23 rows to train on
    assert recipe.blocks.num_blocks == 3
    assert recipe.train.seq_len == 64  # the model's longest
    with pytest.raises(ConfigError, match="--epochs: found 0"):
        finetune_recipe(folder, data, epochs=0)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("base", [None, "bfloat16", "nf4"])
@pytest.mark.parametrize("tier", ["device", "disk"])
def test_a_run_that_was_stopped_goes_on_to_the_digest_of_an_unbroken_one(
    tier: str, base: str | None, tmp_path: Path
) -> None:
    adapter = [] if base is None else ["adapter.name=lora", f"adapter.base={base}"]
    more = ["data.pack=true", "train.num_steps=6", *adapter]
    whole = finetuned(tmp_path, "llama", tier, *more)
    data, folder = tmp_path / "rows.jsonl", tmp_path / "llama"
    recipe = finetune_recipe(folder, data, [*SHORT, f"offload.tier={tier}", *more])

    def stop(record: dict[str, Any]) -> None:
        if record["event"] == "step" and record["step"] == 3:
            raise Stopped

    with pytest.raises(Stopped):
        job.train(recipe, "cpu-4gib", tmp_path / "broken", listeners=[stop])
    broken = job.train(recipe, "cpu-4gib", tmp_path / "broken")
    unbroken, resumed = (read_report(run).content for run in (whole, broken))
    assert resumed["digest"] == unbroken["digest"]
    assert resumed["first_metrics"] == unbroken["first_metrics"]
    assert resumed["metrics"] == unbroken["metrics"]


def outputs_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=tokens).logits)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_an_adapter_is_exported_for_peft_and_merged_with_equal_logits(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    overrides = ["adapter.name=lora", "adapter.r=4", "adapter.base=float32", "train.lr=0.1"]
    run = finetuned(tmp_path, kind, "disk", *overrides)
    alone = export_run(run, tmp_path / "adapter")
    assert {path.name for path in alone.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "recipe.json",
    }
    whole = export_run(run, tmp_path / "whole", merge=True)
    tokens = torch.randint(BYTES_VOCAB, (2, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        beside = PeftModel.from_pretrained(library(tmp_path / kind), str(alone)).eval()
    with open_run(run) as frozen, torch.no_grad():
        ours = logits_of(frozen, tokens)
    torch.testing.assert_close(outputs_of(beside, tokens), ours, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs_of(library(whole), tokens), ours, rtol=1e-5, atol=1e-5)
    assert (outputs_of(library(tmp_path / kind), tokens) - ours).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "base"), [("llama", "nf4"), ("gpt2", "int8")])
def test_merged_weights_that_were_quantised_have_the_logits_of_the_run(
    kind: str, base: str, tmp_path: Path
) -> None:
    overrides = ["adapter.name=lora", "adapter.r=4", f"adapter.base={base}", "train.lr=0.1"]
    run = finetuned(tmp_path, kind, "disk", *overrides)
    merged = library(export_run(run, tmp_path / "whole", merge=True))
    assert merged.dtype == torch.float32
    tokens = torch.randint(BYTES_VOCAB, (2, 20))
    with open_run(run) as frozen, torch.no_grad():
        ours = logits_of(frozen, tokens)
    torch.testing.assert_close(outputs_of(merged, tokens), ours, rtol=1e-5, atol=1e-5)
    assert (outputs_of(library(tmp_path / kind), tokens) - ours).abs().max() > 1e-3


def test_only_an_adapter_is_merged(tmp_path: Path) -> None:
    run = finetuned(tmp_path)
    with pytest.raises(ConfigError, match="--merge: found a run without an adapter"):
        export_run(run, tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_a_plan_needs_the_configuration_alone(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "qwen3", vocab_size=BYTES_VOCAB)
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    plan = job.plan_recipe(finetune_recipe(folder), "cpu-4gib")
    assert plan.fits
    assert plan.num_parameters > 0
