"""Records survive kills and threads."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lowmem.reporting.telemetry import Recorder, read_records


def test_records_come_back_in_order_with_their_fields(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t.jsonl")
    recorder.write("begin", pid=1)
    recorder.write("step", step=0, loss=0.5, text="ü\n")
    recorder.close()
    records = list(read_records(tmp_path / "t.jsonl"))
    assert [(r["event"], r.get("loss"), r.get("text")) for r in records] == [
        ("begin", None, None),
        ("step", 0.5, "ü\n"),
    ]
    assert abs(records[0]["time"] - time.time()) < 60
    assert list(read_records(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize("torn", [b'{"event": "step", "lo', b'{"event": "st\xc3', b"12", b"{"])
def test_a_torn_last_line_is_passed_over_and_the_next_writer_begins_on_a_new_line(
    tmp_path: Path, torn: bytes
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"event": "begin", "time": 1.0}\n' + torn)
    assert [r["event"] for r in read_records(path)] == ["begin"]
    recorder = Recorder(path)
    recorder.write("again")
    recorder.close()
    assert [r["event"] for r in read_records(path)] == ["begin", "again"]
    assert path.read_bytes().startswith(b'{"event": "begin", "time": 1.0}\n' + torn + b"\n")


def test_a_whole_file_is_continued_without_an_empty_line(tmp_path: Path) -> None:
    for event in ("first", "second"):
        recorder = Recorder(tmp_path / "t.jsonl")
        recorder.write(event)
        recorder.close()
    lines = (tmp_path / "t.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["first", "second"]


def test_a_record_is_in_the_file_before_the_recorder_is_closed(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t.jsonl")
    recorder.write("step", step=0)
    assert [r["event"] for r in read_records(tmp_path / "t.jsonl")] == ["step"]
    recorder.close()


def test_lines_of_several_threads_never_interleave_and_listeners_get_them_in_the_files_order(
    tmp_path: Path,
) -> None:
    path, heard = tmp_path / "t.jsonl", list[dict[str, Any]]()
    recorder = Recorder(path)
    recorder.listeners.append(heard.append)

    def write(thread: int) -> None:
        for number in range(150):
            recorder.write("step", thread=thread, number=number, filler="x" * 5000)

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == heard
    assert sorted((r["thread"], r["number"]) for r in lines) == [(t, n) for t in range(4) for n in range(150)]


@pytest.mark.parametrize(("torn", "said"), [(0, ""), (1, "left out 1 line of"), (3, "left out 3 lines of")])
def test_lines_that_are_left_out_are_counted_in_words_that_fit_their_number(
    tmp_path: Path, torn: int, said: str
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"torn\n' * torn)
    records = read_records(path)
    assert list(records) == []
    assert records.note == (said and f"{said} t.jsonl: torn, or not of this run")
