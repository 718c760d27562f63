"""The chart: lint, every values file and switch valid for every Kubernetes, wrong values refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import kubernetes_validate
import kubernetes_validate.utils as schemas
import pytest
from helm_tools import CHART, Document, helm, refusal, render
from helm_values import ALL, COMBINATIONS, CPU, GATEWAY

VERSIONS = [f"1.{minor}" for minor in range(29, 38)]
CUSTOM_KINDS = {"PodMonitor", "PrometheusRule", "ScaledObject"}

WRONG = [
    ('replicaCount="two"', "/replicaCount': got string, want integer"),
    ("replicaCount=-1", "/replicaCount': minimum: got -1, want 0"),
    ('replicas=2', "additional properties 'replicas' not allowed"),
    ('image={"pullPolicy":"Sometimes"}', "/image/pullPolicy': value must be one of 'Always'"),
    ('image={"digest":"sha256:abc"}', "/image/digest': 'sha256:abc' does not match pattern"),
    ('modelRepository={"source":"ftp"}', "/modelRepository/source': value must be one of 'image', 'pvc', 's3'"),
    ('modelRepository={"source":"s3"}', "/modelRepository/s3/url': minLength: got 0, want 6"),
    ('modelRepository={"source":"export"}', "/modelRepository/export/verifierModel': minLength"),
    ('modelRepository={"pvc":{"claimName":""}}', "/modelRepository/pvc/claimName': minLength"),
    ('engine={"max_slot":4}', "/engine': additional properties 'max_slot' not allowed"),
    ('engine={"max_slots":0}', "/engine/max_slots': minimum: got 0, want 1"),
    ('engine={"policy":"fixed"}', "/engine/policy': 'fixed' does not match pattern"),
    ('shmSize="lots"', "/shmSize': 'lots' does not match pattern"),
    ('service={"ports":{"grpc":80}}', "/service/ports/grpc': minimum: got 80, want 1,024"),
    ('ingress={"enabled":true}', "/ingress/tlsSecretName': minLength"),
    ('ingress={"enabled":true,"tlsSecretName":"tls"}', "expected networkPolicy.clients to name the ingress"),
    ('image={"tag":""}', "/image/tag': '' does not match pattern"),
    ('load={"policies":["fastest"]}', "/load/policies/0': 'fastest' does not match pattern"),
    ('server={"terminationGracePeriodSeconds":60}', "expected 0 or at least 85 (drainSeconds + exitTimeoutSeconds"),
    ('probes={"liveness":{"timeoutSeconds":2}}', "probes.liveness.timeoutSeconds: expected at least 5"),
    ('autoscaling={"enabled":true,"minReplicas":9}', "expected minReplicas at most maxReplicas, got 9 and 8"),
    ('autoscaling={"enabled":true,"waitingRequests":0,"verifyBudgetPressurePercent":0}', "got neither"),
    ('service={"ports":{"http":9000,"grpc":9000}}', "service.ports: expected three different ports, got 9000, 9000"),
    ('gateway={"enabled":true,"ports":{"grpc":9902}}', "expected two different ports other than Envoy's own"),
    ('service={"type":"LoadBalancer"}', "expected networkPolicy.clients to name who calls from outside"),
    ('modelRepository={"source":"export","export":{"verifierModel":"m"}}', "expected export.drafterCheckpoint to name"),
    ('ingress={"host":"*"}', "/ingress/host': '*' does not match pattern"),
    ('load={"enabled":true,"image":""}', "/load/image': minLength: got 0, want 1"),
    ('gateway={"enabled":true,"image":""}', "/gateway/image': minLength: got 0, want 1"),
    ('engine={"max_context":1}', "/engine/max_context': minimum: got 1, want 2"),
    ('fullnameOverride="UPPER_case"', "/fullnameOverride': 'UPPER_case' does not match pattern"),
    ('nameOverride="My Name"', "/nameOverride': 'My Name' does not match pattern"),
    ('podLabels={"app.kubernetes.io/component":"x"}', "labels beside the chart's own, got app.kubernetes.io/comp"),
    ('podDisruptionBudget={"maxUnavailable":2000}', "/maxUnavailable': maximum: got 2,000, want 1,000"),
    ('updateStrategy={"type":"OnDelete"}', "/updateStrategy/type': value must be one of 'RollingUpdate', 'Recreate'"),
    ('keda={"enabled":true,"cooldownSeconds":7200}', "/keda/cooldownSeconds': maximum: got 7,200, want 3,600"),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cached_schemas() -> object:
    """The validator reads megabytes of definitions again for every document."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schemas, "schema_contents", functools.cache(schemas.schema_contents))
        yield


@functools.cache
def documents() -> list[Document]:
    """What all combinations render to, each document once."""
    return list({json.dumps(d, sort_keys=True): d for values in ALL for d in render(*values).documents}.values())


@pytest.mark.parametrize("values", [(), (CPU,)], ids=["gpu", "cpu"])
def test_lint_strict(values: tuple[Path, ...]) -> None:
    result = helm("lint", "--strict", CHART, *(part for path in values for part in ("--values", path)))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WARNING" not in result.stdout


def test_there_are_twenty_combinations_and_each_renders() -> None:
    assert len(set(COMBINATIONS)) >= 20
    for values in ALL:
        assert {"Deployment", "Service", "ConfigMap", "Pod"} <= render(*values).kinds()


@pytest.mark.parametrize("version", VERSIONS)
def test_valid_for_kubernetes(version: str) -> None:
    assert len(documents()) > 60
    for document in documents():
        if document["kind"] in CUSTOM_KINDS:
            continue
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            place = "/".join(map(str, error.path))
            pytest.fail(f"{document['kind']} {document['metadata']['name']} at {place}: {error.message}")


def test_the_validator_can_fail() -> None:
    (deployment,) = [d for d in render().documents if d["kind"] == "Deployment"]
    wrong = json.loads(json.dumps(deployment))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@pytest.mark.parametrize(("value", "message"), WRONG, ids=[value for value, _ in WRONG])
def test_wrong_values_are_refused(value: str, message: str) -> None:
    assert message in refusal(value)


def test_two_autoscalers_are_refused() -> None:
    assert "they would fight over the replicas" in refusal('autoscaling={"enabled":true}', 'keda={"enabled":true}')


def test_what_a_server_without_a_drafter_would_refuse_is_refused() -> None:
    bare = 'modelRepository={"drafter":false}'
    assert "engine.policy: expected off with" in refusal(bare, 'engine={"policy":"causal"}')
    assert "load.policies: expected [off] with" in refusal(bare, 'load={"enabled":true}')
    assert render(bare, 'load={"enabled":true,"policies":["off"]}', 'engine={"policy":"off"}')


@pytest.mark.parametrize("release", ["my.release", "1st"])
def test_a_release_whose_name_no_service_can_have_is_told(release: str) -> None:
    result = helm("template", release, CHART)
    assert result.returncode != 0 and "fullnameOverride: expected the name of a service" in result.stderr
    assert helm("template", release, CHART, "--set", "fullnameOverride=dspark").returncode == 0


def test_the_gateway_needs_the_headless_service() -> None:
    assert "service.headless true" in refusal(GATEWAY, 'service={"headless":false}')


def test_names_are_unique() -> None:
    for values in ALL:
        names = [(d["kind"], d["metadata"]["name"]) for d in render(*values).documents]
        assert len(names) == len(set(names))
