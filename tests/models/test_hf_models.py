"""A decoder of transformers as a model of blocks: the library's own results, and folders that are refused."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import FAMILIES, LENGTH, VOCAB, content_of, library_model, make_folder
from safetensors.torch import load_file, save_file

from lowmem.blocks.arena import bind
from lowmem.data.datasets import DataSpec
from lowmem.errors import ConfigError
from lowmem.machine.profile import load_profile
from lowmem.models.base import check_model
from lowmem.models.huggingface.families import config_of
from lowmem.models.huggingface.folder import INDEX
from lowmem.models.huggingface.model import HuggingfaceLm
from lowmem.planning.passes import PassCounter
from lowmem.planning.plan import make_plan
from lowmem.recipe import NoiseConfig, recipe_from_dict


def built(folder: Path, **model: Any) -> HuggingfaceLm:
    raw = {
        "schema": 1,
        "method": "end_to_end",
        "model": {"name": "huggingface", "path": str(folder), **model},
        "data": {"name": "custom"},
        "train": {"num_steps": 1, "batch_size": 2, "lr": 1e-3, "seq_len": LENGTH},
    }
    recipe = recipe_from_dict(raw, "test")
    with torch.device("meta"):
        found = recipe.model.builder(recipe, DataSpec(vocab_size=VOCAB, seq_len=LENGTH))()
    assert isinstance(found, HuggingfaceLm)
    return found


def shapes(model: HuggingfaceLm) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def with_weights(model: HuggingfaceLm) -> HuggingfaceLm:
    given = model.given_weights()
    assert given is not None
    given.check(shapes(model))
    bind(model, {name: given.read(name) for name in shapes(model)}, None)
    return model.eval()


def logits_of(model: HuggingfaceLm, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    objective = model.make_objective(NoiseConfig())
    h, cond, kept = objective.enter(batch)
    for layer in model.layers:
        h = objective.through([layer], h, cond, kept)
    return model.logits(model.output_part(h, cond))


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_logits_layer_by_layer_are_the_librarys_own_to_the_bit(kind: str, tmp_path: Path) -> None:
    model = built(make_folder(tmp_path / "model", kind))
    check_model(model)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    tokens = torch.randint(VOCAB, (3, LENGTH))
    theirs = library_model(kind).eval()(input_ids=tokens).logits
    assert torch.equal(logits_of(with_weights(model), {"tokens": tokens}), theirs)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3_text", "gpt2"])
@torch.no_grad()
def test_documents_in_one_row_do_not_see_each_other(kind: str, tmp_path: Path) -> None:
    model = with_weights(built(make_folder(tmp_path / "model", kind)))
    first, second = torch.randint(VOCAB, (1, 10)), torch.randint(VOCAB, (1, LENGTH - 10))
    batch = {
        "tokens": torch.cat([first, second], 1),
        "documents": torch.tensor([[0] * 10 + [1] * (LENGTH - 10)]),
        "positions": torch.tensor([[*range(10), *range(LENGTH - 10)]]),
    }
    alone = [logits_of(model, {"tokens": tokens}) for tokens in (first, second)]
    torch.testing.assert_close(logits_of(model, batch), torch.cat(alone, 1), rtol=1e-5, atol=1e-5)


def test_random_weights_are_drawn_as_the_library_draws_them(tmp_path: Path) -> None:
    model = built(make_folder(tmp_path / "model", "llama"), weights="random")
    assert model.given_weights() is None
    scale = model.layers[0].mlp.up_proj
    scale.weight = torch.nn.Parameter(torch.empty(scale.weight.shape))
    model.draw_weights(scale)
    assert float(scale.weight.detach().std()) == pytest.approx(0.2, rel=0.1)


def test_older_names_and_names_without_a_beginning_are_understood(tmp_path: Path) -> None:
    neox, gpt2 = (
        make_folder(tmp_path / "neox", "gpt_neox", "1GB"),
        make_folder(tmp_path / "gpt2", "gpt2", "1GB"),
    )
    tables = {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}  # a mask that old files hold
    weights = load_file(gpt2 / "model.safetensors")
    save_file(
        {**tables, **{name.removeprefix("transformer."): value for name, value in weights.items()}},
        gpt2 / "model.safetensors",
    )
    weights = load_file(neox / "model.safetensors")
    save_file(
        {name.replace("lm_head.", "embed_out."): value for name, value in weights.items()},
        neox / "model.safetensors",
    )
    for folder in (neox, gpt2):
        with_weights(built(folder))


# ------------------------------------------------------------------------------------------------------------
# Refusals


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        model = built(folder)
        given = model.given_weights()
        assert given is not None
        given.check(shapes(model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_model_folder_is_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    assert "no config.json in it" in refusal(tmp_path)
    folder = make_folder(tmp_path / "model", "llama", "1GB")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors: missing; allowed: all 1 file of weights" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "found pickle files, which can run code; convert them" in refusal(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.gguf")
    assert "found GGUF" in refusal(folder)


def test_another_family_and_absurd_or_quantised_models_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    content = json.loads((folder / "config.json").read_text())
    for change, said in {
        "model_type": ("mamba", "model_type: found 'mamba'; allowed: llama, mistral, qwen2, qwen3,"),
        "num_hidden_layers": (10**9, "num_hidden_layers: found 1000000000; allowed: 1 to 256"),
        "quantization_config": ({"bits": 4}, "quantization_config: found weights that are quantised already"),
        "num_attention_heads": ("four", "num_attention_heads: found 'four'; allowed: 1 to"),
        "hidden_act": ("nonsense", "transformers does not build it ('nonsense'); restore"),
    }.items():
        (folder / "config.json").write_text(json.dumps({**content, change: said[0]}))
        assert said[1] in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "not readable as JSON" in refusal(folder)


def test_missing_extra_and_misshapen_tensors_are_named_with_their_file(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama", "1GB")
    path, weights = folder / "model.safetensors", load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({n: value for n, value in weights.items() if n != name}, path)
    assert f"tensor {name} is missing" in refusal(folder)
    save_file({**weights, name: weights[name][:5].contiguous()}, path)
    found = refusal(folder)
    assert f"model.safetensors: tensor {name} has shape [5, 32]; allowed: [48, 32]" in found
    save_file({**weights, "model.extra": torch.zeros(1)}, path)
    assert "model.safetensors: tensor model.extra has no place" in refusal(folder)
    save_file({**weights, name: weights[name].to(torch.int8)}, path)
    assert f"tensor {name} is I8; allowed: F64, F32, F16, BF16" in refusal(folder)
    path.write_bytes(path.read_bytes()[:500])
    assert "model.safetensors:" in refusal(folder)


def test_a_shard_that_is_missing_or_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.rename(tmp_path / shard.name)
    assert f"{shard.name}: missing" in refusal(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: f"../{shard.name}" for name in index["weight_map"]}
    (folder / INDEX).write_text(json.dumps(index))
    assert "holds no weight_map of file names" in refusal(folder)


def test_a_configuration_chooses_no_code(tmp_path: Path) -> None:
    plain = content_of("llama")
    config = config_of(
        {**plain, "auto_map": {"AutoModelForCausalLM": "evil.Model"}, "_attn_implementation": "some/kernels"},
        "test",
    )
    assert config._attn_implementation == "sdpa"


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama", vocab_size=VOCAB - 1)
    assert f"vocab_size {VOCAB - 1} is smaller than the tokenizer's {VOCAB} tokens" in refusal(folder)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "allowed with pretrained weights: end_to_end, because each layer expects"),
        ({"adapter": {"name": "lora", "base": "float32"}}, "allowed with an adapter"),
        ({"trainable": 1}, "or with frozen weights: end_to_end"),
    ],
    ids=["pretrained", "adapter", "frozen"],
)
def test_blocks_are_trained_alone_from_random_weights_alone(changes: dict[str, Any], words: str) -> None:
    model: dict[str, Any] = {"name": "huggingface", "path": "nowhere"}
    if changes:
        model |= {"weights": "random", **{k: v for k, v in changes.items() if k != "adapter"}}
    raw: dict[str, Any] = {
        "schema": 1,
        "method": "diffusion_blocks",
        "model": model,
        "data": {"name": "custom"},
        "train": {"num_steps": 1, "batch_size": 2, "lr": 1e-3, "seq_len": 8},
        **{k: v for k, v in changes.items() if k == "adapter"},
    }
    with pytest.raises(ConfigError, match=words) as caught:
        recipe_from_dict(raw, "test")
    assert "\n" not in str(caught.value)


def test_a_deep_model_is_counted_by_its_first_layers_as_it_is_counted_whole(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama", num_hidden_layers=7)
    for recompute in (False, True):
        raw = {
            "schema": 1,
            "method": "end_to_end",
            "model": {"name": "huggingface", "path": str(folder)},
            "data": {"name": "custom"},
            "train": {"num_steps": 1, "batch_size": 2, "lr": 1e-3, "seq_len": LENGTH, "recompute": recompute},
        }
        recipe = recipe_from_dict(raw, "test")
        build = recipe.model.builder(recipe, DataSpec(vocab_size=VOCAB, seq_len=LENGTH))
        settings = make_plan(build, recipe, load_profile("cpu-4gib")).settings
        with torch.device("meta"):
            model = build()
        objective = model.make_objective(NoiseConfig())
        by_first = PassCounter(model, objective, recipe)(range(7), settings)
        model.layers_alike = False
        assert PassCounter(model, objective, recipe)(range(7), settings) == by_first


def test_a_model_that_nothing_holds_is_gone_at_once(tmp_path: Path) -> None:
    """With its weights: a cycle of references would keep them until the next garbage collection."""
    model = built(make_folder(tmp_path / "model", "gemma3_text"))
    alive = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()
