"""What points at pods or deployments finds them: a selector that meets nothing is valid, and does nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_tools import CHART, Document, helm, refusal, render
from helm_values import GATEWAY

MONITORED = 'monitoring={"podMonitor":{"enabled":true},"prometheusRule":{"enabled":true}}'


def template(suffix: str = "", *values: Path | str) -> Document:
    """The pod template of a deployment."""
    found: Document = render(*values).find("Deployment", suffix)["spec"]["template"]
    return found


def meets(selector: Any, suffix: str = "", *values: Path | str) -> bool:
    labels = template(suffix, *values)["metadata"]["labels"]
    return bool(selector["matchLabels"]) and selector["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("suffix", ["", "-gateway"])
def test_disruption_budgets_and_spreading_are_of_these_pods_alone(suffix: str) -> None:
    other = "-gateway" if not suffix else ""
    budget = render(GATEWAY).find("PodDisruptionBudget", suffix)["spec"]
    assert budget["maxUnavailable"] == 1
    spread = template(suffix, GATEWAY)["spec"]["topologySpreadConstraints"]
    for selector in (budget["selector"], *(constraint["labelSelector"] for constraint in spread)):
        assert meets(selector, suffix, GATEWAY) and not meets(selector, other, GATEWAY)
    keys = [constraint["topologyKey"] for constraint in spread]
    assert keys == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"][: len(keys)]


def test_the_monitor_finds_the_servers_metrics_port() -> None:
    monitor = render(MONITORED, GATEWAY).find("PodMonitor")
    assert meets(monitor["spec"]["selector"]) and not meets(monitor["spec"]["selector"], "-gateway", GATEWAY)
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    ports = {port["name"] for port in template()["spec"]["containers"][0]["ports"]}
    assert endpoint["port"] in ports and endpoint["path"] == "/metrics"
    labelled = render('monitoring={"podMonitor":{"enabled":true,"labels":{"release":"prometheus"}}}').find("PodMonitor")
    assert labelled["metadata"]["labels"]["release"] == "prometheus"


@pytest.mark.parametrize(
    ("kind", "values"),
    [("HorizontalPodAutoscaler", 'autoscaling={"enabled":true}'), ("ScaledObject", 'keda={"enabled":true}')],
)
def test_autoscalers_scale_the_server(kind: str, values: str) -> None:
    rendered = render(values)
    target = rendered.find(kind)["spec"]["scaleTargetRef"]
    assert target["name"] == rendered.find("Deployment")["metadata"]["name"]
    assert target.get("kind", "Deployment") == "Deployment"
    assert "replicas" not in rendered.find("Deployment")["spec"]


def test_keda_holds_replicas_as_long_as_it_is_told() -> None:
    """Its own cooldownPeriod is for the way to 0 replicas alone, which the chart does not go."""
    spec = render('keda={"enabled":true,"cooldownSeconds":700}').find("ScaledObject")["spec"]
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] == 700
    assert spec["minReplicaCount"] >= 1 and "cooldownPeriod" not in spec


@pytest.mark.parametrize("length", [3, 46])
def test_queries_find_the_pods_of_long_names(length: int) -> None:
    """Kubernetes cuts NAME-HASH- to 58 characters before it adds five of its own."""
    values = (f'fullnameOverride="{"d" * length}"', 'keda={"enabled":true}', MONITORED)
    pod = f"{'d' * length}-{'7c9d5b8f6f'}-"[:58] + "x2v4z"
    texts = [json.dumps(d) for d in render(*values).documents if d["kind"] in ("ScaledObject", "PrometheusRule")]
    patterns = {pattern for text in texts for pattern in re.findall(r'pod=~\\+"(.*?)\\+"', text)}
    assert len(texts) == 2 and len(patterns) == 1
    assert re.fullmatch(patterns.pop(), pod)
    assert "maxLength: got 47, want 46" in refusal(f'fullnameOverride="{"d" * 47}"')
    longest = helm("template", "r" * 50, CHART).stdout
    assert f"name: {'r' * 46}\n" in longest and "r" * 47 + "\n" not in longest.replace("instance: " + "r" * 50, "")


@pytest.mark.parametrize("headless", ["true", "false"])
def test_the_notes_name_services_that_there_are(headless: str) -> None:
    values = ("--set", f"replicaCount=2,service.headless={headless}")
    said = helm("install", "try", CHART, "--dry-run=client", *values).stdout.partition("NOTES:")[2]
    assert "rollout status deployment/try-dspark\n" in said
    assert ("try-dspark-headless" in said) is (headless == "true")


def test_load_scaling_and_what_needs_operators_is_off_by_default() -> None:
    assert not {"Job", "HorizontalPodAutoscaler", "ScaledObject", "PodMonitor", "PrometheusRule", "Ingress"} & (
        render().kinds()
    )


def test_the_test_pod_is_there_when_helm_reads_its_log() -> None:
    """A pod that is deleted as it succeeds makes `helm test --logs` fail."""
    annotations = render().find("Pod", "-test")["metadata"]["annotations"]
    assert annotations["helm.sh/hook"] == "test"
    assert annotations["helm.sh/hook-delete-policy"] == "before-hook-creation"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt install prometheus)")
def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    spec = render(MONITORED).find("PrometheusRule")["spec"]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(spec))
    result = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"SUCCESS: {len(spec['groups'][0]['rules'])} rules found" in result.stdout
    file.write_text(file.read_text().replace("absent(", "absend("))
    assert subprocess.run(["promtool", "check", "rules", file], capture_output=True, check=False).returncode != 0
