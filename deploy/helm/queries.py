"""Every query of the chart, asked of a real Prometheus that scrapes a running server: dashboard, alerts, KEDA, adapter.

    deploy/quickstart/run --detach
    python deploy/helm/queries.py --metrics localhost:8002      # while requests run, so that there is something to see

Needs helm and prometheus (Debian: apt install prometheus; HELM and PROMETHEUS name others), and PyYAML. Exit code 1
where a query is refused, or has no value. An alert has none while it does not fire: its two sides are asked, too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
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
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parent / "dspark"
NAMESPACE, RELEASE = "models", "check"
POD = f"{RELEASE}-dspark-0a1b2c3d4e-5f6g7"
LABELS = {"namespace": NAMESPACE, "pod": POD, "container": "server", "endpoint": "metrics"}
"""As the operator gives them to what a PodMonitor finds; the job is NAMESPACE/PODMONITOR."""
SWITCHES = "monitoring.dashboard.enabled=true,monitoring.prometheusRule.enabled=true,keda.enabled=true"


class Expected(Enum):
    """What an answer must be like."""

    VALUE = "at least one number"
    ANY = "anything: an alert has no value while it does not fire"
    NOTHING = "nothing: it asks whether something is absent"


@dataclass(frozen=True)
class Query:
    """One expression, and where it stands."""

    place: str
    expression: str
    expected: Expected = Expected.VALUE


@dataclass(frozen=True)
class Answer:
    """What Prometheus said to a query."""

    query: Query
    values: tuple[float, ...]
    refusal: str = ""

    @property
    def fine(self) -> bool:
        """Whether it is as expected."""
        if self.refusal or self.query.expected is not Expected.VALUE:
            return not self.refusal and not (self.values and self.query.expected is Expected.NOTHING)
        return any(not math.isnan(value) for value in self.values)

    def __str__(self) -> str:
        said = f"refused: {self.refusal}" if self.refusal else ", ".join(f"{value:.4g}" for value in self.values)
        return f"{'ok   ' if self.fine else 'WRONG'} {self.query.place}: {said or 'no value'}"


def rendered() -> dict[str, Any]:
    """The chart's documents that hold queries, by kind."""
    command = [os.environ.get("HELM", "helm"), "template", RELEASE, str(CHART), "--namespace", NAMESPACE]
    text = subprocess.run([*command, "--set", SWITCHES], check=True, capture_output=True, text=True).stdout
    documents = [document for document in yaml.safe_load_all(text) if document]
    return {d["kind"]: d for d in documents if d["kind"] != "ConfigMap" or d["metadata"]["name"].endswith("-dashboard")}


def queries() -> Iterator[Query]:
    """All of them, with the placeholders filled in that Grafana and the adapter fill in."""
    documents = rendered()
    yield from dashboard_queries(json.loads(documents["ConfigMap"]["data"]["dspark.json"]))
    for group in documents["PrometheusRule"]["spec"]["groups"]:
        for rule in group["rules"]:
            yield from alert_queries(f"alert: {rule['alert']}", rule["expr"])
    for trigger in documents["ScaledObject"]["spec"]["triggers"]:
        yield Query("keda", trigger["metadata"]["query"])
    adapter = yaml.safe_load((CHART / "examples" / "prometheus-adapter.yaml").read_text(encoding="utf-8"))
    for rule in adapter["rules"]["custom"]:
        name = rule["name"]["as"]
        text = rule["metricsQuery"].replace("<<.Series>>", rule["name"]["matches"].strip("^$"))
        text = text.replace("<<.LabelMatchers>>", f'namespace="{NAMESPACE}",pod=~"{POD}"')
        yield Query(f"adapter: series of {name}", rule["seriesQuery"])
        yield Query(f"adapter: {name}", text.replace("<<.GroupBy>>", "pod"))


def dashboard_queries(dashboard: dict[str, Any]) -> Iterator[Query]:
    """Those of the panels, and what the variables choose from."""

    def filled(text: str) -> str:
        return text.replace("$__rate_interval", "1m").replace("$namespace", NAMESPACE).replace("$pod", ".*")

    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            series, _, label = variable["query"]["query"].removeprefix("label_values(").rstrip(")").rpartition(", ")
            labelled = f'{series.rstrip("}")}{"," if "{" in series else "{"}{label}!=""}}'
            yield Query(f"dashboard: variable {variable['name']}", filled(labelled))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield Query(f"dashboard: {panel['title']}, {target['legendFormat']}", filled(target["expr"]))


def alert_queries(place: str, expression: str) -> Iterator[Query]:
    """An alert's expression, and what it compares."""
    if absent := re.fullmatch(r"absent\((.*)\)", expression):
        yield Query(place, expression, Expected.NOTHING)
        yield Query(f"{place}, what is not absent", absent[1])
        return
    yield Query(place, expression, Expected.ANY)
    sides = re.split(r" and | (?:[<>]=?|[=!]=) ", expression)
    for number, side in enumerate((side for side in sides if not re.fullmatch(r"[\d.]+", side)), start=1):
        yield Query(f"{place}, side {number}", side)


@contextmanager
def prometheus(metrics: str, port: int, scrape_seconds: float = 1.0) -> Iterator[str]:
    """A Prometheus that scrapes ``metrics`` (host:port), as if it were a pod of the release. It has done so once.

    Raises:
        OSError: it does not start, or finds no metrics there.
    """
    job = f"{NAMESPACE}/{RELEASE}-dspark"
    scrape = {"job_name": job, "static_configs": [{"targets": [metrics], "labels": LABELS}]}
    every = {"scrape_interval": f"{scrape_seconds * 1000:.0f}ms", "scrape_timeout": f"{scrape_seconds * 1000:.0f}ms"}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "prometheus.yml"
        config.write_text(yaml.safe_dump({"global": every, "scrape_configs": [scrape]}), encoding="utf-8")
        arguments = [f"--config.file={config}", f"--storage.tsdb.path={folder}/data", "--log.level=warn"]
        command = [os.environ.get("PROMETHEUS", "prometheus"), *arguments, f"--web.listen-address=127.0.0.1:{port}"]
        process = subprocess.Popen(command)
        try:
            server = f"http://127.0.0.1:{port}"
            wait_for_a_scrape(server, process)
            yield server
        finally:
            process.terminate()
            process.wait()


def wait_for_a_scrape(server: str, process: subprocess.Popen[bytes]) -> None:
    """Prometheus looks for targets only every five seconds.

    Raises:
        OSError: as ``prometheus`` says.
    """
    end = time.monotonic() + 30
    reason = "no answer"
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{server}/api/v1/targets", timeout=5) as answer:
                targets = json.load(answer)["data"]["activeTargets"]
        except OSError as error:
            reason = str(error)
        else:
            if any(target["health"] == "up" for target in targets):
                return
            reason = ", ".join(target["lastError"] for target in targets) or "no target"
        time.sleep(0.1)
    raise OSError(f"Prometheus at {server} scrapes nothing: {reason}")


def ask(server: str, query: Query) -> Answer:
    """The answer to an instant query."""
    url = f"{server}/api/v1/query?{urllib.parse.urlencode({'query': query.expression})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            result = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        return Answer(query, (), json.load(error)["error"])
    return Answer(query, tuple(float(series["value"][1]) for series in result))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metrics", required=True, metavar="HOST:PORT", help="where the server publishes metrics")
    parser.add_argument("--seconds", type=float, default=20.0, help="of scraping before the queries are asked")
    parser.add_argument("--port", type=int, default=9497, help="for Prometheus")
    given = parser.parse_args()
    try:
        asked = list(queries())
        with prometheus(given.metrics, given.port) as server:
            time.sleep(given.seconds)
            answers = [ask(server, query) for query in asked]
    except (OSError, subprocess.CalledProcessError) as error:
        wanted = f"helm and prometheus on PATH, port {given.port} free, and metrics at {given.metrics}"
        print(f"error: {error}; expected {wanted}", file=sys.stderr)
        return 1
    print(*answers, sep="\n")
    wrong = sum(not answer.fine for answer in answers)
    print(f"{len(answers)} queries, {wrong} without a good answer")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
