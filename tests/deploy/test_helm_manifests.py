"""What the rendered manifests say, and that it fits the server, its metrics and its commands."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from artifacts import CHECKOUT
from console_scripts import check_command
from helm_tools import CHART, Document, named, render
from helm_values import ALL, CPU, GATEWAY

from dspark_backend.config import EngineConfig
from dspark_backend.metrics import EngineMetrics, Histogram
from dspark_backend.serving import progress
from dspark_backend.serving.launcher import KILL_SLACK_SECS
from dspark_backend.serving.options import Ports

EXPORT = CHART / "examples" / "values-export.yaml"
MONITORED = 'monitoring={"podMonitor":{"enabled":true},"prometheusRule":{"enabled":true}}'
DERIVED = "dspark_verify_budget_pressure_percent"


def option(container: Document, name: str) -> str:
    (value,) = [a.partition("=")[2] for a in container["args"] if a.startswith(f"--{name}=")]
    return value


def pod(*values: Path | str) -> Document:
    return render(*values).find("Deployment")["spec"]["template"]["spec"]


@pytest.mark.parametrize("values", ALL, ids=range(len(ALL)))
def test_grace_covers_drain_and_exit_timeout(values: tuple[Path | str, ...]) -> None:
    spec = pod(*values)
    server = named(spec["containers"], "server")
    drain = float(server["lifecycle"]["preStop"]["exec"]["command"][1])
    timeout = float(option(server, "exit-timeout-secs"))
    assert drain >= 1
    assert spec["terminationGracePeriodSeconds"] > drain + timeout + KILL_SLACK_SECS + 5
    if any(d["metadata"]["name"] == "try-dspark-gateway" for d in render(*values).documents):
        gateway = render(*values).find("Deployment", "-gateway")["spec"]["template"]["spec"]
        script = gateway["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2]
        waited = float(script.split("sleep ")[1])
        assert waited >= drain + timeout
        assert gateway["terminationGracePeriodSeconds"] > waited + 5


@pytest.mark.parametrize("values", ALL, ids=range(len(ALL)))
def test_every_pod_is_locked_down(values: tuple[Path | str, ...]) -> None:
    specs = render(*values).pod_specs()
    assert len(specs) >= 2
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] >= 10000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert ":" in container["image"] and not container["image"].endswith(":latest")


@pytest.mark.parametrize("values", ALL, ids=range(len(ALL)))
def test_mounts_have_volumes_and_what_the_server_writes_is_writable(values: tuple[Path | str, ...]) -> None:
    for spec in render(*values).pod_specs():
        volumes = {volume["name"] for volume in spec.get("volumes", ())}
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes
    spec = pod(*values)
    server = named(spec["containers"], "server")
    mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    variables = {item["name"]: item.get("value") for item in server["env"]}
    for written in ("/dev/shm", variables["HOME"], variables["DSPARK_CACHE"]):
        assert not mounts[written].get("readOnly", False), written
    assert named(spec["volumes"], "shm")["emptyDir"]["medium"] == "Memory"
    for read in ("/models", "/etc/dspark"):
        assert mounts[read]["readOnly"] is True
    assert option(server, "model-repository") == "/models"


def test_commands_are_console_scripts() -> None:
    for values in ((), (CPU,), (EXPORT,), (GATEWAY,)):
        rendered = render(*values)
        server = rendered.server()
        assert server["command"][:2] == ["tini", "--"]
        check_command([*server["command"][2:], *server["args"]])
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            check_command(server[name]["exec"]["command"])
        wait = named(
            render(*values, 'load={"enabled":true}').find("Job", "-load-1")["spec"]["template"]["spec"][
                "initContainers"
            ],
            "wait",
        )
        check_command([*wait["command"], *wait["args"]])
        (test,) = [d for d in rendered.documents if d["kind"] == "Pod"]
        check_command([*test["spec"]["containers"][0]["command"], *test["spec"]["containers"][0]["args"]])
    for container in pod(EXPORT)["initContainers"][:2]:
        check_command([*container["args"][1:], f"--out={container['args'][0]}"])


def test_the_command_check_can_fail() -> None:
    with pytest.raises(AssertionError, match="no option --wait-for"):
        check_command(["dspark-serve", "health", "--wait-for=3"])


def test_probes_leave_the_check_time_to_answer() -> None:
    server = render(CPU).server()
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = server[name]
        (timeout,) = [float(a.partition("=")[2]) for a in probe["exec"]["command"] if a.startswith("--timeout=")]
        assert 1 <= timeout <= probe["timeoutSeconds"] - 4
        # A real inference, and but for the start one that a busy server passes.
        live = ["--live"] if name != "startupProbe" else []
        assert probe["exec"]["command"][: 2 + len(live)] == ["dspark-serve", "health", *live]
        assert "--ready-only" not in probe["exec"]["command"]


@pytest.mark.parametrize("values", ALL, ids=range(len(ALL)))
def test_ports_agree(values: tuple[Path | str, ...]) -> None:
    rendered = render(*values)
    server = rendered.server()
    declared = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert {name: int(option(server, f"{name}-port")) for name in declared} == declared
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = server[probe]["exec"]["command"]
        assert f"--url=127.0.0.1:{declared['grpc']}" in command
        counters = f"--metrics-url=http://127.0.0.1:{declared['metrics']}/metrics"
        assert (counters in command) is ("--live" in command)
    service = rendered.find("Service")["spec"]
    assert {port["name"]: port["port"] for port in service["ports"]} == declared
    assert {port["targetPort"] for port in service["ports"]} <= declared.keys()
    labels = rendered.find("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    if "NetworkPolicy" in rendered.kinds():
        policy = rendered.find("NetworkPolicy")["spec"]
        assert policy["podSelector"]["matchLabels"].items() <= labels.items()
        opened = {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
        assert {declared["grpc"], declared["http"]} <= opened <= set(declared.values())


def test_default_ports_are_the_servers() -> None:
    declared = {port["name"]: port["containerPort"] for port in render().server()["ports"]}
    assert declared == dict(Ports().named())


def test_a_gpu_by_default_and_none_on_trial() -> None:
    assert render().server()["resources"]["limits"]["nvidia.com/gpu"] == 1
    trial = render(CPU).server()["resources"]
    assert "nvidia.com/gpu" not in trial["limits"] | trial["requests"]
    assert "tolerations" not in pod(CPU)


def exported_metrics() -> set[str]:
    names: set[str] = set()
    for name, metric in EngineMetrics(block_size=7).items():
        names |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if isinstance(metric, Histogram) else {name}
    return names


def named_metrics(text: str) -> set[str]:
    return set(re.findall(r"\bdspark_\w+", text))


def test_metrics_exist() -> None:
    known = exported_metrics()
    rules = json.dumps(render(MONITORED).find("PrometheusRule"))
    keda = json.dumps(render('keda={"enabled":true}').find("ScaledObject"))
    adapter = (CHART / "examples" / "prometheus-adapter.yaml").read_text()
    for text in (rules, keda, adapter, *progress.COUNTERS):
        found = named_metrics(text) - {DERIVED}
        assert found and found <= known, found - known
    reasons = {value for _, metric in EngineMetrics().items() for key, value in metric.labels if key == "reason"}
    assert set(re.findall(r'reason=\\+"(\w+)', rules)) <= reasons


def test_the_dashboard_shows_metrics_that_exist() -> None:
    manifest = render('monitoring={"dashboard":{"enabled":true}}').find("ConfigMap", "-dashboard")
    assert manifest["metadata"]["labels"]["grafana_dashboard"] == "1"
    dashboard = json.loads(manifest["data"]["dspark.json"])
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    histograms = {f"dspark_{name}" for name in ("time_to_first_token_seconds", "time_per_output_token_seconds")}
    assert len(panels) >= 12 and all(panel["targets"] and panel["description"] for panel in panels)
    for expression in expressions:
        found = named_metrics(expression)
        assert found and found <= exported_metrics(), expression
        # Every series is of the chosen pods alone.
        selected = re.findall(r'dspark_\w+\{namespace=~"\$namespace",pod=~"\$pod"[^}]*\}', expression)
        assert len(selected) == len(re.findall(r"dspark_\w+", expression)), expression
        assert expression.count("(") == expression.count(")")
        # A counter alone only grows: its rate is what a picture shows.
        assert all(f"rate({name}{{" in expression for name in found if name.endswith("_total")), expression
    assert {f"{name}_bucket" for name in histograms} <= {name for text in expressions for name in named_metrics(text)}
    assert {"$namespace", "$pod"} == {f"${name['name']}" for name in dashboard["templating"]["list"][1:]}
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) and all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in panels)


def test_the_autoscaler_reads_what_the_adapter_serves() -> None:
    hpa = render('autoscaling={"enabled":true}').find("HorizontalPodAutoscaler")["spec"]
    adapter = yaml.safe_load((CHART / "examples" / "prometheus-adapter.yaml").read_text())
    served = {rule["name"]["as"] for rule in adapter["rules"]["custom"]}
    assert {metric["pods"]["metric"]["name"] for metric in hpa["metrics"]} == served
    for rule in adapter["rules"]["custom"]:
        assert rule["seriesQuery"].partition("{")[0] == rule["name"]["matches"].strip("^$")
    assert "replicas" not in render('autoscaling={"enabled":true}').find("Deployment")["spec"]


def test_parentheses_of_queries_are_balanced() -> None:
    texts = [t["metadata"]["query"] for t in render('keda={"enabled":true}').find("ScaledObject")["spec"]["triggers"]]
    texts += [r["expr"] for r in render(MONITORED).find("PrometheusRule")["spec"]["groups"][0]["rules"]]
    for text in texts:
        for left, right in ("()", "{}", "[]"):
            assert text.count(left) == text.count(right), text
        assert "%!" not in text


def test_the_schema_knows_the_engines_parameters() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["engine"]["properties"]
    assert schema.keys() == {field.name for field in fields(EngineConfig)} - {"verifier", "drafter"}


def test_large_numbers_stay_integers() -> None:
    values = 'engine={"kv_budget_mib":10485760,"profile_seconds":7.5,"prefix_reuse":false,"policy":"fixed:3"}'
    parameters = json.loads(render(values).find("ConfigMap", "-files")["data"]["parameters.json"])
    assert parameters == {
        "provider": "cuda",
        "engine_cache": "/var/cache/dspark/engines",
        "kv_budget_mib": "10485760",
        "profile_seconds": "7.5",
        "prefix_reuse": "false",
        "policy": "fixed:3",
        "max_slots": "16",
        "max_queue_size": "256",
    }


def test_large_numbers_of_the_load_job_and_the_test_stay_integers() -> None:
    rendered = render(
        'load={"enabled":true,"activeDeadlineSeconds":2592000,"maxTokens":1000000}', 'tests={"maxTokens":2e6}'
    )
    job = rendered.find("Job", "-load-1")["spec"]
    assert job["activeDeadlineSeconds"] == 2_592_000 and isinstance(job["activeDeadlineSeconds"], int)
    assert option(job["template"]["spec"]["containers"][0], "tokens") == "1000000"
    assert option(rendered.find("Pod", "-test")["spec"]["containers"][0], "max-tokens") == "2000000"


def test_another_strategy_takes_no_part_of_the_default_one() -> None:
    """Helm merges maps, and Kubernetes forbids rollingUpdate beside Recreate."""
    assert render().find("Deployment")["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert render('updateStrategy={"type":"Recreate"}').find("Deployment")["spec"]["strategy"] == {"type": "Recreate"}


def test_the_cache_holds_what_the_provider_keeps_there() -> None:
    """A pod whose emptyDir outgrows its limit is evicted, and the next one compiles its engines again."""
    for values, limit in (
        ((), "2Gi"),
        (('engine={"provider":"tensorrt"}',), "64Gi"),
        (('engine={"provider":"tensorrt"}', 'server={"cacheSizeLimit":"9Gi"}'), "9Gi"),
    ):
        assert named(pod(*values)["volumes"], "cache")["emptyDir"]["sizeLimit"] == limit


def test_artifacts_come_from_where_the_values_say() -> None:
    def volume(*values: Path | str) -> Document:
        return named(pod(*values)["volumes"], "artifacts")

    assert volume()["persistentVolumeClaim"] == {"claimName": "dspark-models", "readOnly": True}
    assert volume(EXPORT)["persistentVolumeClaim"] == {"claimName": "dspark-artifacts"}
    names = [container["name"] for container in pod(EXPORT)["initContainers"]]
    assert names == ["export-verifier", "export-drafter", "lay-repository"]
    fetch = pod(CHART / "examples" / "values-s3.yaml")["initContainers"][0]
    assert fetch["name"] == "fetch" and "s3://models/qwen3-8b" in fetch["args"]
    assert "artifacts" not in {item["name"] for item in pod(CPU)["volumes"]}
    assert "--artifacts=/opt/dspark/model_repository" in named(pod(CPU)["initContainers"], "lay-repository")["args"]


@pytest.mark.parametrize("values", ALL, ids=range(len(ALL)))
def test_images_are_those_that_deploy_docker_builds(values: tuple[Path | str, ...]) -> None:
    """A target of the Dockerfile, and a document that builds it under this tag."""
    folder = CHART.parents[1] / "docker"
    targets = re.findall(r"^FROM \S+ AS (\S+)", (folder / "Dockerfile").read_text(), re.MULTILINE)
    builds = " ".join(path.read_text() for path in folder.glob("*.md"))
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    ours = [
        container["image"]
        for spec in render(*values).pod_specs()
        for container in (*spec["containers"], *spec.get("initContainers", ()))
        if container["image"].startswith("dspark-triton")
    ]
    assert ours
    for image in ours:
        if "@sha256:" not in image:
            target = image.removeprefix(f"dspark-triton:{version}-")
            assert target in targets, image
            assert f"--target {target} -t {image} " in builds


def test_slots_fit_engines_of_the_default_sizes() -> None:
    """Those of the chart, of the engine command's help and of the engine's own default are one number."""
    help_text = (CHECKOUT / "export" / "dspark_export" / "commands" / "engine.py").read_text()
    built = re.search(r"slots=(\d+),\S+ \(the defaults\)", help_text)
    parameters = json.loads(render().find("ConfigMap", "-files")["data"]["parameters.json"])
    default = next(field.default for field in fields(EngineConfig) if field.name == "max_slots")
    assert built is not None and int(built[1]) == int(parameters["max_slots"]) == default
