"""Serves the page of one run on this machine alone, made anew from the run folder while the run goes on.

Only GET of `/` is answered. Nothing of a request is a path, and the server listens on the loopback address. A
request that names another host is refused, so that no page of somebody else's can read this one through a
name that it points here.
"""

from __future__ import annotations

import os
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from lowmem.blocks.run_dir import RunDir
from lowmem.errors import ConfigError, LowmemError
from lowmem.reporting.dashboard import GOING, status_lines
from lowmem.reporting.page import page_text
from lowmem.reporting.report import read_report

HOST = "127.0.0.1"
REFRESH_S = 10  # between two looks of a reader at a run that goes on
WIDE, NARROW = 100, 44  # characters of the status's lines
SAFE = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"


class PageServer(HTTPServer):
    """The server of a run's page. `url` is where it answers; it does so in `serve_forever`."""

    def __init__(self, run_dir: str | os.PathLike[str], port: int = 0) -> None:
        """`port` 0: any that is free. Raises as `read_report`, and ConfigError for a port that is taken."""
        read_report(run_dir)
        self._run_dir, self._page = run_dir, b""
        self._marks: tuple[str, ...] = ()  # of what the page was made from
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as problem:
            raise ConfigError(
                f"--port: found {port}: {getattr(problem, 'strerror', None) or problem}; "
                "give another, or leave it out"
            ) from None
        self.url = f"http://{HOST}:{self.server_port}/"

    def page(self) -> tuple[bytes, bool]:
        """(The page, whether the run goes on). Made anew where the run folder has changed."""
        state, wide = status_lines(self._run_dir, WIDE)
        marks = (state, *map(_mark, (RunDir(self._run_dir).state_path, RunDir(self._run_dir).telemetry_path)))
        if self._marks != marks:
            narrow = status_lines(self._run_dir, NARROW)[1]
            clock = time.strftime("%H:%M:%S")
            title = f"{state}, as of {clock}"
            status = {"title": title, "wide": "\n".join(wide), "narrow": "\n".join(narrow)}
            text = page_text([self._run_dir], status)
            self._marks, self._page = marks, text.encode("utf-8", "replace")
        return self._page, state in GOING

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that goes early is no error."""


def _mark(path: os.PathLike[str]) -> str:
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = 10.0  # seconds that a reader may keep the others waiting
    server_version, sys_version = "lowmem", ""

    def do_GET(self) -> None:
        allowed = [f"{host}:{self.server.server_port}" for host in (HOST, "localhost")]
        if self.headers.get("Host") not in allowed:
            self._answer(403, b"another host is named", "text/plain")
        elif self.path != "/":
            self._answer(404, b"there is one page: /", "text/plain")
        else:
            try:
                page, goes_on = self.server.page()
            except LowmemError as problem:
                self._answer(500, str(problem).encode("utf-8", "replace"), "text/plain")
            else:
                self._answer(200, page, "text/html", REFRESH_S if goes_on else None)

    def _answer(self, code: int, body: bytes, kind: str, refresh_s: int | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", SAFE)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        if refresh_s is not None:
            self.send_header("Refresh", str(refresh_s))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed for a request."""
