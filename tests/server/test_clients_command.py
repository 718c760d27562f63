"""The command line against the running server."""

from __future__ import annotations

import json
import subprocess

import pytest
from client_tools import LONG_TOKENS, PROMPT, SHORT, command

from dspark_client import DSparkClient

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]


def run_command(server, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(server, *arguments), input=stdin, capture_output=True, text=True, timeout=120, check=False
    )


def test_command_generate(server):
    with DSparkClient(server.grpc_url, model_name=server.model_name) as client:
        (expected,) = client.generate(PROMPT, options=SHORT)
    plain = run_command(server, "generate", PROMPT, "--max-tokens", "24", "--stats")
    assert (plain.returncode, plain.stdout) == (0, expected.text + "\n")
    assert f"{len(expected.token_ids)} out" in plain.stderr
    piped = run_command(server, "generate", "-", "--max-tokens", "24", "--no-stream", stdin=PROMPT)
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, expected.text + "\n", "")
    lines = run_command(server, "generate", PROMPT, "--max-tokens", "24", "--json").stdout.splitlines()
    pieces = [json.loads(line) for line in lines]
    assert "".join(piece["text"] for piece in pieces) == expected.text
    assert pieces[-1]["usage"]["output_tokens"] == len(expected.token_ids)
    whole = run_command(server, "generate", PROMPT, "--max-tokens", "24", "--json", "--no-stream").stdout
    assert json.loads(whole)["token_ids"] == list(expected.token_ids)


def test_command_chat(server):
    turns = "Say hello.\nAnd again.\n/reset\nSay hello.\n/exit\n"
    done = run_command(server, "chat", "--system", "Be brief.", "--max-tokens", "16", "--json", stdin=turns)
    assert (done.returncode, done.stderr) == (0, "")
    pieces = [json.loads(line) for line in done.stdout.splitlines()]
    inputs = [piece["usage"]["input_tokens"] for piece in pieces if piece["usage"]]
    assert len(inputs) == 3
    assert inputs[1] > inputs[0] == inputs[2]


def test_command_tells(server):
    models = [json.loads(line) for line in run_command(server, "models", "--json").stdout.splitlines()]
    assert server.model_name in {model["name"] for model in models}
    assert server.model_name in run_command(server, "models").stdout
    run_command(server, "generate", PROMPT, "--max-tokens", "4")
    told = json.loads(run_command(server, "stats", "--json", "--metrics-url", server.metrics_url).stdout)
    assert told["statistics"][0]["inferences"] > 0
    assert {sample["name"] for sample in told["metrics"]} >= {"dspark_generation_tokens_total"}
    table = run_command(server, "stats", "--metrics-url", server.metrics_url)
    assert (table.returncode, table.stderr) == (0, "")
    assert "dspark_generation_tokens_total" in table.stdout


def test_command_errors(server):
    wrong = run_command(server, "generate", PROMPT, "--temperature", "-1")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("dspark: temperature: expected")
    late = run_command(server, "generate", PROMPT, "--max-tokens", str(LONG_TOKENS), "--ignore-eos", "--timeout", "0.5")
    assert late.returncode == 5
    assert late.stderr.count("\n") == 1
