"""Tokens of a conversation, a question with its answer, or a text, and which of them are to be learnt.

Of a conversation that is what the assistant says: as the template of the tokenizer marks it, else by the
difference of what it writes with and without an answer. Only local files are read, and no code that comes
with them is run.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from lowmem.data.chat_rows import columns_of
from lowmem.data.identity import Fingerprint
from lowmem.data.packages import imported
from lowmem.errors import DataError
from lowmem.files import printable
from lowmem.units import MIB, shown

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
NEEDED = FILES[0]
MOST_BYTES = 256 * MIB
MARK = "generation"  # the words with which a template marks an answer


class Sequence(NamedTuple):
    """Tokens, and for each whether it is to be learnt."""

    tokens: list[int]
    learnt: list[bool]
    splits: bool = False  # a text: where it is too long, it becomes several


class Span(NamedTuple):
    """Characters of a text."""

    start: int
    stop: int


def tokenizer_mark(folder: Path) -> Fingerprint:
    """Of the tokenizer's files in a folder. Raises DataError where it has none."""
    mark = Fingerprint()
    if not (folder / NEEDED).is_file():
        raise DataError(
            f"data.tokenizer: {printable(folder)}: no {NEEDED} in it; allowed: a folder with one; write it: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    for name in FILES:
        if (folder / name).is_file():
            mark.file(name, (folder / name).resolve())
    if mark.num_bytes > MOST_BYTES:
        raise DataError(
            f"data.tokenizer: {printable(folder)}: {mark.num_bytes} bytes; allowed: at most {MOST_BYTES}; "
            "give a tokenizer's own files"
        )
    return mark


def load_chat_tokenizer(folder: Path) -> Any:
    """transformers' own tokenizer of a folder. Raises DataError."""
    library = imported("transformers", "data.name: 'chat'")
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as problem:  # the library's errors are of many kinds
        said = shown(" ".join(str(problem).split()), 200)
        raise DataError(
            f"data.tokenizer: {printable(folder)}: not readable ({said}); restore it from a copy"
        ) from None
    if not tokenizer.is_fast:
        raise DataError(
            f"data.tokenizer: {printable(folder)}: {type(tokenizer).__name__} does not say where its tokens "
            f"lie in a text; allowed: a tokenizer with a {NEEDED}; give such a one"
        )
    return tokenizer


class ChatTokenizer:
    """Makes sequences of rows."""

    def __init__(self, folder: Path) -> None:
        self._inner = load_chat_tokenizer(folder)
        self._folder = folder
        template = self._inner.chat_template
        self._marked = isinstance(template, str) and f"{MARK} %}}" in template.replace("-%}", " %}")

    @property
    def vocab_size(self) -> int:
        return int(max(self._inner.get_vocab().values())) + 1

    def sequences(self, row: dict[str, Any], where: str) -> list[Sequence]:
        """One sequence in most cases. Several where a template writes earlier answers otherwise than the
        last one: then each answer has a sequence of its own. `where` begins a DataError's message.
        """
        columns = columns_of(row, where)
        if columns == ("messages",):
            return self._conversation(_messages(row["messages"], where), where)
        for name in columns:
            if not isinstance(row[name], str):
                found = type(row[name]).__name__
                raise DataError(f"{where}: {name} is {found}; allowed: text; mend it")
        before = row["prompt"] if columns[0] == "prompt" else ""
        return [self._plain(before, row[columns[-1]])._replace(splits=columns == ("text",))]

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Tokens of a conversation up to where the assistant is to answer."""
        return self._tokens(self._written(messages, "--chat", True), []).tokens

    def decode(self, tokens: list[int]) -> str:
        return str(self._inner.decode(tokens, skip_special_tokens=True))

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer."""
        return [] if self._inner.eos_token_id is None else [int(self._inner.eos_token_id)]

    # --------------------------------------------------------------------------------------------------------

    def _plain(self, before: str, text: str) -> Sequence:
        found = self._tokens(before + text, [Span(len(before), len(before + text))], special=True)
        ends = self.ends
        if text and ends and found.tokens[-1:] != ends:
            return Sequence(found.tokens + ends, [*found.learnt, True])
        return found

    def _conversation(self, messages: list[dict[str, Any]], where: str) -> list[Sequence]:
        if self._marked:
            made = self._applied(messages, where, return_dict=True, return_assistant_tokens_mask=True)
            return [Sequence(list(made["input_ids"]), [bool(mask) for mask in made["assistant_masks"]])]
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        parts = []
        for index in answers:
            before = self._written(messages[:index], where, True)
            after = self._written(messages[: index + 1], where, False)
            if not after.startswith(before):
                raise DataError(
                    f"{where}: the template of {printable(self._folder)} cannot be split into turns: what it "
                    "writes before an answer is not how the conversation with the answer begins; allowed: a "
                    "template that marks answers with generation, or one that can; give another tokenizer"
                )
            parts.append((before, after))
        texts = [after for _, after in parts]
        if all(later.startswith(earlier) for earlier, later in pairwise(texts)):
            spans = [Span(len(before), len(after)) for before, after in parts]
            return [self._tokens(texts[-1] if texts else self._written(messages, where, False), spans)]
        return [self._tokens(after, [Span(len(before), len(after))]) for before, after in parts]

    def _written(self, messages: list[dict[str, Any]], where: str, asks: bool) -> str:
        """What the template makes of messages. `asks`: the assistant is to go on."""
        return str(self._applied(messages, where, tokenize=False, add_generation_prompt=asks))

    def _applied(self, messages: list[dict[str, Any]], where: str, **how: bool) -> Any:
        try:
            return self._inner.apply_chat_template(messages, **how)
        except Exception as problem:  # a template may raise anything
            said = shown(" ".join(str(problem).split()), 200)
            raise DataError(
                f"{where}: the template of {printable(self._folder)} does not take it ({said}); mend the "
                "row, or give a tokenizer with a chat template"
            ) from None

    def _tokens(self, text: str, spans: list[Span], special: bool = False) -> Sequence:
        """A token is learnt where it begins in one of the spans."""
        made = self._inner(
            text, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False
        )
        learnt = [
            stop > start and any(span.start <= start < span.stop for span in spans)
            for start, stop in made["offset_mapping"]
        ]
        return Sequence(list(made["input_ids"]), learnt)


def _messages(given: Any, where: str) -> list[dict[str, Any]]:
    """Raises DataError unless these are messages with roles."""
    if isinstance(given, str):  # a table holds them as JSON
        try:
            given = json.loads(given)
        except ValueError:
            given = None
    if not isinstance(given, list) or not given:
        raise DataError(f"{where}: messages: allowed: a list of at least one message; mend it")
    for message in given:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: messages: allowed: objects with a role and a content; mend it")
    # A table has every column in every message, those that are not there as null.
    return [{key: value for key, value in message.items() if value is not None} for message in given]
