from __future__ import annotations

import socket
from pathlib import Path

import pytest

from dspark_backend.errors import ConfigError
from dspark_backend.serving.options import PortInUse, Ports, ServeOptions


def test_ports_follow_their_base() -> None:
    assert Ports.from_base(9000) == Ports(9000, 9001, 9002)


@pytest.mark.parametrize("ports", [(0, 1, 2), (65535, 65536, 65537), (8000, 8000, 8002)])
def test_impossible_ports_are_refused(ports: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="port"):
        Ports(*ports)


def test_a_port_in_use_is_named() -> None:
    ports = Ports.free()
    with socket.create_server(("127.0.0.1", ports.grpc)), pytest.raises(PortInUse, match=rf"{ports.grpc} \(grpc\)"):
        ports.check_free("127.0.0.1")
    ports.check_free("127.0.0.1")


def test_a_missing_repository_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        ServeOptions(tmp_path / "nowhere")


def test_a_folder_without_models_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(ConfigError, match="found none"):
        ServeOptions(tmp_path)


def test_an_unknown_model_is_refused_with_the_known_ones(repository: Path) -> None:
    with pytest.raises(ConfigError, match=r"'drafter' is not in .* holds: counting"):
        ServeOptions(repository, models=("drafter",))


def test_named_models_are_loaded_explicitly(repository: Path) -> None:
    arguments = ServeOptions(repository, models=("counting",), extra=("--log-verbose=1",)).arguments()
    assert "--model-control-mode=explicit" in arguments
    assert "--load-model=counting" in arguments
    assert arguments[-1] == "--log-verbose=1"


def test_without_names_everything_is_loaded(repository: Path) -> None:
    assert not any("control-mode" in argument for argument in ServeOptions(repository).arguments())
