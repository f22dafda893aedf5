"""A model's folder as Hugging Face writes it: config.json, and weights in safetensors files.

Only JSON and safetensors are read. Weights come tensor by tensor, so the whole is never in memory.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lowmem.errors import ConfigError
from lowmem.files import printable, read_json
from lowmem.units import MIB, counted

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MOST_CONFIG_BYTES = MIB
DTYPES = ("F64", "F32", "F16", "BF16")  # of weights that can be copied as numbers
# Files of other kinds, and how weights in them become safetensors
CONVERT = {
    "*.bin": "pickle files, which can run code; convert them on a machine of your trust: "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",
    "*.gguf": "GGUF, which holds quantised weights; convert it: "
    "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(NEW_FOLDER)",
}
TABLES = r"rotary_emb\.inv_freq$"  # computed tables that old files hold beside the weights


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises ConfigError where the folder has none that can be read."""
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{printable(folder)}: no {CONFIG} in it; allowed: a model's folder with {CONFIG} and "
            f"safetensors files{_other_kind(folder)}; give the path of one"
        )
    return read_json(path.resolve(), ConfigError, MOST_CONFIG_BYTES)


def shards_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises ConfigError where there are none, or one is missing."""
    index = folder / INDEX
    if index.is_file():
        names = read_json(index.resolve(), ConfigError).get("weight_map")
        found = sorted(set(names.values())) if isinstance(names, dict) else []
        if not found or any(not isinstance(name, str) or Path(name).name != name for name in found):
            raise ConfigError(
                f"{printable(index)}: holds no weight_map of file names; restore it from a copy"
            )
    else:
        found = [SINGLE]
    for name in found:
        if not (folder / name).is_file():
            raise ConfigError(
                f"{printable(folder / name)}: missing; allowed: all {counted(len(found), 'file')} of weights"
                f"{_other_kind(folder)}; restore it from a copy"
            )
    return [(folder / name).resolve() for name in found]


def _other_kind(folder: Path) -> str:
    with contextlib.suppress(OSError):
        for pattern, words in CONVERT.items():
            if any(folder.glob(pattern)):
                return f"; found {words}"
    return ""


class FolderWeights:
    """The weights of a folder under the model's own names. Files are opened when they are first needed."""

    def __init__(
        self,
        folder: Path,
        theirs: Mapping[str, str],
        body: str,
        renamed: tuple[tuple[str, str], ...],
        ignored: list[str],
    ) -> None:
        """`theirs`: the name in a file by the name in the model. `body`: what all names but the head's begin
        with; some files leave it out. `renamed`: see `Family`. `ignored`: patterns of what is no weight.
        """
        self._folder, self._theirs, self._body, self._renamed = folder, theirs, f"{body}.", renamed
        self._ignored = re.compile("|".join([*ignored, TABLES]))
        self._found: dict[
            str, tuple[Any, str, Path]
        ] = {}  # by a name of now: the open file, and a name in it

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ConfigError for a tensor that is missing, too much, or of another shape or kind."""
        self._open()
        for name, shape in shapes.items():
            wanted = self._theirs[name]
            if wanted not in self._found:
                raise ConfigError(
                    f"{printable(self._folder)}: tensor {wanted} is missing in its files; allowed: every "
                    "weight of the model that its config.json describes; restore the folder from a copy"
                )
            file, stored, path = self._found[wanted]
            part = file.get_slice(stored)
            found, kind = tuple(part.get_shape()), part.get_dtype()
            if found != shape:
                raise ConfigError(
                    f"{printable(path)}: tensor {stored} has shape {list(found)}; allowed: {list(shape)}, as "
                    "config.json says; restore one of them from a copy"
                )
            if kind not in DTYPES:
                raise ConfigError(
                    f"{printable(path)}: tensor {stored} is {kind}; allowed: {', '.join(DTYPES)}; "
                    "give the folder of the original weights"
                )
        others = set(self._found) - {self._theirs[name] for name in shapes}
        for extra in sorted(name for name in others if not self._ignored.search(name)):
            _, stored, path = self._found[extra]
            raise ConfigError(
                f"{printable(path)}: tensor {stored} has no place in the model that config.json describes; "
                "allowed: its weights alone; check config.json"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._theirs

    def read(self, name: str) -> Tensor:
        """A weight, in the file's own dtype."""
        self._open()
        file, stored, path = self._found[self._theirs[name]]
        try:
            tensor: Tensor = file.get_tensor(stored)
        except (SafetensorError, OSError) as problem:
            raise ConfigError(f"{printable(path)}: {problem}; restore it from a copy") from None
        return tensor

    def close(self) -> None:
        self._found = {}

    def _open(self) -> None:
        if self._found:
            return
        paths: dict[str, tuple[Any, str, Path]] = {}
        for path in shards_of(self._folder):
            try:
                file: Any = safe_open(path, framework="pt")
                names = list(file.keys())
            except (SafetensorError, OSError) as problem:
                raise ConfigError(f"{printable(path)}: {problem}; restore it from a copy") from None
            for stored in names:
                if stored in paths:
                    raise ConfigError(
                        f"{printable(path)}: tensor {stored} lies in another file too; keep one"
                    )
                paths[stored] = file, stored, path
        whole = any(name.startswith(self._body) for name in paths)
        for stored, place in paths.items():
            name = self._now(stored)
            if not whole and not name.startswith("lm_head."):
                name = self._body + name
            self._found[name] = place

    def _now(self, name: str) -> str:
        for before, after in self._renamed:
            if name.startswith(before):
                return after + name[len(before) :]
        return name
