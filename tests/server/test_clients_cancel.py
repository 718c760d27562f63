"""Every way out of a request ends its work on the server."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from client_tools import (
    LONG,
    LONG_TOKENS,
    PROMPT,
    Forwarder,
    command,
    long_request_is_cancelled,
)

from dspark_client import (
    AsyncDSparkClient,
    DeadlineError,
    DSparkClient,
    GenerateOptions,
    Piece,
    RequestCancelledError,
    ServerConnectionError,
)

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]


@pytest.fixture
def client(server) -> Iterator[DSparkClient]:
    with DSparkClient(server.grpc_url, model_name=server.model_name) as made:
        yield made


def test_leaving_the_loop_cancels(server, client):
    with long_request_is_cancelled(server) as wait_until_running:
        for _ in client.stream(PROMPT, options=LONG):
            wait_until_running()
            break


def test_leaving_the_asyncio_loop_cancels(server):
    async def leave():
        made = AsyncDSparkClient(server.grpc_url, model_name=server.model_name)
        async with made, contextlib.aclosing(made.stream(PROMPT, options=LONG)) as pieces:
            async for _ in pieces:
                await asyncio.to_thread(wait_until_running)
                break

    with long_request_is_cancelled(server) as wait_until_running:
        asyncio.run(leave())


def test_cancelling_a_task_cancels(server):
    async def cancel():
        async with AsyncDSparkClient(server.grpc_url, model_name=server.model_name) as made:
            task = asyncio.create_task(made.generate(PROMPT, options=LONG))
            await asyncio.to_thread(wait_until_running)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with long_request_is_cancelled(server) as wait_until_running:
        asyncio.run(cancel())


def test_closing_the_client_cancels(server):
    with long_request_is_cancelled(server) as wait_until_running:
        made = DSparkClient(server.grpc_url, model_name=server.model_name)
        pieces = made.stream(PROMPT, options=LONG)
        next(pieces)
        wait_until_running()
        made.close()
        with pytest.raises(RequestCancelledError):
            list(pieces)


def test_the_clients_timeout(server, client):
    with long_request_is_cancelled(server):
        begin = time.monotonic()
        with pytest.raises(DeadlineError):
            client.generate(PROMPT, options=LONG, timeout=0.5)
        assert 0.4 < time.monotonic() - begin < 3.0


def test_the_servers_timeout(server, client):
    with long_request_is_cancelled(server):
        begin = time.monotonic()
        with pytest.raises(DeadlineError):
            client.generate(PROMPT, options=GenerateOptions(max_tokens=LONG_TOKENS, ignore_eos=True, timeout_ms=300))
        assert time.monotonic() - begin < 3.0


@pytest.fixture
def forwarder(server) -> Iterator[Forwarder]:
    made = Forwarder(server.grpc_url)
    yield made
    made.cut()


def test_a_cut_connection_is_not_tried_again(server, forwarder):
    forwarder.start()
    pieces: list[Piece] = []
    with (
        long_request_is_cancelled(server) as wait_until_running,
        DSparkClient(forwarder.url, model_name=server.model_name) as made,
        pytest.raises(ServerConnectionError),
    ):
        for piece in made.stream(PROMPT, options=LONG):
            pieces.append(piece)
            if len(pieces) == 1:
                wait_until_running()
                forwarder.cut()
    assert pieces
    assert forwarder.accepted == 1


@pytest.mark.parametrize("arguments", [("generate", PROMPT), ("generate", PROMPT, "--no-stream"), ("chat",)])
def test_ctrl_c_cancels_and_exits_130(server, arguments):
    with long_request_is_cancelled(server) as wait_until_running:
        process = subprocess.Popen(
            command(server, *arguments, "--max-tokens", str(LONG_TOKENS), "--ignore-eos"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A test run in a shell's background ignores SIGINT, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        try:
            if arguments[0] == "chat":
                process.stdin.write("Tell a long story.\n")
                process.stdin.flush()
            wait_until_running()
            process.send_signal(signal.SIGINT)
            begin = time.monotonic()
            _, stderr = process.communicate(timeout=20)
            assert time.monotonic() - begin < 3.0
        finally:
            process.kill()
        assert (process.returncode, stderr) == (130, "")
