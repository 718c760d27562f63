from __future__ import annotations

import shutil
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


CONFIG = 'name: "{}"\nbackend: "python"\n'


def shipped(folder: Path, *exported: str) -> Path:
    """A repository like ours, with artifacts of the named stages."""
    for name in ("dspark", "verifier", "drafter"):
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(CONFIG.format(name))
        (folder / name / "1" / "model.py").touch()
    for name in exported:
        (folder / name / "1" / "stage.json").touch()
    return folder


def loaded(options: ServeOptions) -> list[str]:
    return [argument.split("=")[1] for argument in options.arguments() if argument.startswith("--load-model=")]


def test_a_stage_without_an_artifact_is_left_out(tmp_path: Path) -> None:
    options = ServeOptions(shipped(tmp_path, "verifier"))
    assert options.left_out == ("drafter",)
    assert loaded(options) == ["dspark", "verifier"]
    assert "--model-control-mode=explicit" in options.arguments()


def test_a_complete_repository_is_loaded_as_it_is(tmp_path: Path) -> None:
    options = ServeOptions(shipped(tmp_path, "verifier", "drafter"))
    assert options.left_out == ()
    assert not any("control-mode" in argument for argument in options.arguments())


def test_an_artifact_elsewhere_counts(tmp_path: Path) -> None:
    config = shipped(tmp_path, "verifier") / "drafter" / "config.pbtxt"
    text = config.read_text()
    config.write_text(text + '# parameters: { key: "artifact" }\n')
    assert ServeOptions(tmp_path).left_out == ("drafter",)
    config.write_text(text + 'parameters: { key: "artifact", value: { string_value: "/elsewhere" } }\n')
    assert ServeOptions(tmp_path).left_out == ()


def test_what_the_caller_chose_is_loaded(tmp_path: Path) -> None:
    shipped(tmp_path, "verifier")
    assert loaded(ServeOptions(tmp_path, models=("drafter",))) == ["drafter"]
    by_hand = ("--model-control-mode=poll",)
    options = ServeOptions(tmp_path, extra=by_hand)
    assert options.left_out == () and loaded(options) == []


def test_without_any_artifact_only_dspark_is_tried(tmp_path: Path) -> None:
    assert loaded(ServeOptions(shipped(tmp_path))) == ["dspark"]


def test_a_stage_that_is_all_there_is_is_tried(tmp_path: Path) -> None:
    shipped(tmp_path)
    for name in ("dspark", "verifier"):
        shutil.rmtree(tmp_path / name)
    options = ServeOptions(tmp_path)
    assert options.left_out == () and loaded(options) == []
