"""HTTP to a server of rollouts: requests side by side, and errors that say what to do."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from real_fast.errors import RolloutServerError

logger = logging.getLogger(__name__)

HOW_TO_START = "start one with `real-fast serve --config FILE`, the run's own, and wait until its /health answers"
_CONNECT = 20.0  # seconds for the connection itself
_PAUSES = (0.5, 2.0, 8.0)  # seconds before a request without consequences is sent again
_PASSING = (429, 500, 502, 503, 504)  # what servers, and proxies in front of them, answer with while they are busy
_SAID = 5.0  # seconds in which one line tells of all requests that are sent again


class ServerClient:
    """Talks JSON to one server. Proxies of the environment are passed by: engines are in a private network.

    Args:
        url: ``rollout.url``, http://HOST:PORT or https://HOST:PORT.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        self._make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.host, self.port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
        self._prefix = parts.path
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._said = -_SAID

    def get(self, path: str, timeout: float = 30.0) -> Any:
        """What the server says at `path`. Raises :class:`RolloutServerError`."""
        return self._repeated("GET", path, None, timeout, threading.Event())

    def post(self, path: str, body: Any = None, timeout: float = 600.0) -> Any:
        """The answer to `body`, sent once. Raises :class:`RolloutServerError`."""
        return self._answer("POST", path, body, timeout)

    def post_all(self, path: str, bodies: Sequence[Any], at_a_time: int, timeout: float) -> list[Any]:
        """The answers to `bodies`, in their order; each may be sent again, so it must change nothing at the server.

        At an error, or Ctrl-C, the connections of all others are closed, at which vLLM drops their requests.

        Raises:
            RolloutServerError: As :meth:`post` does.
        """
        if not bodies:
            return []
        stopped = threading.Event()
        with ThreadPoolExecutor(min(at_a_time, len(bodies)), thread_name_prefix="rollouts") as pool:
            try:
                futures = [pool.submit(self._repeated, "POST", path, body, timeout, stopped) for body in bodies]
                for failed in wait(futures, return_when=FIRST_EXCEPTION).done:
                    failed.result()
                return [future.result() for future in futures]
            except BaseException:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                self.close()
                raise

    def close(self) -> None:
        """Close what is open; whoever waits for an answer gets an error."""
        with self._lock:
            for sock in self._open:
                with suppress(OSError):  # closed by the other side
                    sock.shutdown(socket.SHUT_RDWR)

    def _repeated(self, method: str, path: str, body: Any, timeout: float, stopped: threading.Event) -> Any:
        for number, pause in enumerate(_PAUSES, start=1):
            try:
                return self._answer(method, path, body, timeout)
            except RolloutServerError as error:
                if not _may_pass(error) or stopped.is_set():
                    raise
                self._say(f"{error}; sent again in {pause:g} s (try {number} of {len(_PAUSES)})")
                if stopped.wait(pause):
                    raise
        return self._answer(method, path, body, timeout)

    def _say(self, text: str) -> None:
        with self._lock:
            last, now = self._said, time.monotonic()
            quiet = now - last < _SAID
            self._said = last if quiet else now
        if not quiet:
            logger.warning("%s", text)

    def _answer(self, method: str, path: str, body: Any, timeout: float) -> Any:
        connection = self._make(self.host, self.port, timeout=_CONNECT)
        sent = None if body is None else json.dumps(body).encode()
        sock = None
        try:
            try:
                connection.connect()
            except TimeoutError as error:
                raise ConnectionError(f"no connection within {_CONNECT:g} seconds") from error
            sock = connection.sock  # the connection lets go of it where the answer is the last one
            _patient(sock, timeout)
            with self._lock:
                self._open.add(sock)
            connection.request(method, self._prefix + path, sent, {"Content-Type": "application/json"})
            response = connection.getresponse()
            status, raw = response.status, response.read()
        except TimeoutError as error:
            raise RolloutServerError(
                f"the rollout server {self.url} did not answer {path} within {timeout:g} seconds (rollout.timeout): "
                "see whether it still works (its log), and start it anew if it does not; then go on with --resume"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise RolloutServerError(
                f"no rollout server answers at rollout.url {self.url} ({error or type(error).__name__}): "
                f"{HOW_TO_START}; a run that was interrupted goes on with --resume"
            ) from error
        finally:
            if sock is not None:
                with self._lock:
                    self._open.discard(sock)
            connection.close()
        if status != http.client.OK:
            raise RolloutServerError(self._refused(path, status, raw), status)
        try:
            return json.loads(raw)
        except ValueError as error:
            raise RolloutServerError(
                f"what answers at rollout.url {self.url} is no vLLM server ({path} gave no JSON): {HOW_TO_START}"
            ) from error

    def _refused(self, path: str, status: int, raw: bytes) -> str:
        if status in (http.client.NOT_FOUND, http.client.FORBIDDEN, http.client.METHOD_NOT_ALLOWED):
            return (
                f"the server at rollout.url {self.url} has no {path}, so it was not started for rollouts: "
                f"{HOW_TO_START}"
            )
        try:
            said = json.loads(raw)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            said = raw.decode(errors="replace")
        text = " ".join(str(said).split())[:400]
        return f"the rollout server {self.url} answered {path} with {status}: {text or 'no reason given'}"


def _may_pass(error: RolloutServerError) -> bool:
    """Whether the same request may be answered in a moment: no time-out, which has taken its time, and no refusal."""
    if error.status:
        return error.status in _PASSING
    return not isinstance(error.__cause__, TimeoutError)


def _patient(sock: socket.socket, timeout: float) -> None:
    """Wait so long for an answer, but no longer than two minutes for a machine that is gone without a word."""
    sock.settimeout(timeout)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
