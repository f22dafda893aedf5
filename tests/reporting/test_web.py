"""The page that is served: on this machine alone, from the run folder alone, whatever is asked for."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest

from lowmem.blocks.run_dir import RunDir
from lowmem.errors import ConfigError, ResumeError
from lowmem.reporting.web import PageServer


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def served(run: Path) -> Iterator[PageServer]:
    with PageServer(run) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: PageServer, path: str, method: str = "GET", host: str = "") -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    headers = {"Host": host or f"127.0.0.1:{server.server_port}"}
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_the_page_of_a_run_is_served_on_the_loopback_address_alone(served: PageServer) -> None:
    assert served.server_address[0] == "127.0.0.1" and served.url.startswith("http://127.0.0.1:")
    answer, page = ask(served, "/")
    assert answer.status == 200 and b"Now: finished" in page and b"<svg" in page
    assert answer.headers["Refresh"] is None, "a finished run does not change"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert b"<script" not in page and b"http-equiv" not in page


def test_a_run_that_goes_on_is_refreshed_and_one_that_died_is_shown_as_stopped(
    served: PageServer, run: Path
) -> None:
    folder = RunDir(run)
    state = folder.read_state()
    assert state is not None
    folder.commit(state.model_copy(update={"metrics": None, "visits_done": 3}))
    with open(run / "telemetry.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "evaluating", "time": 1.0, "message": "m", "share": 0.25}) + "\n")
    folder.acquire()
    answer, page = ask(served, "/")
    assert answer.headers["Refresh"] == "10" and b"Now: evaluating" in page and b"25%" in page
    folder.release()
    answer, page = ask(served, "/")
    assert answer.headers["Refresh"] is None and b"Now: stopped" in page and b"visit 3/18" in page


@pytest.mark.parametrize(
    "path", ["/state.json", "/../../etc/passwd", "//etc/passwd", "/%2e%2e/x", "/?a=1", "/plan.json", "x"]
)
def test_no_path_of_a_request_reaches_the_file_system(served: PageServer, path: str) -> None:
    answer, body = ask(served, path)
    assert answer.status == 404 and body == b"there is one page: /"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
def test_only_get_is_answered(served: PageServer, method: str) -> None:
    assert ask(served, "/", method)[0].status == 501


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1", "localhost.example.org:80"])
def test_a_request_under_another_name_is_refused(served: PageServer, host: str) -> None:
    answer, body = ask(served, "/", host=host)
    assert answer.status == 403 and b"<svg" not in body


def test_a_folder_that_breaks_while_it_is_served_is_said_in_one_line(served: PageServer, run: Path) -> None:
    (run / "state.json").write_text("{")
    answer, body = ask(served, "/")
    assert answer.status == 500 and b"state.json" in body and b"\n" not in body and b"Traceback" not in body


def test_no_run_and_no_free_port_are_refused_at_once(served: PageServer, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ResumeError):
        PageServer(tmp_path / "none")
    with pytest.raises(ConfigError, match=f"--port: found {served.server_port}"):
        PageServer(run, served.server_port)
