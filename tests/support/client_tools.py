"""What the tests of the clients share: prompts, a check that work ended, a TCP forwarder, the command line."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator

from server_state import metric, until, wait_idle

from dspark_client import GenerateOptions, RetryPolicy

PROMPT = "The three primary colours are"
SHORT = GenerateOptions(max_tokens=24)
LONG_TOKENS = 800
LONG = GenerateOptions(max_tokens=LONG_TOKENS, ignore_eos=True)
NO_RETRY = RetryPolicy(max_attempts=1)


@contextlib.contextmanager
def long_request_is_cancelled(server) -> Iterator[Callable[[], None]]:
    """The body begins one LONG request and ends it early; afterwards the server must have stopped working on it.

    Yields a function that waits until the request runs.
    """
    wait_idle(server)
    before = metric(server, "generation_tokens_total")
    yield lambda: until(lambda: metric(server, "num_requests_running") > 0, 20, "a running request")
    wait_idle(server)
    assert metric(server, "generation_tokens_total") - before < LONG_TOKENS


class Forwarder:
    """Passes TCP connections on to a server; it can begin late, and cut what it carries."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self.target = (host, int(port))
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))  # reserved, but refusing until start()
        self.url = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.accepted = 0
        self._open: list[socket.socket] = []

    def start(self) -> None:
        self.listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Refuses new connections and breaks the open ones."""
        for end in (self.listener, *self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(self.target)
                self.accepted += 1
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def command(server, *arguments: str) -> list[str]:
    """The command line of ``dspark`` for a server."""
    entry = "import sys; from dspark_client.cli import main; sys.exit(main())"
    return [sys.executable, "-c", entry, *arguments, "--url", server.grpc_url, "--model", server.model_name]
