"""What a healthy server cannot be made to do: refuse, fall silent, break off. A gRPC server that follows a script does.

Every case runs through both clients.
"""

import asyncio
import math
import threading
import time
from contextlib import aclosing, closing

import grpc
import pytest
from scripted_server import error, piece, serving

from dspark_client import (
    AsyncDSparkClient,
    DeadlineError,
    DSparkClient,
    DSparkClientError,
    GenerateOptions,
    RequestCancelledError,
    RetryPolicy,
    ServerConnectionError,
    ServerError,
    ServerUnavailableError,
)

QUICK = RetryPolicy(max_attempts=4, initial_backoff_s=0.01, max_backoff_s=0.02)


def blocking(url, *, stop_after=None, retry=QUICK, **arguments):
    """Streams through the blocking client: the texts that came, and the error that ended them."""
    texts = []
    try:
        with DSparkClient(url, retry=retry) as client, closing(client.stream("x", **arguments)) as pieces:
            for item in pieces:
                texts.append(item.text)
                if len(texts) == stop_after:
                    break
    except DSparkClientError as failure:
        return texts, failure
    return texts, None


def asynchronous(url, *, stop_after=None, retry=QUICK, **arguments):
    """The same through the asyncio client."""
    texts = []

    async def run():
        async with AsyncDSparkClient(url, retry=retry) as client, aclosing(client.stream("x", **arguments)) as pieces:
            async for item in pieces:
                texts.append(item.text)
                if len(texts) == stop_after:
                    break

    try:
        asyncio.run(run())
    except DSparkClientError as failure:
        return texts, failure
    return texts, None


both = pytest.mark.parametrize("stream", [blocking, asynchronous])


@both
def test_a_refused_request_is_sent_again_until_it_is_taken(stream):
    busy = [error("[UNAVAILABLE] queue full")]
    down = [grpc.StatusCode.UNAVAILABLE]
    with serving(busy, down, [piece("a"), piece("b", last=True)]) as (script, url):
        assert stream(url) == (["a", "b"], None)
        assert len(script.requests) == 3
        assert script.requests[0] == script.requests[2]


@both
def test_attempts_end(stream):
    with serving(*[[error("[UNAVAILABLE] queue full")]] * 5) as (script, url):
        texts, failure = stream(url)
        assert texts == []
        assert type(failure) is ServerUnavailableError
        assert str(failure) == "queue full"
        assert len(script.requests) == QUICK.max_attempts


@both
@pytest.mark.parametrize("end", [grpc.StatusCode.UNAVAILABLE, error("[UNAVAILABLE] draining")])
def test_never_again_after_the_first_piece(stream, end):
    with serving([piece("a"), end], [piece("never", last=True)]) as (script, url):
        texts, failure = stream(url)
        assert texts == ["a"]
        assert isinstance(failure, ServerUnavailableError)
        assert len(script.requests) == 1


@both
def test_other_errors_are_not_tried_again(stream):
    with serving([error("[INTERNAL] boom")], [piece("never", last=True)]) as (script, url):
        texts, failure = stream(url)
        assert (texts, type(failure), str(failure)) == ([], ServerError, "boom")
        assert len(script.requests) == 1


@both
def test_a_stream_that_just_ends_is_an_error(stream):
    with serving([piece("a")], [piece("never", last=True)]) as (script, url):
        texts, failure = stream(url)
        assert texts == ["a"]
        assert type(failure) is ServerConnectionError
        assert len(script.requests) == 1


@both
@pytest.mark.parametrize("end", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, 30.0])
def test_what_breaks_behind_the_last_piece_costs_nothing(stream, end):
    with serving([piece("a"), piece("b", last=True), end], [piece("never", last=True)]) as (script, url):
        assert stream(url, timeout=0.4) == (["a", "b"], None)
        assert len(script.requests) == 1


@both
@pytest.mark.parametrize("timeout", [math.inf, 1e12])
def test_a_long_timeout_is_not_one_that_passed(stream, timeout):
    with serving([piece("a", last=True)]) as (_, url):
        assert stream(url, timeout=timeout) == (["a"], None)


@both
def test_a_stream_that_ends_before_anything_came_is_tried_again(stream):
    with serving([], [piece("a", last=True)]) as (_, url):
        assert stream(url) == (["a"], None)


@both
def test_a_server_that_hangs_costs_the_timeout_and_is_cancelled(stream):
    with serving([piece("a"), 30.0]) as (script, url):
        begin = time.monotonic()
        texts, failure = stream(url, timeout=0.4)
        assert 0.35 < time.monotonic() - begin < 3.0
        assert (texts, type(failure)) == (["a"], DeadlineError)
        assert script.cancelled.wait(5)


@both
def test_retries_share_the_timeout(stream):
    patient = RetryPolicy(max_attempts=1000, initial_backoff_s=0.05, max_backoff_s=0.05)
    with serving(*[[error("[UNAVAILABLE] queue full")]] * 1000) as (_, url):
        begin = time.monotonic()
        _, failure = stream(url, retry=patient, timeout=0.5)
        assert time.monotonic() - begin < 3.0
        assert isinstance(failure, ServerUnavailableError | DeadlineError)


@both
def test_the_servers_deadline_bounds_a_server_that_forgets_it(stream):
    with serving([30.0]) as (_, url):
        begin = time.monotonic()
        _, failure = stream(url, options=GenerateOptions(timeout_ms=100))
        assert type(failure) is DeadlineError
        assert time.monotonic() - begin < 6.0


@both
def test_leaving_the_loop_cancels_on_the_server(stream):
    with serving([piece("a"), 30.0]) as (script, url):
        assert stream(url, stop_after=1) == (["a"], None)
        assert script.cancelled.wait(5)


@both
def test_headers_reach_the_server(stream):
    with serving([piece("a", last=True)]) as (script, url):
        stream(url, headers={"X-Team": "t"})
        assert script.metadata[0]["x-team"] == "t"


def test_an_exception_in_the_loop_cancels_on_the_server():
    with serving([piece("a"), 30.0]) as (script, url), DSparkClient(url) as client:
        with pytest.raises(KeyboardInterrupt):
            for _ in client.stream("x"):
                raise KeyboardInterrupt
        assert script.cancelled.wait(5)


def test_cancelling_a_task_cancels_on_the_server():
    async def run(url, script):
        async with AsyncDSparkClient(url) as client:
            task = asyncio.create_task(client.generate("x"))
            while not script.requests:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await asyncio.to_thread(script.cancelled.wait, 5)

    with serving([30.0]) as (script, url):
        assert asyncio.run(run(url, script))


def test_closing_the_client_ends_what_runs():
    with serving([piece("a"), 30.0]) as (script, url):
        client = DSparkClient(url)
        timer = threading.Timer(0.3, client.close)
        timer.start()
        with pytest.raises(RequestCancelledError):
            list(client.stream("x"))
        timer.join()
        assert script.cancelled.wait(5)
        with pytest.raises(RequestCancelledError, match="closed"):
            list(client.stream("x"))
        client.close()


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("ModelStreamInfer", lambda client: list(client.stream("x"))),
        ("ModelStatistics", lambda client: client.statistics()),
        ("ServerReady", lambda client: not client.is_ready() and client.models()),
    ],
)
def test_closing_the_client_between_two_steps_of_a_call(method, call, monkeypatch):
    client = DSparkClient("localhost:1")
    begin = getattr(client._stub, method)

    def close_and_begin(*arguments, **options):
        client.close()  # as another thread may at just this moment
        return begin(*arguments, **options)

    monkeypatch.setattr(client._stub, method, close_and_begin)
    with pytest.raises(RequestCancelledError, match="closed"):
        call(client)


def test_closing_the_asyncio_client_ends_what_runs():
    async def run(url):
        client = AsyncDSparkClient(url)
        task = asyncio.create_task(client.generate("x"))
        await asyncio.sleep(0.3)
        await client.close()
        with pytest.raises(RequestCancelledError):
            await task

    with serving([piece("a"), 30.0]) as (script, url):
        asyncio.run(run(url))
        assert script.cancelled.wait(5)


@pytest.mark.parametrize("method", ["statistics", "is_ready"])
def test_closing_the_asyncio_client_cancels_no_task(method):
    async def run(url, script):
        client = AsyncDSparkClient(url)
        task = asyncio.create_task(getattr(client, method)())
        assert await asyncio.to_thread(script.asked.wait, 5)
        await client.close()
        if method == "is_ready":
            assert await task is False
        else:
            with pytest.raises(RequestCancelledError, match="closed"):
                await task

    with serving() as (script, url):
        asyncio.run(run(url, script))


def test_no_thread_outlives_a_client():
    with serving(*[[piece("a"), 30.0]] * 4) as (_, url):
        ours = set(threading.enumerate())
        for _ in range(4):
            blocking(url, stop_after=1)
        end = time.monotonic() + 5
        while (left := client_threads(ours)) and time.monotonic() < end:
            time.sleep(0.02)
        assert not left


def client_threads(known):
    """Threads begun since, without those of the scripted server's pool."""
    return [t for t in threading.enumerate() if t not in known and not t.name.startswith("ThreadPoolExecutor")]


def test_nothing_is_sent_before_the_first_piece_is_asked_for():
    with serving([piece("a", last=True)]) as (script, url), DSparkClient(url) as client:
        pieces = client.stream("x")
        time.sleep(0.1)
        assert script.requests == []
        assert next(pieces).text == "a"
        assert list(pieces) == []
