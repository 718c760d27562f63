"""What a server holds at the moment: its metrics, its Python stubs, their memory and shared-memory regions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil

from dspark_backend.serving import orphans
from dspark_client.errors import ServerConnectionError
from dspark_client.prometheus import Sample, fetch

PUBLISHED_SECS = 0.8
"""Metrics are published twice a second."""

PUBLISHED_MS = 100
"""Between two publications of the server of the fixture ``speculating``."""


def metric(server: Any, name: str, **labels: str) -> float:
    """The sum over all other labels of one of the engine's metrics, named without the prefix.

    Raises KeyError where the endpoint does not carry it.
    """
    full = f"dspark_{name}"
    samples = [
        sample
        for sample in read_metrics(server, full)
        if sample.name == full and labels.items() <= dict(sample.labels).items()
    ]
    if not samples:
        raise KeyError(full)
    return sum(sample.value for sample in samples)


def read_metrics(server: Any, prefix: str = "dspark_") -> list[Sample]:
    """The samples with this prefix. Waits for the endpoint: it opens a moment after the gRPC service."""
    end = time.monotonic() + 5.0
    while True:
        try:
            return fetch(server.metrics_url, prefix, 10.0)
        except ServerConnectionError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for a condition; fails the test with ``what`` where it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def wait_idle(server: Any, seconds: float = 20.0) -> None:
    """Wait until the engine holds nothing: no sequence runs or waits, no committed rows of running sequences."""
    time.sleep(PUBLISHED_SECS)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_bytes"):
        until(lambda name=name: metric(server, name) == 0, seconds, f"{name} is 0")


def stubs() -> list[psutil.Process]:
    """All of Triton's Python stubs, of live servers and orphaned."""
    found = []
    for process in psutil.process_iter():
        try:
            if orphans.declared_server(process.cmdline()) is not None:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def stub_of(server: Any, model: str = "dspark") -> psutil.Process:
    """The stub that runs one model of a server."""
    place = str(server.repository / model)
    (only,) = [process for process in stubs() if place in process.cmdline()[1]]
    return only


def regions_of(server: Any) -> set[str]:
    """Names of the shared-memory regions that a server maps."""
    paths = [area.path for area in psutil.Process(server.pid).memory_maps()]
    return {path.rpartition("/")[2] for path in paths if orphans.REGION_PREFIX in path}


def regions_in_use() -> frozenset[str]:
    """Names of the regions that any process maps."""
    return orphans.mapped_regions()
