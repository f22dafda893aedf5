"""`data.name: chat`: conversations, questions with answers, or texts, for a decoder that has a tokenizer.

The file is tokenised once, in a process of its own, into files of the cache that are mapped into memory. A
row of a batch is one sequence, padded; or with `pack` several sequences after one another, which do not see
each other. What is cut, left out or empty is counted and said.
"""

from __future__ import annotations

import json
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from lowmem.data.cache import cache_dir, cached, content_facts, digest
from lowmem.data.chat_rows import READERS, rows_of
from lowmem.data.chat_tokens import ChatTokenizer, Sequence, tokenizer_mark
from lowmem.data.datasets import ArrayBatch, DataSection, Dataset, DataSpec
from lowmem.data.identity import DataIdentity, Fingerprint, Vocabulary
from lowmem.data.image_source import TestFraction
from lowmem.data.images import Array
from lowmem.data.opening import open_file
from lowmem.data.tokenizer import Tokenizer
from lowmem.errors import ConfigError, DataError
from lowmem.files import printable
from lowmem.units import counted, round_up

T = TypeVar("T")
VERSION = 1  # of the cache's files
LEARNT = np.uint32(1 << 31)  # marks a token that is to be learnt, beside its number
IGNORED = -100  # the label of a token that is not
WIDTHS = 64  # a padded batch is as wide as its longest row, rounded up to a multiple of this
SHOWN = 5  # line numbers in a message


class ChatData(DataSection):
    name: Literal["chat"]
    path: str  # of a .jsonl, .csv, .parquet or .txt file
    tokenizer: str  # of a folder with tokenizer.json and a chat template
    pack: bool = False  # several sequences in a row
    test_fraction: TestFraction = 0.05
    # Declared, a plan reads neither the file nor the tokenizer.
    vocab_size: Vocabulary | None = None

    @property
    def packages(self) -> tuple[str, ...]:
        return ("transformers", *(["datasets"] if Path(self.path).suffix in READERS else []))

    def identify(self, seq_len: int | None) -> DataIdentity:
        mark = Fingerprint()
        mark.file("rows", Path(self.path))
        mark.num_items = 1
        tokenizer = tokenizer_mark(Path(self.tokenizer)).hexdigest()
        # The rows are not looked into: somebody else's run may name any file.
        return mark.identity(vocab_size=_vocab_size(Path(self.tokenizer), tokenizer), tokenizer=tokenizer)

    def describe(self, seq_len: int | None, tokenizer: Tokenizer | None) -> DataSpec:
        length = _required(seq_len)
        if self.vocab_size:
            return DataSpec(vocab_size=self.vocab_size, seq_len=length)
        data = self.load(length, None, False)
        return DataSpec(vocab_size=data.vocab_size, seq_len=length, num_test=data.num_test)

    def load(self, seq_len: int | None, tokenizer: Tokenizer | None, augmented: bool) -> ChatDataset:
        length = _required(seq_len)
        prepared = self._prepared(length)
        if self.vocab_size not in (None, prepared.facts.vocab_size):
            raise DataError(
                f"data.vocab_size: declared {self.vocab_size}, found {prepared.facts.vocab_size}; "
                "declare what the tokenizer has, or leave it out"
            )
        data = ChatDataset(prepared, length, self.pack, self.test_fraction, printable(self.path))
        data.warnings += prepared.facts.warnings(printable(self.path), length)
        return data

    def _prepared(self, seq_len: int) -> Prepared:
        """The file's sequences, from the cache or made now. Raises DataError."""
        path, folder = Path(self.path), Path(self.tokenizer)
        cure = "give the path of a file that can be read"
        open_file(path, f"data.path: {printable(path)}", cure).close()
        facts = content_facts([path])
        mark = tokenizer_mark(folder).hexdigest()
        stem = cache_dir() / digest("chat", VERSION, mark, facts, seq_len)
        files = [stem.with_suffix(suffix) for suffix in (".tokens", ".ends", ".json")]
        if not all(file.exists() for file in files):
            _apart(lambda: _prepare(path, folder, seq_len, files))
        tokens, ends, said = files
        return Prepared(
            _mapped(tokens, np.uint32), _mapped(ends, np.int64), Facts(**json.loads(said.read_bytes()))
        )


def _apart(call: Callable[[], T]) -> T:
    """`call()` in a process that ends: tokenizers and their library take memory that training needs."""
    from lowmem.machine.child import in_child  # with torch, which a recipe alone need not load

    return in_child(call)


def _vocab_size(folder: Path, mark: str) -> int:
    """Tokens that the tokenizer of a folder knows; looked up once for its fingerprint."""
    path = cache_dir() / f"{digest('vocabulary', VERSION, mark)}.json"
    if not path.exists():
        found = _apart(lambda: ChatTokenizer(folder).vocab_size)
        cached(path, lambda: [json.dumps(found).encode()])
    return int(json.loads(path.read_bytes()))


@dataclass
class Facts:
    """What is known of a file that was tokenised."""

    vocab_size: int = 0
    num_rows: int = 0
    cut_tokens: int = 0
    # numbers of rows: of the first few, and how many there are
    cut: list[int] = field(default_factory=list)
    unanswered: list[int] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, kind: str, number: int) -> None:
        self.counts[kind] += 1
        numbers: list[int] = getattr(self, kind)
        if len(numbers) < SHOWN:
            numbers.append(number)

    def warnings(self, where: str, seq_len: int) -> list[str]:
        words = {
            "cut": f"cut to train.seq_len {seq_len}, which loses {counted(self.cut_tokens, 'token')}",
            "unanswered": "left out, because nothing in it is to be learnt",
            "empty": "left out, because it is empty",
        }
        return [
            f"{where}: {counted(self.counts[kind], 'row')} {said}: {self._numbers(kind)}"
            for kind, said in words.items()
            if self.counts.get(kind)
        ]

    def _numbers(self, kind: str) -> str:
        numbers: list[int] = getattr(self, kind)
        more = ", ..." if self.counts[kind] > len(numbers) else ""
        return f"{'lines' if self.counts[kind] > 1 else 'line'} {', '.join(map(str, numbers))}{more}"


@dataclass(frozen=True)
class Prepared:
    """Sequences after one another: tokens, marked where they are to be learnt, and the end of each."""

    tokens: Array
    ends: Array
    facts: Facts


def _prepare(path: Path, folder: Path, seq_len: int, files: list[Path]) -> None:
    """Tokenises a file into three of the cache; the tokens last, when the others are there."""
    tokenizer, facts, ends = ChatTokenizer(folder), Facts(), [0]
    facts.vocab_size = tokenizer.vocab_size

    def marked() -> Iterator[bytes]:
        for number, row in rows_of(path):
            facts.num_rows += 1
            where = f"{printable(path)}, line {number}"
            for sequence in tokenizer.sequences(row, where):
                for part in _parts(sequence, seq_len, number, facts):
                    values = np.array(part.tokens, np.uint32) | (LEARNT * np.array(part.learnt, np.uint32))
                    ends.append(ends[-1] + len(values))
                    yield values.astype(np.uint32).tobytes()
        if len(ends) == 1:
            longer = f", or raise train.seq_len {seq_len}, to which rows are cut" if facts.cut else ""
            raise DataError(
                f"{printable(path)}: {counted(facts.num_rows, 'row')}, and nothing to learn in them; "
                f"give rows with answers or texts{longer}"
            )
        cached(files[1], lambda: [np.array(ends[1:], np.int64).tobytes()])
        cached(files[2], lambda: [json.dumps(vars(facts)).encode()])

    for file in files:
        file.unlink(missing_ok=True)
    cached(files[0], marked)


def _parts(sequence: Sequence, seq_len: int, number: int, facts: Facts) -> Iterator[Sequence]:
    """The sequence as it is trained on: a long text in several parts, a long conversation without its end.

    A part has one token more than a row, because the last one is a label alone.
    """
    tokens, learnt, splits = sequence
    if not tokens:
        facts.add("empty", number)
        return
    most = seq_len + 1
    if splits:  # a part begins with the token that the one before it ends with
        starts = range(0, max(len(tokens) - 1, 1), seq_len)
    else:
        starts = range(1)
        if len(tokens) > most:
            facts.add("cut", number)
            facts.cut_tokens += len(tokens) - most
    for start in starts:
        part = Sequence(tokens[start : start + most], learnt[start : start + most])
        if any(part.learnt[1:]):
            yield part
        else:
            facts.add("unanswered", number)


class ChatDataset(Dataset):
    """Rows: `tokens` and `labels`, int64 [B, T], and `share` [B]; packed ones also `documents`, `positions`.

    `share` is the number of rows over the number of labels: of the batch in training, of the whole part in a
    test. Padding stands at the end of a row, so no token before it sees it.
    """

    def __init__(
        self, prepared: Prepared, seq_len: int, pack: bool, test_fraction: float, where: str
    ) -> None:
        self.seq_len, self.vocab_size, self._packs = seq_len, prepared.facts.vocab_size, pack
        self._tokens, self._ends = prepared.tokens, prepared.ends
        count = len(self._ends)
        num_test = max(round(count * test_fraction), 1)
        if num_test >= count:
            raise DataError(
                f"{where}: {counted(count, 'sequence')}; allowed: at least 2, one to train on and one "
                "to hold out; give more rows"
            )
        order = np.random.default_rng(0).permutation(count)
        lengths = np.diff(self._ends, prepend=0) - 1  # inputs of each sequence
        parts = [np.sort(part) for part in (order[num_test:], order[:num_test])]
        rows = [packed(part, lengths, seq_len) if pack else [[int(i)] for i in part] for part in parts]
        # of the widest batch, in tokens
        self.width = seq_len if pack else min(round_up(int(lengths.max()), WIDTHS), seq_len)
        self._rows, num_train = [*rows[0], *rows[1]], len(rows[0])
        self._test_share = len(rows[1]) / sum(self._labels(index) for index in parts[1])
        indices = np.arange(len(self._rows))
        super().__init__({"row": indices[:num_train]}, {"row": indices[num_train:]}, self._made)

    def _sequence(self, index: int) -> Array:
        start = self._ends[index - 1] if index else 0
        return np.asarray(self._tokens[start : self._ends[index]])

    def _labels(self, index: int) -> int:
        return int((self._sequence(index)[1:] >= LEARNT).sum())

    def _made(self, batch: ArrayBatch) -> ArrayBatch:
        rows = [[self._sequence(index) for index in self._rows[row]] for row in batch["row"]]
        longest = max(sum(len(s) - 1 for s in row) for row in rows)
        width = self.seq_len if self._packs else min(round_up(longest, WIDTHS), self.seq_len)
        shape = len(rows), width
        tokens, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
        # padding is a document of its own, so that it sees itself and nothing else
        documents, positions = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        for at, row in enumerate(rows):
            start = 0
            for number, sequence in enumerate(row):
                plain, stop = (sequence & ~LEARNT).astype(np.int64), start + len(sequence) - 1
                tokens[at, start:stop] = plain[:-1]
                labels[at, start:stop] = np.where(sequence[1:] >= LEARNT, plain[1:], IGNORED)
                documents[at, start:stop], positions[at, start:stop] = number, np.arange(stop - start)
                start = stop
        tested = batch["row"][0] >= self.num_train
        share = self._test_share if tested else len(rows) / int((labels != IGNORED).sum())
        shares = np.full(len(rows), share, np.float32)
        made: ArrayBatch = {"tokens": tokens, "labels": labels, "share": shares}
        return {**made, "documents": documents, "positions": positions} if self._packs else made


def packed(sequences: Array, lengths: Array, room: int) -> list[list[int]]:
    """Sequences joined to rows of at most `room`: the longest first, each into the fullest row it fits in."""
    rows: list[list[int]] = []
    with_room: list[tuple[int, int]] = []  # (tokens that are left, row), in order
    for index in sequences[np.argsort(-lengths[sequences], kind="stable")]:
        length = int(lengths[index])
        place = bisect_left(with_room, (length, 0))
        if place == len(with_room):
            left, row = room, len(rows)
            rows.append([])
        else:
            left, row = with_room.pop(place)
        rows[row].append(int(index))
        insort(with_room, (left - length, row))
    return rows


def _mapped(path: Path, dtype: Any) -> Array:
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _required(seq_len: int | None) -> int:
    if seq_len is None:
        raise ConfigError("train.seq_len: missing; a row needs its number of tokens; add it")
    return seq_len
