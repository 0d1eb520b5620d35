"""Metadata services of clouds: real servers that answer as EC2's and GCE's do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answers = Callable[[str, str, dict[str, str]], tuple[int, str]]
"""The status and body for a method, a path and headers (in lower case)."""


@contextmanager
def served(answers: Answers, headers: dict[str, str] | None = None) -> Iterator[str]:
    """Start a server with these answers and yield its address."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            request_headers = {name.lower(): value for name, value in self.headers.items()}
            status, body = answers(self.command, self.path, request_headers)
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_PUT = answer  # noqa: N815 - the base class calls these names

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Ec2:
    """The answers of EC2: an action, after `take_away`, to requests with a token."""

    def __init__(self) -> None:
        self.action: str | None = None
        self.tokens: list[str] = []

    def take_away(self, seconds: int) -> int:
        """Give notice of the machine's end in `seconds`; return the time of the end in seconds since 1970."""
        ends_at = int(time.time()) + seconds
        utc_time = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ends_at))
        self.action = json.dumps({"action": "terminate", "time": utc_time})
        return ends_at

    def __call__(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        if (method, path) == ("PUT", "/latest/api/token"):
            assert int(headers["x-aws-ec2-metadata-token-ttl-seconds"]) >= 1
            self.tokens.append(f"token-{len(self.tokens)}")
            return 200, self.tokens[-1]
        if headers.get("x-aws-ec2-metadata-token") not in self.tokens:
            return 401, ""
        if path == "/latest/meta-data/spot/instance-action" and self.action is not None:
            return 200, self.action
        return 404, "<html>Not Found</html>"
