"""`lowmem export`: a run's weights as ordinary safetensors files, one for each block, with an index of what
is where.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import torch

from lowmem.blocks.arena import SAFETENSORS_DTYPE, Arena, ArenaLayout, parameter_views
from lowmem.blocks.run_dir import BASE_KEY, block_key
from lowmem.errors import ConfigError
from lowmem.inference.export_adapter import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    adapter_weights,
    merged,
    peft_config,
    peft_names,
)
from lowmem.inference.frozen_run import FrozenRun, open_run
from lowmem.models.base import BuildModel
from lowmem.models.huggingface.classifier import PREPROCESSOR, HuggingfaceVit
from lowmem.models.huggingface.folder import CONFIG, read_config
from lowmem.models.huggingface.model import HuggingfaceLm
from lowmem.planning.settings import base_layout_of
from lowmem.recipe import QUANTISED

INDEX, RECIPE = "model.safetensors.index.json", "recipe.json"
# What lies beside the weights in a Hugging Face folder, and goes with them.
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
    PREPROCESSOR,
)


def export_run(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    merge: bool = False,
    build_model: BuildModel | None = None,
) -> Path:
    """Writes the last commit's weights, or their average where one is kept, to a new folder. Returns it.

    Optimizer state is left out. Blocks that stay on the device in training are all in memory, else one at a
    time; nothing is copied to be written. Names are the model's own: `build_model().load_state_dict` takes
    all files' tensors together. A decoder from a Hugging Face folder becomes such a folder again, with its
    names, config.json and tokenizer: `from_pretrained` loads it. Only one whose blocks were trained alone
    does not, because its layers do not follow each other. Of a run that trained an adapter it is peft's
    folder of the adapter alone, or with `merge` the whole model with the adapter in its weights.
    `build_model`: of a model of your own (`custom`).
    Raises ResumeError if the folder holds no run, ConfigError if `out` exists or cannot be made, or for
    `merge` of a run without an adapter.
    """
    folder = Path(out)
    with open_run(run_dir, build_model=build_model) as frozen, torch.no_grad():
        if merge and not is_adapted(frozen):
            raise ConfigError("--merge: found a run without an adapter; leave it out")
        try:
            folder.mkdir(parents=True)
        except OSError as problem:
            raise ConfigError(
                f"{folder}: {problem.strerror}; it is left as it is; give a folder that is not there yet"
            ) from None
        if is_adapted(frozen) and not merge:
            _write_adapter(folder, frozen)
        else:
            _write_weights(folder, frozen)
        _write(folder / RECIPE, frozen.plan.recipe.to_dict())
    return folder


def is_adapted(frozen: FrozenRun) -> bool:
    """Whether an adapter was trained, and not some of the model's own weights."""
    return frozen.plan.recipe.adapter is not None


def _write_weights(folder: Path, frozen: FrozenRun) -> None:
    """A file for each block and one for the rest, with an index of what is where."""
    where, stream, model = dict[str, str](), frozen.stream, frozen.model
    base = base_layout_of(model, frozen.plan.settings)
    shared = None if is_adapted(frozen) else frozen.shared_layout
    count = len(frozen.blocks) + (base is not None) + (shared is not None)
    # Blocks that were trained alone are not one after the other what `from_pretrained` would take them for.
    library = model if isinstance(model, HuggingfaceLm | HuggingfaceVit) and model.whole else None
    names = {} if library is None else library.file_names()
    adapter = adapter_weights(frozen) if is_adapted(frozen) else {}

    def save(number: int, key: str, layout: ArenaLayout, weights: torch.Tensor) -> None:
        views = parameter_views(layout, weights)
        if isinstance(library, HuggingfaceLm) and adapter:
            views = merged(library, library.whole_weights(views, frozen.dtype), adapter)
        views = {names.get(name, name): view for name, view in views.items()}
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        _save(views, folder / name, key)
        where.update(dict.fromkeys(views, name))

    for block in frozen.blocks:
        buffer = stream.load(block)
        layout = frozen.layouts[block]
        save(block + 1, block_key(block), layout, Arena(layout, buffer).result)
        stream.release(block, buffer)
    if base is not None:
        weights = Arena(base, stream.load_whole(BASE_KEY, base)).weights
        save(len(frozen.blocks) + 1, BASE_KEY, base, weights)
    if shared is not None:
        save(count, "shared", shared, stream.load_shared_result())
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    _write(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    if library is not None:
        _write_beside(folder, frozen, library)


def _write_adapter(folder: Path, frozen: FrozenRun) -> None:
    """A folder that peft loads beside the model's own."""
    model = frozen.model
    assert isinstance(model, HuggingfaceLm), "no other model is adapted"
    weights = adapter_weights(frozen)
    names = peft_names(model, list(weights))
    _save({names[name]: view for name, view in weights.items()}, folder / PEFT_WEIGHTS, "adapter")
    _write(folder / PEFT_CONFIG, peft_config(frozen, model))


def _write_beside(folder: Path, frozen: FrozenRun, model: HuggingfaceLm | HuggingfaceVit) -> None:
    """The configuration with the weights' dtype and the library's class, and the tokenizer's files."""
    source, settings = Path(getattr(frozen.plan.recipe.model, "path", "")), frozen.plan.settings
    content = {key: value for key, value in read_config(source).items() if key != "torch_dtype"}
    adapted = is_adapted(frozen) and settings.frozen
    dtype = adapted or ("float32" if settings.ema else settings.weights)
    if isinstance(model, HuggingfaceVit):
        content |= model.content(None if frozen.plan.data is None else frozen.plan.data.class_names)
    made: str = settings.precision if dtype in QUANTISED else dtype  # quantised ones are made whole
    _write(folder / CONFIG, {**content, "architectures": [model.family.model], "dtype": made})
    for name in BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _save(tensors: dict[str, torch.Tensor], path: Path, part: str) -> None:
    """A safetensors file, written from the tensors themselves: there is room for no second copy."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", "part": part}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = SAFETENSORS_DTYPE[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.cpu().flatten().view(torch.uint8).numpy().data)


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
