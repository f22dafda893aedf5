"""Adapters over frozen weights in 8 and 4 bits: bitsandbytes' own layers, the same bits at every tier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import make_folder
from hf_training import setting, trained, uncounted
from safetensors.torch import load_file
from torch import Tensor, nn

from lowmem.blocks.run_dir import RunDir
from lowmem.errors import ConfigError
from lowmem.models.huggingface import quantised as module
from lowmem.models.huggingface.model import HuggingfaceLm
from lowmem.models.huggingface.quantised import FrozenLinear, quantised, whole
from lowmem.recipe import Quantised

uncounted_activations = pytest.fixture(autouse=True)(uncounted)
LORA: dict[str, Any] = {"name": "lora", "r": 4, "alpha": 8.0}
KINDS: tuple[Quantised, ...] = ("int8", "nf4")
DTYPES = [torch.float32, torch.bfloat16]


def theirs(kind: Quantised, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' own layer with frozen weights, as it is trained."""
    import bitsandbytes

    rows, columns = weight.shape
    has = bias is not None
    if kind == "nf4":
        layer: Any = bitsandbytes.nn.Linear4bit(
            columns, rows, bias=has, compute_dtype=dtype, quant_type="nf4", compress_statistics=False
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=False, blocksize=64
        )
    else:
        layer = bitsandbytes.nn.Linear8bitLt(columns, rows, bias=has, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    made: nn.Module = layer.to("cpu").train()
    return made


def ours(kind: Quantised, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
    with torch.device("meta"):
        layer = FrozenLinear(kind, nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None))
    for name, value in quantised(kind, weight).items():
        assert value.shape == layer.get_parameter(name).shape
        assert value.dtype == layer.packed[name].dtype
        layer.register_parameter(name, nn.Parameter(value, requires_grad=False))
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 64), (30, 50)], ids=str)  # whole blocks of 64 weights, and not
def test_products_and_gradients_are_those_of_bitsandbytes_own_layers_to_the_bit(
    kind: Quantised, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    for given in (bias, None):
        outs, grads = [], []
        for layer in (ours(kind, weight, given), theirs(kind, weight, given, dtype)):
            torch.manual_seed(1)
            x = torch.randn(2, 7, shape[1]).to(dtype).requires_grad_()
            out = layer(x)
            out.backward(torch.randn_like(out))
            assert x.grad is not None
            outs.append(out)
            grads.append(x.grad)
        assert torch.equal(*outs)
        assert torch.equal(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_quantised_in_slices_as_they_are_whole(
    kind: Quantised, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(40, 96)
    at_once = quantised(kind, weight)
    monkeypatch.setattr(module, "SLICE_NUMEL", 256)
    in_slices = quantised(kind, weight)
    assert all(torch.equal(at_once[name], in_slices[name]) for name in at_once)


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", pytest.param("phi3", marks=pytest.mark.slow)])
def test_streamed_equals_resident_to_the_bit_and_frozen_files_hold_the_quantised_folder(
    kind: str, base: Quantised, tmp_path: Path
) -> None:
    folder, adapter = make_folder(tmp_path / "model", kind), {**LORA, "base": base}
    plan, resident = trained(tmp_path / "resident", folder, "device", adapter=adapter)
    _, streamed = trained(tmp_path / "streamed", folder, "disk", adapter=adapter)
    assert plan.settings.frozen == base
    assert resident.keys() == streamed.keys()
    assert all(torch.equal(value, streamed[name]) for name, value in resident.items())
    source = {}
    for file in folder.glob("*.safetensors"):
        source.update(load_file(file))
    with torch.device("meta"):
        model = setting(folder, "device", adapter=adapter)[1]()
    assert isinstance(model, HuggingfaceLm)
    names = model.file_names()
    for name, layer in model.quantised.items():
        weight = source[names[f"{name}.weight"]]
        wanted = quantised(base, weight.T if layer.transposed else weight)
        for leaf, value in wanted.items():
            assert torch.equal(value, streamed[f"{name}.{leaf} weight"]), name
    state = RunDir(tmp_path / "streamed").read_state()
    assert state is not None
    assert {r.name.split(".")[1] for key, r in state.files.items() if key != "shared"} == {"000000"}


def test_few_bits_are_a_weights_worth_of_loss(tmp_path: Path) -> None:
    weight = torch.randn(64, 128)
    errors = []
    for kind in ("nf4", "int8"):
        kept = quantised(kind, weight)
        made = whole(kind, kept["weight"], kept["scales"], (64, 128), torch.float32)
        errors.append(float((made - weight).pow(2).mean().sqrt()))
    assert 0.05 < errors[0] < 0.12
    assert 0.002 < errors[1] < 0.02


def test_random_weights_are_not_quantised(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    with pytest.raises(ConfigError, match=r"adapter.base: found nf4; allowed with model.weights random"):
        setting(folder, "disk", adapter={**LORA, "base": "nf4"}, model__weights="random")
