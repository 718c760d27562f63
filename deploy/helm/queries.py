"""Every query of the chart, asked of a real Prometheus that scrapes a running server: dashboard, alerts, KEDA, adapter.

    dspark-serve --model-repository model_repository &      # and some requests, so that there is something to see
    python deploy/helm/queries.py --metrics localhost:8002

Needs helm and prometheus (Debian: apt install prometheus; HELM and PROMETHEUS name others), and PyYAML. Exit code 1
where a query is refused, or where one that should always have a value has none.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parent / "dspark"
NAMESPACE, RELEASE = "models", "check"
POD = f"{RELEASE}-dspark-0a1b2c3d4e-5f6g7"
SWITCHES = "monitoring.dashboard.enabled=true,monitoring.prometheusRule.enabled=true,keda.enabled=true"


@dataclass(frozen=True)
class Query:
    """One expression, and where it stands."""

    place: str
    expression: str
    alert: bool = False
    """An alert has a value while it fires, and none otherwise."""


def rendered() -> dict[str, Any]:
    """The chart's documents that hold queries, by kind."""
    command = [os.environ.get("HELM", "helm"), "template", RELEASE, str(CHART), "--namespace", NAMESPACE]
    text = subprocess.run([*command, "--set", SWITCHES], check=True, capture_output=True, text=True).stdout
    documents = [document for document in yaml.safe_load_all(text) if document]
    return {d["kind"]: d for d in documents if d["kind"] != "ConfigMap" or d["metadata"]["name"].endswith("-dashboard")}


def queries() -> Iterator[Query]:
    """All of them, with the placeholders filled in that Grafana and the adapter fill in."""
    documents = rendered()
    dashboard = json.loads(documents["ConfigMap"]["data"]["dspark.json"])
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"].replace("$__rate_interval", "1m")
            text = text.replace("$namespace", NAMESPACE).replace("$pod", ".*")
            yield Query(f"dashboard: {panel['title']}, {target['legendFormat']}", text)
    for group in documents["PrometheusRule"]["spec"]["groups"]:
        for rule in group["rules"]:
            yield Query(f"alert: {rule['alert']}", rule["expr"], alert=True)
    for trigger in documents["ScaledObject"]["spec"]["triggers"]:
        yield Query("keda", trigger["metadata"]["query"])
    adapter = yaml.safe_load((CHART / "examples" / "prometheus-adapter.yaml").read_text(encoding="utf-8"))
    for rule in adapter["rules"]["custom"]:
        text = rule["metricsQuery"].replace("<<.Series>>", rule["name"]["matches"].strip("^$"))
        text = text.replace("<<.LabelMatchers>>", f'namespace="{NAMESPACE}",pod=~"{POD}"').replace(
            "<<.GroupBy>>", "pod"
        )
        yield Query(f"adapter: {rule['name']['as']}", text)


@contextmanager
def prometheus(metrics: str, port: int) -> Iterator[str]:
    """A Prometheus that scrapes ``metrics`` (host:port) every second, as if it were a pod of the release."""
    labels = {"namespace": NAMESPACE, "pod": POD}
    scrape = {"job_name": "dspark", "static_configs": [{"targets": [metrics], "labels": labels}]}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "prometheus.yml"
        config.write_text(yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}))
        arguments = [f"--config.file={config}", f"--storage.tsdb.path={folder}/data", "--log.level=warn"]
        command = [os.environ.get("PROMETHEUS", "prometheus"), *arguments, f"--web.listen-address=127.0.0.1:{port}"]
        process = subprocess.Popen(command)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def ask(server: str, expression: str) -> list[float]:
    """The values of an instant query.

    Raises:
        ValueError: Prometheus refuses it; with what it says.
    """
    url = f"{server}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return [float(series["value"][1]) for series in json.load(answer)["data"]["result"]]
    except urllib.error.HTTPError as error:
        raise ValueError(json.load(error)["error"]) from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metrics", required=True, metavar="HOST:PORT", help="where the server publishes metrics")
    parser.add_argument("--seconds", type=float, default=20.0, help="of scraping before the queries are asked")
    parser.add_argument("--port", type=int, default=9497, help="for Prometheus")
    given = parser.parse_args()
    try:
        return check(given.metrics, given.port, given.seconds)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}; expected helm and prometheus on PATH, and port {given.port} free", file=sys.stderr)
        return 1


def check(metrics: str, port: int, seconds: float) -> int:
    """Ask all queries; 1 where one has no good answer."""
    asked, wrong = list(queries()), 0
    with prometheus(metrics, port) as server:
        time.sleep(seconds)
        for query in asked:
            try:
                values = ask(server, query.expression)
            except ValueError as error:
                said, fine = f"refused: {error}", False
            else:
                none = "does not fire" if query.alert else "no value"
                said = ", ".join(f"{value:.4g}" for value in values) or none
                fine = query.alert or any(not math.isnan(value) for value in values)
            wrong += not fine
            print(f"{'ok   ' if fine else 'WRONG'} {query.place}: {said}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
