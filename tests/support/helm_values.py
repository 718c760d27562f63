"""Values files of the chart and combinations of its switches: what must render, and be valid."""

from __future__ import annotations

from pathlib import Path

from helm_tools import CHART

CPU = CHART / "values-cpu.yaml"
EXAMPLES = sorted((CHART / "examples").glob("values-*.yaml"))
VALUES_FILES: list[tuple[Path | str, ...]] = [(), (CPU,), *((path,) for path in EXAMPLES)]
GATEWAY = 'gateway={"enabled":true}'
CONTROLLER = 'networkPolicy={"clients":[{"namespaceSelector":{"matchLabels":{"name":"ingress"}}}]}'
CALLERS = 'networkPolicy={"clients":[{"ipBlock":{"cidr":"10.0.0.0/8"}}]}'
COMBINATIONS: list[tuple[Path | str, ...]] = [
    (CPU, GATEWAY),
    (CPU, 'load={"enabled":true,"resultsClaim":"results"}', GATEWAY),
    (CPU, 'ingress={"enabled":true,"tlsSecretName":"tls"}', CONTROLLER),
    (CPU, 'modelRepository={"source":"export","export":{"verifierModel":"smollm2-135m","drafterCheckpoint":"/d"}}'),
    ('modelRepository={"source":"export","drafter":false,"export":{"verifierModel":"/m","checkpointsClaim":"c"}}',),
    ('modelRepository={"source":"s3","s3":{"url":"s3://bucket/models","endpoint":"http://minio:9000","secretName":"keys"}}',),
    ('modelRepository={"pvc":{"claimName":"models","subPath":"qwen3"}}',),
    ('modelRepository={"drafter":false}', 'engine={"policy":"off"}'),
    ('server={"cacheClaim":"step-times","extraArguments":["--log-verbose=1"],"env":[{"name":"A","value":"b"}]}',),
    ('autoscaling={"enabled":true,"waitingRequests":0}', 'updateStrategy={"type":"Recreate"}'),
    ('autoscaling={"enabled":true,"verifyBudgetPressurePercent":0}', GATEWAY),
    ('keda={"enabled":true,"verifyBudgetPressurePercent":0}',),
    ('monitoring={"podMonitor":{"enabled":true},"prometheusRule":{"enabled":true},"dashboard":{"enabled":true}}',),
    ('networkPolicy={"enabled":false}', GATEWAY),
    ('networkPolicy={"monitoring":[],"extraEgress":[{"ports":[{"protocol":"TCP","port":9000}]}]}',),
    ('podDisruptionBudget={"enabled":false}', 'topologySpread={"enabled":false}', 'service={"headless":false}'),
    ('podDisruptionBudget={"maxUnavailable":"25%"}', 'service={"type":"LoadBalancer","annotations":{"a":""}}', CALLERS),
    ('serviceAccount={"create":false}', 'imagePullSecrets=[{"name":"registry"}]', 'priorityClassName="high"'),
    (f'image={{"digest":"sha256:{"0" * 64}"}}', 'runtimeClassName="nvidia"', 'nodeSelector={"gpu":"l4"}'),
    ('service={"ports":{"http":9000,"grpc":9001,"metrics":9002}}', 'replicaCount=3', 'nameOverride="dspark"'),
]  # fmt: skip
ALL = VALUES_FILES + COMBINATIONS
