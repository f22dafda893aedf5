"""The data of a run, from the identity that its plan keeps: what they must be, and what is read without them.

`spec_of` and `tokenizer_of` open no text and no picture, so a finished run is sampled and exported without
its data. `own_data` opens the data where the recipe says, and only if they are still the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowmem.blocks.run_dir import RunDir
from lowmem.data.chat_tokens import tokenizer_mark
from lowmem.data.config import ChatData, DataSection, TextConfig
from lowmem.data.datasets import Dataset, DataSpec, describe_data, identify_data, load_data
from lowmem.data.identity import DataIdentity
from lowmem.data.text import load_tokenizer
from lowmem.data.tokenizer import Tokenizer, characters
from lowmem.errors import DataError, ResumeError
from lowmem.planning.plan import Plan, read_plan
from lowmem.units import counted, format_bytes

Notice = tuple[str, dict[str, Any]]  # a telemetry record: event and fields
NEEDED = ("image_shape", "num_classes", "vocab_size", "class_names", "tokenizer")  # by the model's weights


def spec_of(plan: Plan) -> DataSpec:
    """What the run's model must know of its data."""
    seq_len, identity = plan.recipe.train.seq_len, plan.data
    if identity is None:
        _refuse_remote(plan.recipe.data)
        return describe_data(plan.recipe.data, seq_len)
    if identity.vocab_size is not None:
        return DataSpec(vocab_size=identity.vocab_size, seq_len=seq_len)
    channels, height, width = identity.image_shape or (0, 0, 0)
    return DataSpec((channels, height, width), identity.num_classes, image_scale=identity.image_scale or 1.0)


def tokenizer_of(plan: Plan) -> Tokenizer | None:
    """The tokenizer that the run was trained with; None where its data are no text.

    Raises DataError when the tokenizer's files are gone or have changed.
    """
    section, identity = plan.recipe.data, plan.data
    if not isinstance(section, TextConfig):
        return None
    if section.tokenizer_name == "characters":
        if identity is not None and identity.alphabet is not None:
            return characters(identity.alphabet)
        _refuse_remote(section)
    tokenizer = load_tokenizer(section)
    if identity is not None and identity.tokenizer != tokenizer.fingerprint:
        raise DataError(
            f"data.tokenizer: {section.tokenizer_name}: found {tokenizer.fingerprint}, trained with "
            f"{identity.tokenizer}; restore the tokenizer's files from a copy"
        )
    return tokenizer


def require_sources(plan: Plan) -> None:
    """Raises DataError where what the run's model was built from has changed: its folder's configuration, or
    the tokenizer of its rows.
    """
    found = plan.recipe.model.fingerprint()
    if found != plan.model_source:
        raise DataError(
            f"model.path: {getattr(plan.recipe.model, 'path', '')}: found a configuration of fingerprint "
            f"{found}, trained with {plan.model_source}; restore the folder from a copy"
        )
    section = plan.recipe.data
    if isinstance(section, ChatData) and plan.data is not None:
        mark = tokenizer_mark(Path(section.tokenizer)).hexdigest()
        if mark != plan.data.tokenizer:
            raise DataError(
                f"data.tokenizer: {section.tokenizer}: found {mark}, trained with {plan.data.tokenizer}; "
                "restore the tokenizer's files from a copy"
            )


def require_known_data(plan: Plan, folder: Path) -> None:
    """Raises where a run folder alone does not say enough to open the data: see `_refuse_remote`. A plan that
    keeps no fingerprint may name any file.
    """
    _refuse_remote(plan.recipe.data)
    if plan.data is None:
        raise ResumeError(
            f"run folder {folder}: keeps no fingerprint of its data; go on with the command, or the "
            "program, that began it"
        )


def own_data(plan: Plan) -> Dataset:
    """The run's own data, not augmented. Raises DataError where they are gone, elsewhere, or have changed."""
    section, seq_len = plan.recipe.data, plan.recipe.train.seq_len
    _refuse_remote(section)
    if plan.data is not None:
        change = _change(plan.data, identify_data(section, seq_len))
        if change:
            raise DataError(
                f"data: {change}; restore the data from a copy, or name what to evaluate on, as in "
                "--data path=FILE"
            )
    return load_data(section, seq_len, tokenizer_of(plan), augmented=False)


def _refuse_remote(section: DataSection) -> None:
    """What a run folder alone says opens no connection."""
    if section.remote:
        dataset = getattr(section, "dataset", "NAME")
        raise DataError(
            f"data.name: '{getattr(section, 'name', '')}' may use the network, which a run folder alone does "
            f"not start; name the data set, as in --data dataset={dataset}"
        )


def _change(trained: DataIdentity, found: DataIdentity) -> str:
    """What differs, in words; nothing where the data are the same."""
    if trained.fingerprint == found.fingerprint and trained.tokenizer == found.tokenizer:
        return ""
    return f"found {_words(found)}, trained on {_words(trained)}"


def _words(identity: DataIdentity) -> str:
    kept = f"{counted(identity.num_items, 'item')} of {format_bytes(identity.num_bytes)}"
    return f"{kept} (fingerprint {identity.fingerprint[:12]})"


def with_identity(plan: Plan, folder: Path, accept: bool) -> tuple[Plan, list[Notice]]:
    """The plan with the identity of its data, for a run that begins or goes on in `folder`.

    Changed data are refused with ResumeError, unless `accept`. Then the notices hold a record of the change,
    and `keep_identity` is to be called. A change of shapes, classes or tokenizer is refused always, because
    the weights were made for the old ones.
    """
    found = identify_data(plan.recipe.data, plan.recipe.train.seq_len)
    trained = plan.data
    if not RunDir(folder).exists():
        return plan.model_copy(update={"data": found}), []
    if trained is not None:
        change = _change(trained, found)
        if not change:
            return plan, []
        if not accept:
            raise ResumeError(
                f"run folder {folder}: data changed: {change}; restore the data from a copy, or take another "
                "--run-dir, or give --accept-data to go on with what is there now"
            )
        found = _accepted(trained, found, folder)
    before = None if trained is None else trained.fingerprint
    record = {"before": before, "now": found.fingerprint, "num_items": found.num_items}
    return plan.model_copy(update={"data": found}), [("data_accepted", record)]


def _accepted(trained: DataIdentity, found: DataIdentity, folder: Path) -> DataIdentity:
    """What is found, read with the alphabet of the run. Raises ResumeError for data of another kind."""
    keeps_alphabet = trained.alphabet is not None
    for key in NEEDED:
        was, now = getattr(trained, key), getattr(found, key)
        if was != now and not (keeps_alphabet and key == "vocab_size"):
            raise ResumeError(
                f"run folder {folder}: data changed in {key}: found {now}, trained on {was}; allowed with "
                "--accept-data: the same; restore the data, or take another --run-dir"
            )
    kept = {
        "alphabet": trained.alphabet,
        "vocab_size": trained.vocab_size,
        "image_scale": trained.image_scale,
    }
    return found.model_copy(update={**kept, "earlier": [*trained.earlier, trained.fingerprint]})


def keep_identity(folder: Path, identity: DataIdentity) -> None:
    """Replaces the identity in the plan of a run that stands in `folder`, under the run's lock."""
    run = RunDir(folder)
    run.acquire()
    try:
        run.replace_plan(read_plan(run).model_copy(update={"data": identity}).to_dict())
    finally:
        run.release()
