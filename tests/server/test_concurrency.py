"""Many requests at once, clients that vanish, and what a server holds after all of it."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import psutil
import pytest
from raw_calls import RawClient, Refused
from server_state import metric, regions_of, stub_of, until, wait_idle

pytestmark = [pytest.mark.server, pytest.mark.timeout(240)]

IDS = {"input_ids": [1, 2, 3]}
ANSWER = [17, 359, 2, 293]
LONG = IDS | {"max_tokens": 500, "stream": True}
SUPPORT = Path(__file__).resolve().parents[1] / "support"
SUBJECTS = ("sea", "moon", "city", "garden", "winter", "river", "library", "engine")
OPENINGS = ("The {} is", "In the {} there was", "My favourite {} has", "Nobody knew that the {}")
ENDS = ("stop", "length", "cancelled", "deadline", "rejected", "error")
CHAOS_MIB = 16.0
"""What the model's process may grow by when the 200 requests come again: the first time fills caches and arenas."""


@pytest.fixture(scope="module")
def chaos_server(make_server):
    """A tiny server of its own, because its clients behave badly."""
    made = make_server("tiny", exit_timeout_secs=5)
    yield made
    # No check of a clean end: Triton waits in vain for streams that were cancelled in the instant of their end.
    made.process.stop()


def finished(server) -> dict[str, float]:
    """Requests that ended, by how."""
    return {reason: metric(server, "requests_finished_total", reason=reason) for reason in ENDS}


def test_32_streams_at_once_say_what_each_says_alone(server):
    prompts = [opening.format(subject) for opening in OPENINGS for subject in SUBJECTS]
    assert len(set(prompts)) == 32

    def ask(client: RawClient, prompt: str) -> tuple[str, list[int]]:
        pieces = list(client.stream({"text_input": prompt, "max_tokens": 10, "stream": True}))
        assert pieces[-1]["finish_reason"][0] in ("stop", "length")
        text = "".join(piece["text_output"][0] for piece in pieces)
        return text, [token for piece in pieces for token in piece["output_ids"]]

    with RawClient(server.grpc_url) as client, ThreadPoolExecutor(32) as pool:
        alone = [ask(client, prompt) for prompt in prompts]
        together = list(pool.map(lambda prompt: ask(client, prompt), prompts))
    assert together == alone
    assert len({text for text, _ in alone}) > 16


# Each of these makes one request and returns the sequences that it asked for.


def complete(server, client: RawClient, rng: random.Random) -> int:
    tokens = rng.randint(1, 60)
    assert client.generate(IDS | {"max_tokens": tokens})["num_output_tokens"] == [tokens]
    return 1


def cancel(server, client: RawClient, rng: random.Random) -> int:
    call = client.open_stream(LONG)
    for _ in range(rng.randint(0, 20)):
        next(call)
    time.sleep(rng.random() * 0.02)
    call.cancel()
    return 1


def deadline(server, client: RawClient, rng: random.Random) -> int:
    with pytest.raises(Refused, match=r"^\[DEADLINE_EXCEEDED\] timeout_ms"):
        list(client.stream(LONG | {"num_return_sequences": 3, "timeout_ms": rng.randint(1, 60)}))
    return 3


def client_deadline(server, client: RawClient, rng: random.Random) -> int:
    with pytest.raises(grpc.RpcError):
        list(client.open_stream(LONG | {"num_return_sequences": 4}, timeout=0.005 + 0.05 * rng.random()))
    return 4


def disconnect(server, client: RawClient, rng: random.Random) -> int:
    with RawClient(server.grpc_url) as own:
        call = own.open_stream(LONG)
        for _ in range(rng.randint(1, 20)):
            next(call)
    return 1


def http_disconnect(server, client: RawClient, rng: random.Random) -> int:
    body = json.dumps(LONG).encode()
    address = urlsplit(server.http_url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = "POST /v2/models/dspark/generate_stream HTTP/1.1\r\nHost: test\r\nContent-Length: "
        connection.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
        assert connection.recv(rng.randint(64, 4096))
    return 1


BEHAVIOURS = (complete, cancel, deadline, client_deadline, disconnect, http_disconnect)

VICTIM = """
import sys
sys.path.insert(0, sys.argv[1])
from raw_calls import RawClient
client = RawClient(sys.argv[2])
calls = [client.open_stream({"input_ids": [1, 2, index], "max_tokens": 500, "stream": True}) for index in range(8)]
for call in calls:
    next(call)
print("streaming", flush=True)
for call in calls:
    for _ in call:
        pass
"""


def killed_clients(server, count: int) -> int:
    """Processes that are killed in the middle of eight streams each; returns how many streams that were."""
    command = [sys.executable, "-c", VICTIM, str(SUPPORT), server.grpc_url]
    victims = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    for victim in victims:
        assert victim.stdout.readline() == "streaming\n"
        victim.kill()
        victim.wait()
        victim.stdout.close()
    return 8 * count


def test_200_requests_of_clients_that_leave(chaos_server):
    server = chaos_server
    with RawClient(server.grpc_url) as client:
        assert client.generate(IDS | {"max_tokens": 4})["output_ids"] == ANSWER
        wait_idle(server)
        stub, regions, before = stub_of(server), regions_of(server), finished(server)
        threads, files, memory = stub.num_threads(), stub.num_fds(), []
        rng = random.Random(5)
        jobs = [(rng.choice(BEHAVIOURS), random.Random(index)) for index in range(200)]
        asked = 0
        for repetition in range(2):
            with ThreadPoolExecutor(12) as pool:
                victims = pool.submit(killed_clients, server, 2 - repetition)
                asked += sum(pool.map(lambda job: job[0](server, client, job[1]), jobs)) + victims.result()
            wait_idle(server)
            memory.append(stub.memory_info().rss)
        after = finished(server)
        grown = {reason: after[reason] - before[reason] for reason in ENDS}
        # A request can be cancelled before it reached the model at all.
        assert 0.5 * asked < sum(grown.values()) <= asked, (grown, asked)
        assert grown["error"] == grown["rejected"] == 0, grown
        assert min(grown["length"], grown["cancelled"], grown["deadline"]) >= 15, grown
        assert client.generate(IDS | {"max_tokens": 4})["output_ids"] == ANSWER
    assert stub_of(server).pid == stub.pid
    assert (stub.num_threads(), stub.num_fds()) == (threads, files)
    grown_mib = (memory[1] - memory[0]) / 2**20
    assert grown_mib < CHAOS_MIB, f"the model's process grew by {grown_mib:.2f} MiB"
    assert regions_of(server) == regions
    assert server.process.poll() is None


def test_a_client_that_does_not_read_stops_nobody(chaos_server):
    # 16 x 500 tokens: pieces enough to fill gRPC's windows.
    silent = LONG | {"num_return_sequences": 8, "temperature": 1.0}
    with RawClient(chaos_server.grpc_url) as reader, RawClient(chaos_server.grpc_url) as client:
        calls = [reader.open_stream(silent) for _ in range(2)]
        for call in calls:
            assert not next(call).error_message
        begin = time.monotonic()
        for _ in range(20):
            assert client.generate(IDS | {"max_tokens": 4})["output_ids"] == ANSWER
        assert time.monotonic() - begin < 20.0
        until(lambda: metric(chaos_server, "num_requests_running") == 0, 30, "the unread requests are finished")
        # Late, but whole.
        for call in calls:
            last = [response.infer_response for response in call]
            ends = sum(any(output.name == "finish_reason" for output in response.outputs) for response in last)
            assert ends == 8
    wait_idle(chaos_server)


@pytest.mark.slow
def test_memory_is_flat_over_2000_requests(make_server):
    """After a warm-up the model's process and the server each may grow by 1 KiB a request: 2 MiB."""
    server = make_server("tiny")

    def some(count: int) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: client.generate(IDS | {"max_tokens": 2}), range(count)))

    stub, triton = stub_of(server), psutil.Process(server.pid)
    with RawClient(server.grpc_url) as client:
        some(600)
        before = stub.memory_info().rss, triton.memory_info().rss
        some(2000)
        time.sleep(1.0)
        after = stub.memory_info().rss, triton.memory_info().rss
    growth = [(now - then) / 2**20 for then, now in zip(before, after, strict=True)]
    assert max(growth) < 2.0, f"growth in MiB over 2000 requests: stub {growth[0]:.2f}, tritonserver {growth[1]:.2f}"
    server.stop()
