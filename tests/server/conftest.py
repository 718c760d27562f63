"""Running servers for tests: the real launcher, a copy of the model repository, an exported model in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from artifacts import CHECKOUT, cached_export, quickstart_repository
from drafters import export_golden_drafter
from google.protobuf import text_format
from server_state import PUBLISHED_MS, regions_of
from tritonclient.grpc import model_config_pb2

from dspark_backend.serving import orphans, server_log
from dspark_backend.serving.distribution import find_distribution
from dspark_backend.serving.launcher import TritonServer
from dspark_backend.serving.options import Ports, ServeOptions

MODELS = {"smollm2": "smollm2-135m", "tiny": str(CHECKOUT / "tests" / "golden" / "qwen3_vanilla" / "target")}
START_SECS = 120.0
MODEL_NAME = "dspark"


@dataclass(frozen=True)
class RunningServer:
    """A server that answered a real inference."""

    process: TritonServer
    repository: Path
    log_path: Path
    model_name: str = MODEL_NAME

    @property
    def grpc_url(self) -> str:
        """``host:port``."""
        return self.process.grpc_url

    @property
    def http_url(self) -> str:
        """``http://host:port``."""
        return self.process.http_url

    @property
    def metrics_url(self) -> str:
        """``http://host:port/metrics``."""
        return self.process.metrics_url

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """All that Triton and the models wrote."""
        return self.log_path.read_text(errors="replace")

    def stop(self) -> None:
        """Stop it, and fail unless it ended cleanly."""
        ended = self.process.stop()
        assert ended.clean, f"{ended}\n{server_log.tail(self.log_path, 40)}"


MakeServer = Callable[..., RunningServer]


def exported(model: str) -> Path:
    """The verifier artifact of ``tiny``, ``smollm2``, or whatever dspark-export takes; exported at most once."""
    return cached_export(quickstart_repository.verifier(MODELS.get(model, model)))


def set_parameters(config: Path, parameters: Mapping[str, str | None]) -> None:
    """Change ``parameters`` in a config.pbtxt; None removes one."""
    message = text_format.Parse(config.read_text(), model_config_pb2.ModelConfig())
    for key, value in parameters.items():
        if value is None:
            message.parameters.pop(key, None)
        else:
            message.parameters[key].string_value = value
    config.write_text(text_format.MessageToString(message))


@pytest.fixture(scope="session", name="set_parameters")
def _set_parameters() -> Callable[[Path, Mapping[str, str | None]], None]:
    """``set_parameters(config, {"max_slots": "2"})`` for tests that lay out models of their own."""
    return set_parameters


MakeRepository = Callable[..., Path]


@pytest.fixture(scope="session")
def make_repository(tmp_path_factory: pytest.TempPathFactory) -> MakeRepository:
    """Lays out model repositories: ``make_repository("tiny", {"max_slots": "2"})``; arguments as for ``make_server``.
    ``drafter`` is an artifact's folder: it goes to drafter/1, and ``dspark`` speculates with it (policy ``causal``).

    Files of the artifact are hard links to a cache: replace them, never write into them.
    """

    def make(
        model: str | Path = "tiny", parameters: Mapping[str, str | None] | None = None, drafter: Path | None = None
    ) -> Path:
        artifact = Path(model) if (Path(model) / "stage.json").is_file() else exported(str(model))
        repository = quickstart_repository.assemble(tmp_path_factory.mktemp("server") / "repository", artifact)
        speculating: dict[str, str | None] = {}
        if drafter is not None:
            shutil.copytree(drafter, repository / "drafter" / "1", dirs_exist_ok=True)
            speculating = {"drafter": "../../drafter/1", "policy": None}
        set_parameters(repository / MODEL_NAME / "config.pbtxt", speculating | dict(parameters or {}))
        return repository

    return make


@pytest.fixture(scope="session")
def make_server(make_repository: MakeRepository) -> Iterator[MakeServer]:
    """Starts servers: ``make_server(model="tiny", parameters={"max_slots": "2"}, wait=True)``.

    ``model`` is ``tiny`` (a random Qwen3 of tests/golden without a tokenizer), ``smollm2``, an artifact's folder, or
    what dspark-export takes as ``--model``. ``parameters`` change those of the ``dspark`` model; ``models`` loads only
    the named ones; ``drafter`` is as for ``make_repository``; ``wait=False`` returns before the server can infer. What
    a test does not stop is ended with the session.
    """
    made: list[RunningServer] = []

    def make(
        model: str | Path = "tiny",
        *,
        parameters: Mapping[str, str | None] | None = None,
        models: tuple[str, ...] = (),
        drafter: Path | None = None,
        exit_timeout_secs: int = 15,
        wait: bool = True,
    ) -> RunningServer:
        repository = make_repository(model, parameters, drafter)
        options = ServeOptions(
            model_repository=repository,
            ports=Ports.free(),
            host="127.0.0.1",
            models=models,
            log_file=repository.parent / "triton.log",
            exit_timeout_secs=exit_timeout_secs,
        )
        running = RunningServer(
            TritonServer(options, find_distribution()), repository, repository.parent / "triton.log"
        )
        running.process.start()
        made.append(running)
        if wait:
            running.process.wait_until_serving(MODEL_NAME, START_SECS)
        return running

    yield make
    for running in made:
        if running.process.poll() is None:
            running.process.stop()
        shutil.rmtree(running.repository, ignore_errors=True)


@pytest.fixture(scope="session")
def server(make_server: MakeServer) -> Iterator[RunningServer]:
    """SmolLM2-135M as the repository is shipped."""
    running = make_server("smollm2")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def tiny_server(make_server: MakeServer) -> Iterator[RunningServer]:
    """A tiny random model (384 tokens, context 512, no tokenizer) for what needs many or odd requests."""
    running = make_server("tiny")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def speculating(
    make_server: MakeServer, golden_artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """The golden target with the drafter made for it; ``dspark`` measures its own step times, for a moment."""
    name, drafter = "qwen3_vanilla", tmp_path_factory.mktemp("drafter") / "artifact"
    export_golden_drafter(name, golden_artifacts[name], drafter)
    parameters = {
        "cost_cache": str(tmp_path_factory.mktemp("cost")),
        "profile_seconds": "2",
        "metrics_interval_ms": str(PUBLISHED_MS),
    }
    made = make_server(golden_artifacts[name], drafter=drafter, parameters=parameters, exit_timeout_secs=5)
    regions = regions_of(made)
    assert regions
    yield made
    # No check of a clean end: Triton waits in vain for streams that were cancelled in the instant of their end.
    made.process.stop()
    assert not regions & {path.name for path in orphans.SHM_FOLDER.iterdir()}
