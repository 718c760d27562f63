"""The clients against the running server: answers, what the server tells, connections."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from client_tools import NO_RETRY, PROMPT, SHORT, Forwarder

from dspark_client import (
    AsyncDSparkClient,
    Completion,
    ConnectionOptions,
    DeadlineError,
    DSparkClient,
    GenerateOptions,
    InvalidRequestError,
    Message,
    RetryPolicy,
    ServerConnectionError,
)
from dspark_client.completion import collect

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]


@pytest.fixture
def client(server) -> Iterator[DSparkClient]:
    with DSparkClient(server.grpc_url, model_name=server.model_name) as made:
        yield made


def answer(completion: Completion) -> tuple[object, ...]:
    """What must not depend on how an answer was fetched."""
    return completion.text, completion.token_ids, completion.finish_reason, completion.usage.input_tokens


def with_async(server, use: Callable[[AsyncDSparkClient], object]):
    async def run():
        async with AsyncDSparkClient(server.grpc_url, model_name=server.model_name) as made:
            return await use(made)

    return asyncio.run(run())


def test_streaming_equals_generate(client):
    pieces = list(client.stream(PROMPT, options=SHORT))
    assert len(pieces) > 1
    assert [piece.finish_reason is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    (streamed,), (whole,) = collect(pieces), client.generate(PROMPT, options=SHORT)
    assert answer(streamed) == answer(whole)
    assert whole.text
    assert whole.usage.output_tokens == len(whole.token_ids) == 24 or whole.finish_reason == "stop"
    times = whole.usage
    assert times.arrival_ns <= times.first_scheduled_ns <= times.first_token_ns <= times.last_token_ns


def test_blocking_equals_asyncio(server, client):
    async def both(made):
        pieces = [piece async for piece in made.stream(PROMPT, options=SHORT)]
        return collect(pieces), await made.generate(PROMPT, options=SHORT)

    streamed, whole = with_async(server, both)
    expected = [answer(completion) for completion in client.generate(PROMPT, options=SHORT)]
    assert [answer(c) for c in streamed] == [answer(c) for c in whole] == expected


def test_token_ids_and_messages_are_prompts(client):
    (first,) = client.generate(PROMPT, options=SHORT)
    (more,) = client.generate(input_ids=first.token_ids, options=SHORT)
    assert more.usage.input_tokens == len(first.token_ids)
    (chat,) = client.generate(messages=[Message("user", "Say hello.")], options=SHORT)
    (same,) = client.generate(messages=[{"role": "user", "content": "Say hello."}], options=SHORT)
    assert chat.text == same.text != ""


def test_several_sequences(client):
    options = GenerateOptions(max_tokens=12, temperature=1.0, seed=7, num_return_sequences=3)
    whole = client.generate(PROMPT, options=options)
    streamed = collect(client.stream(PROMPT, options=options))
    for completions in (whole, streamed):
        assert [completion.sequence_index for completion in completions] == [0, 1, 2]
        for completion in completions:
            assert len(completion.token_ids) == completion.usage.output_tokens <= 12


def test_log_probs(client):
    options = GenerateOptions(max_tokens=16, return_log_probs=True)
    (streamed,), (whole,) = collect(client.stream(PROMPT, options=options)), client.generate(PROMPT, options=options)
    assert len(whole.log_probs) == len(whole.token_ids) > 0
    assert all(value <= 0 for value in whole.log_probs)
    assert streamed.log_probs == pytest.approx(whole.log_probs, abs=1e-4)
    (without,) = client.generate(PROMPT, options=SHORT)
    assert without.log_probs == ()


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression(server, client, algorithm):
    connection = ConnectionOptions(compression=algorithm)
    with DSparkClient(server.grpc_url, model_name=server.model_name, connection=connection) as compressed:
        text = PROMPT * 20
        assert [answer(c) for c in compressed.generate(text, options=SHORT)] == [
            answer(c) for c in client.generate(text, options=SHORT)
        ]


def test_threads_share_a_client(client):
    expected = answer(client.generate(PROMPT, options=SHORT)[0])
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: answer(collect(client.stream(PROMPT, options=SHORT))[0]), range(4)))
    assert answers == [expected] * 4


def test_tasks_share_a_client(server, client):
    async def four(made):
        return await asyncio.gather(*(made.generate(PROMPT, options=SHORT) for _ in range(4)))

    expected = answer(client.generate(PROMPT, options=SHORT)[0])
    assert [answer(completions[0]) for completions in with_async(server, four)] == [expected] * 4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (GenerateOptions(temperature=-1.0), "temperature"),
        (GenerateOptions(top_p=1.5), "top_p"),
        (GenerateOptions(max_tokens=0), "max_tokens"),
        (GenerateOptions(stop_words=[""]), "stop_words"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_the_server_says_what_is_wrong(client, options, named, stream):
    with pytest.raises(InvalidRequestError, match=f"^{named}: expected"):
        list(client.stream(PROMPT, options=options)) if stream else client.generate(PROMPT, options=options)


def test_an_unknown_model(server):
    with DSparkClient(server.grpc_url, model_name="nonesuch") as made:
        assert not made.is_ready()
        with pytest.raises(InvalidRequestError, match="nonesuch"):
            made.generate(PROMPT)
        with pytest.raises(DeadlineError, match="nonesuch"):
            made.wait_until_ready(0.3)


def test_what_the_server_tells(server, client):
    assert client.is_ready()
    client.wait_until_ready(5.0)
    before = client.statistics()[0].inferences
    client.generate(PROMPT, options=SHORT)
    assert client.statistics()[0].inferences == before + 1
    assert server.model_name in {model.name for model in client.models() if model.state == "READY"}

    async def tell(made):
        await made.wait_until_ready(5.0)
        return await made.is_ready(), await made.models(), (await made.statistics())[0].name

    assert with_async(server, tell) == (True, client.models(), server.model_name)


@pytest.fixture
def forwarder(server) -> Iterator[Forwarder]:
    made = Forwarder(server.grpc_url)
    yield made
    made.cut()


def test_nobody_listens_yet(server, forwarder):
    patient = RetryPolicy(max_attempts=60, initial_backoff_s=0.1, max_backoff_s=0.2)
    with DSparkClient(forwarder.url, model_name=server.model_name, retry=patient) as made:
        assert not made.is_ready()
        timer = threading.Timer(0.8, forwarder.start)
        timer.start()
        begin = time.monotonic()
        assert made.generate(PROMPT, options=SHORT)[0].text
        assert time.monotonic() - begin > 0.7
        timer.join()


def test_wait_until_somebody_listens(server, forwarder):
    async def wait(made):
        timer = threading.Timer(0.8, forwarder.start)
        timer.start()
        await made.wait_until_ready(20.0)
        timer.join()
        return (await made.generate(PROMPT, options=SHORT))[0].text

    async def run():
        async with AsyncDSparkClient(forwarder.url, model_name=server.model_name, retry=NO_RETRY) as made:
            return await wait(made)

    assert asyncio.run(run())


def test_connection_refused(server, forwarder):
    with (
        DSparkClient(forwarder.url, model_name=server.model_name, retry=NO_RETRY) as made,
        pytest.raises(ServerConnectionError, match=forwarder.url),
    ):
        made.generate(PROMPT)
