"""Conversations, questions with answers, and texts as rows: what is learnt, left out, and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import batches_digest
from hf_folders import BYTES_VOCAB, CHAT, make_tokenizer

from lowmem.data.chat import IGNORED, ChatData, ChatDataset, packed
from lowmem.data.chat_rows import rows_of
from lowmem.data.chat_tokens import ChatTokenizer, Sequence
from lowmem.data.datasets import DataSpec, describe_data, identify_data, load_data
from lowmem.errors import DataError

TALK = [
    {"role": "user", "content": "Hé?"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No"},
]
ASKED = "<|start|>user\nHé?<|end|><|start|>assistant\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def learnt(tokenizer: ChatTokenizer, sequence: Sequence) -> str:
    kept = [token for token, learn in zip(sequence.tokens, sequence.learnt, strict=True) if learn]
    return str(tokenizer._inner.decode(kept))


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def opened(path: Path, folder: Path, seq_len: int = 64, **keys: Any) -> ChatDataset:
    data = load_data(ChatData(name="chat", path=str(path), tokenizer=str(folder), **keys), seq_len)
    assert isinstance(data, ChatDataset)
    return data


def refusal(path: Path, folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        opened(path, folder)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# What is learnt


def test_only_what_the_assistant_says_is_learnt(folder: Path) -> None:
    tokenizer = ChatTokenizer(folder)
    (sequence,) = tokenizer.sequences({"messages": TALK}, "row")
    assert tokenizer._inner.decode(sequence.tokens).startswith(ASKED + "Yes<|end|>")
    assert learnt(tokenizer, sequence) == "Yes<|end|>No<|end|>"


def test_the_templates_own_marks_say_what_is_learnt(tmp_path: Path) -> None:
    marked = (
        "{% for message in messages %}<|start|>{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}{% endgeneration %}<|end|>"
        "{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    )
    tokenizer = ChatTokenizer(make_tokenizer(tmp_path / "tokenizer", marked))
    (sequence,) = tokenizer.sequences({"messages": TALK}, "row")
    assert learnt(tokenizer, sequence) == "YesNo"


def test_a_template_that_rewrites_earlier_answers_gives_each_answer_a_sequence(tmp_path: Path) -> None:
    thinks = "('<think>' if loop.last and message['role'] == 'assistant' else '')"
    thinking = CHAT.replace("message['content']", f"{thinks} + message['content']")
    tokenizer = ChatTokenizer(make_tokenizer(tmp_path / "tokenizer", thinking))
    sequences = tokenizer.sequences({"messages": TALK}, "row")
    assert [learnt(tokenizer, each) for each in sequences] == ["<think>Yes<|end|>", "<think>No<|end|>"]


def test_a_template_that_cannot_be_split_into_turns_is_refused(tmp_path: Path) -> None:
    backwards = "{{ messages | length }}" + CHAT
    folder = make_tokenizer(tmp_path / "tokenizer", backwards)
    path = written(tmp_path / "rows.jsonl", [{"messages": TALK}] * 3)
    assert "rows.jsonl, line 1: the template of" in refusal(path, folder)
    assert "cannot be split into turns" in refusal(path, folder)


def test_of_a_question_the_answer_is_learnt_and_of_a_text_all(folder: Path) -> None:
    tokenizer = ChatTokenizer(folder)
    (asked,) = tokenizer.sequences({"prompt": "2 + 2 = ", "completion": "4"}, "row")
    (text,) = tokenizer.sequences({"text": "all of it"}, "row")
    assert learnt(tokenizer, asked) == "4<|end|>"
    assert learnt(tokenizer, text) == "all of it<|end|>"


# ------------------------------------------------------------------------------------------------------------
# Batches


def test_a_label_is_the_next_token_and_shares_make_the_mean_over_labels(tmp_path: Path, folder: Path) -> None:
    path = written(
        tmp_path / "rows.jsonl", [{"prompt": "ab", "completion": "c" * (n % 5 + 1)} for n in range(40)]
    )
    data = opened(path, folder)
    assert (data.num_train, data.num_test, data.vocab_size) == (38, 2, BYTES_VOCAB)
    batch = data.batch(7, 3, 8)
    tokens, labels = batch["tokens"], batch["labels"]
    assert tokens.shape == labels.shape == (8, 64)
    known = labels != IGNORED
    inside = known[:, :-1] & known[:, 1:]
    assert (labels[:, :-1][inside] == tokens[:, 1:][inside]).all()
    assert not known[:, 0].any()  # the token after the question's first one is of the question
    np.testing.assert_allclose(batch["share"], 8 / known.sum())
    parts = list(data.test_batches(1))
    total = sum(int((part["labels"] != IGNORED).sum()) for part in parts)
    assert [float(part["share"][0]) for part in parts] == pytest.approx([2 / total] * 2)
    assert batches_digest([batch]) == batches_digest([opened(path, folder).batch(7, 3, 8)])


def test_packed_rows_hold_every_sequence_once_with_borders(tmp_path: Path, folder: Path) -> None:
    rows = [{"text": chr(97 + n % 26) * (n % 30 + 1)} for n in range(60)]
    path = written(tmp_path / "rows.jsonl", rows)
    alone, together = opened(path, folder), opened(path, folder, pack=True)
    assert together.num_train < alone.num_train / 2
    batch = together.batch(0, 0, together.num_train)
    assert batch["tokens"].shape == (together.num_train, 64)
    assert int((batch["labels"] != IGNORED).sum()) == sum(
        int((alone.batch(0, step, 1)["labels"] != IGNORED).sum()) for step in range(alone.num_train)
    )
    for tokens, documents, positions in zip(
        batch["tokens"], batch["documents"], batch["positions"], strict=True
    ):
        for document in range(documents.max() + 1):
            places = np.flatnonzero(documents == document)
            assert (np.diff(places) == 1).all()
            assert (positions[places] == np.arange(len(places))).all()
            assert len(set(tokens[places])) == 1  # one letter
        assert (tokens[documents == -1] == 0).all()


def test_packing_loses_nothing_and_leaves_no_row_that_another_could_hold() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 300)
    rows = packed(np.arange(300), lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(300))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert max(filled) <= 64
    assert sum(sorted(filled)[:2]) > 64


def test_long_texts_become_parts_and_long_conversations_are_cut_and_that_is_said(
    tmp_path: Path, folder: Path
) -> None:
    text = "".join(chr(97 + n % 26) for n in range(200))
    late = {"prompt": "q" * 70, "completion": "never seen"}
    path = written(
        tmp_path / "rows.jsonl", [{"text": text}, "\n", late, {"text": ""}, {"messages": TALK * 3}]
    )
    data = opened(path, folder)
    assert data.num_train + data.num_test == 4 + 1
    name = str(path)
    assert data.warnings == [
        f"{name}: 2 rows cut to train.seq_len 64, which loses 104 tokens: lines 3, 5",
        f"{name}: 1 row left out, because nothing in it is to be learnt: line 3",
        f"{name}: 1 row left out, because it is empty: line 4",
    ]
    labels = [label for step in range(5) for label in _labels(data, step)]
    assert len(labels) >= 200


def _labels(data: ChatDataset, step: int) -> list[int]:
    batch = next(b for n, b in enumerate([*data.test_batches(1), *_train(data)]) if n == step)
    return [int(label) for label in batch["labels"][0] if label != IGNORED]


def _train(data: ChatDataset) -> list[dict[str, Any]]:
    return [data.batch(0, step, 1) for step in range(data.num_train)]


def test_csv_and_parquet_give_the_batches_of_json_lines(tmp_path: Path, folder: Path) -> None:
    import pandas

    rows = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(30)]
    pandas.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    written(tmp_path / "rows.jsonl", rows)
    digests = {
        batches_digest([opened(tmp_path / f"rows.{kind}", folder).batch(0, 0, 8)])
        for kind in ("csv", "parquet", "jsonl")
    }
    assert len(digests) == 1


def test_a_text_file_is_learnt_whole_a_piece_at_a_time(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem.data.chat_rows.PIECE_BYTES", 200)
    lines = [f"line {n} of a book, which is {n * n}\n" for n in range(60)]
    path = tmp_path / "book.txt"
    path.write_text("".join(lines))
    pieces = list(rows_of(path))
    assert "".join(row["text"] for _, row in pieces) == path.read_text()
    assert [number for number, _ in pieces][:2] == [1, 1 + pieces[0][1]["text"].count("\n")]
    data = opened(path, folder)
    labels = sum(len(_labels(data, step)) for step in range(data.num_train + data.num_test))
    assert labels == len(path.read_text())  # the first token of a piece is no label, and its end is one
    path.write_bytes(b"fine\n\xff\n")
    assert "book.txt, line 2: found byte 0xff; allowed: text in UTF-8" in refusal(path, folder)


# ------------------------------------------------------------------------------------------------------------
# Identity, plans, refusals


def test_a_declared_vocabulary_is_enough_to_plan(tmp_path: Path, folder: Path) -> None:
    nowhere = ChatData(name="chat", path="nowhere.jsonl", tokenizer="nowhere", vocab_size=BYTES_VOCAB)
    assert describe_data(nowhere, 64) == DataSpec(vocab_size=BYTES_VOCAB, seq_len=64)
    path = written(tmp_path / "rows.jsonl", [{"text": "ab"}] * 3)
    assert describe_data(ChatData(name="chat", path=str(path), tokenizer=str(folder)), 64) == DataSpec(
        vocab_size=BYTES_VOCAB, seq_len=64
    )


def test_the_identity_follows_the_rows_and_the_tokenizer_and_not_their_place(
    tmp_path: Path, folder: Path
) -> None:
    def identity(name: str, text: str, tokenizer: Path) -> Any:
        path = written(tmp_path / name, [{"text": text}] * 3)
        return identify_data(ChatData(name="chat", path=str(path), tokenizer=str(tokenizer)), 64)

    first = identity("one.jsonl", "ab", folder)
    assert first == identity("two.jsonl", "ab", folder)
    assert first.fingerprint != identity("three.jsonl", "ac", folder).fingerprint
    other = make_tokenizer(tmp_path / "tokenizer", CHAT.replace("<|end|>", "<|end|>\n"))
    assert first.tokenizer != identity("four.jsonl", "ab", other).tokenizer


def test_the_identity_does_not_look_into_the_rows(tmp_path: Path, folder: Path) -> None:
    path = written(tmp_path / "rows.jsonl", ["no JSON\n"])
    found = identify_data(ChatData(name="chat", path=str(path), tokenizer=str(folder)), 64)
    assert found.vocab_size == BYTES_VOCAB


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "line 2: found list; allowed: an object"),
        (
            '{"question": "q"}',
            "line 2: found the columns question; allowed: messages, prompt with completion, text",
        ),
        ('{"text": 5}', "line 2: text is int; allowed: text"),
        ('{"messages": []}', "line 2: messages: allowed: a list of at least one message"),
        ('{"messages": [{"content": "x"}]}', "line 2: messages: allowed: objects with a role and a content"),
        ('{"messages": [{"role": "assistant"}]}', "line 2: the template of"),
    ],
)
def test_a_bad_row_is_named_by_its_line(line: str, said: str, tmp_path: Path, folder: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [{"text": "fine"}, f"{line}\n"])
    assert said in refusal(path, folder)


def test_other_files_and_folders_without_a_tokenizer_are_refused(tmp_path: Path, folder: Path) -> None:
    path = written(tmp_path / "rows.md", [{"text": "fine"}])
    assert "found the suffix '.md'; allowed: .jsonl" in refusal(path, folder)
    assert "nowhere.jsonl: No such file" in refusal(tmp_path / "nowhere.jsonl", folder)
    path = written(tmp_path / "rows.jsonl", [{"text": "fine"}] * 3)
    assert "no tokenizer.json in it" in refusal(path, tmp_path)
    empty = written(tmp_path / "empty.jsonl", ["\n"])
    assert "0 rows, and nothing to learn in them" in refusal(empty, folder)
    one = written(tmp_path / "one.jsonl", [{"text": "fine"}])
    assert "1 sequence; allowed: at least 2" in refusal(one, folder)
    bad = tmp_path / "rows.parquet"
    bad.write_bytes(b"no parquet")
    assert "rows.parquet: not readable" in refusal(bad, folder)


def test_a_file_that_failed_once_is_read_again(tmp_path: Path, folder: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [{"text": "fine"}, "{\n"])
    refusal(path, folder)
    written(path, [{"text": "fine"}, {"text": "fine too"}])
    assert opened(path, folder).num_train == 1
