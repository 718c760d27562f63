"""A Triton with one tiny real Python model, to test what starts, watches and stops servers."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from dspark_backend.serving.distribution import Distribution, find_distribution
from dspark_backend.serving.launcher import TritonServer
from dspark_backend.serving.options import Ports, ServeOptions

CONFIG = """
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [
  { name: "input_ids" data_type: TYPE_INT32 dims: [ -1 ] },
  { name: "max_tokens" data_type: TYPE_INT32 dims: [ 1 ] }
]
output [ { name: "output_ids" data_type: TYPE_INT32 dims: [ -1 ] } ]
instance_group [ { kind: KIND_CPU } ]
"""

COUNTING = """
import time
from pathlib import Path
from threading import Lock, Thread

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.folder = Path(args["model_repository"])
        self.threads = []
        gauge = pb_utils.MetricFamily.GAUGE
        self.family = pb_utils.MetricFamily(name="counting_num_requests_running", description="d", kind=gauge)
        self.running, self.lock = self.family.Metric(labels={}), Lock()

    def count(self, change):
        with self.lock:
            self.running.increment(change)

    def execute(self, requests):
        while (self.folder / "hang").exists():
            time.sleep(0.05)
        for request in requests:
            ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()
            self.count(1)
            thread = Thread(target=self.answer, args=(ids, request.get_response_sender()))
            thread.start()
            self.threads.append(thread)

    def answer(self, ids, sender):
        while (self.folder / "slow").exists():
            time.sleep(0.05)
        error = None
        if (self.folder / "refuse").exists():
            error = pb_utils.TritonError((self.folder / "refuse").read_text())
        answer = pb_utils.InferenceResponse([pb_utils.Tensor("output_ids", ids + 1)], error=error)
        self.count(-1)
        sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self):
        for thread in self.threads:
            thread.join()
"""

BROKEN = """
class TritonPythonModel:
    def initialize(self, args):
        raise RuntimeError("this model never loads")
"""


def write_model(repository: Path, name: str, code: str) -> Path:
    """A model folder; returns it."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(textwrap.dedent(code))
    (repository / name / "config.pbtxt").write_text(CONFIG)
    return repository / name


@pytest.fixture(scope="session")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    return find_distribution(cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Holds ``counting``: answers each id plus one.

    A file in its folder changes that: with ``hang`` it blocks in execute, with ``slow`` its answers wait, and with
    ``refuse`` it answers the file's text as an error.
    """
    write_model(tmp_path / "repository", "counting", COUNTING)
    return tmp_path / "repository"


MakeTriton = Callable[..., TritonServer]


@pytest.fixture
def make_triton(repository: Path, tmp_path: Path, distribution: Distribution) -> Iterator[MakeTriton]:
    """Starts servers on free ports with the repository; all are ended after the test."""
    servers: list[TritonServer] = []

    def make(**settings: object) -> TritonServer:
        options = ServeOptions(
            **{  # type: ignore[arg-type]
                "model_repository": repository,
                "ports": Ports.free(),
                "host": "127.0.0.1",
                "log_file": tmp_path / f"triton-{len(servers)}.log",
                "exit_timeout_secs": 5,
                **settings,
            }
        )
        server = TritonServer(options, distribution)
        server.start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.kill()


Endpoint = tuple[str, list[bytes]]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """A metrics address, and a list of texts: it answers the first, and drops it where another follows."""
    text = [b""]

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.pop(0) if len(text) > 1 else text[0])

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/metrics", text
        server.shutdown()
