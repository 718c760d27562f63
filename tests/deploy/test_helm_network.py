"""Ways in: who may call, what the gateway does with calls, where an ingress sends them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from helm_tools import CHART, Document, named, render
from helm_values import CONTROLLER, GATEWAY


def test_envoy_reaches_the_replicas_and_speaks_http2_to_them() -> None:
    rendered = render(GATEWAY)
    pod = rendered.find("Deployment", "-gateway")["spec"]["template"]["spec"]
    config: dict[str, Any] = yaml.safe_load(rendered.find("ConfigMap", "-gateway")["data"]["envoy.yaml"])
    clusters = {cluster["name"]: cluster for cluster in config["static_resources"]["clusters"]}
    routed = re.findall(r'"cluster": "(\w+)"', json.dumps(config["static_resources"]["listeners"]))
    assert set(routed) == clusters.keys()
    address = clusters["grpc"]["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]
    headless = rendered.find("Service", "-headless")
    assert headless["spec"]["clusterIP"] == "None"
    assert address["socket_address"] == {"address": "try-dspark-headless.models.svc", "port_value": 8001}
    assert "http2_protocol_options" in json.dumps(clusters["grpc"]) and clusters["grpc"]["lb_policy"] == "LEAST_REQUEST"
    assert config["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"
    ports = {p["name"]: p["containerPort"] for p in pod["containers"][0]["ports"]}
    listening = {
        listener["name"]: listener["address"]["socket_address"]["port_value"]
        for listener in config["static_resources"]["listeners"]
    }
    assert listening == ports


def test_ingress_speaks_to_the_gateway_where_there_is_one() -> None:
    ingress = ('ingress={"enabled":true,"tlsSecretName":"tls"}', CONTROLLER)
    for values, name in ((ingress, "try-dspark"), ((*ingress, GATEWAY), "try-dspark-gateway")):
        backend = render(*values).find("Ingress")["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
        assert backend == {"name": name, "port": {"name": "grpc"}}
        service = render(*values).find("Service", name.removeprefix("try-dspark"))
        assert named(service["spec"]["ports"], "grpc")["appProtocol"] == "kubernetes.io/h2c"


def callers(policy: Document) -> list[Document]:
    (rule,) = [r for r in policy["spec"]["ingress"] if {"protocol": "TCP", "port": 8001} in r["ports"]]
    return list(rule["from"])


def test_named_clients_are_the_only_ones_beside_the_releases_own_pods() -> None:
    own = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "dspark", "app.kubernetes.io/instance": "try"}}}
    client = {"namespaceSelector": {"matchLabels": {"name": "ingress"}}}
    for suffix in ("", "-gateway"):
        assert callers(render(GATEWAY).find("NetworkPolicy", suffix)) == [{"podSelector": {}}, own]
        assert callers(render(GATEWAY, CONTROLLER).find("NetworkPolicy", suffix)) == [client, own]


def test_the_ingress_example_lets_the_controller_in() -> None:
    rendered = render(CHART / "examples" / "values-ingress.yaml")
    spaces = [peer.get("namespaceSelector") for peer in callers(rendered.find("NetworkPolicy", "-gateway"))]
    assert {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}} in spaces


@pytest.mark.parametrize(
    ("endpoint", "ports"),
    [("", {443}), ("http://minio:9000", {443, 9000}), ("http://minio", {443, 80}), ("https://s3.example.com/x", {443})],
)
def test_a_store_is_reached_at_its_own_port(endpoint: str, ports: set[int]) -> None:
    """The init container that fetches from it is under the server's policy."""
    s3 = json.dumps({"url": "s3://bucket/models", "endpoint": endpoint})
    policy = render(f'modelRepository={{"source":"s3","s3":{s3}}}').find("NetworkPolicy")["spec"]
    opened = {port["port"] for rule in policy["egress"] if "to" not in rule for port in rule["ports"]}
    assert opened - {53} == ports


def test_the_gateway_retries_only_what_envoy_sees() -> None:
    config = render(GATEWAY).find("ConfigMap", "-gateway")["data"]["envoy.yaml"]
    assert set(re.findall(r"retry_on: (\S+)", config)) == {"connect-failure,refused-stream"}
