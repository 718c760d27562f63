"""Options of the connection, and what a request's time becomes on the wire."""

import math

import numpy as np
import pytest
from scripted_server import piece, serving

from dspark_client import ConnectionOptions, DSparkClient, GenerateOptions, KeepaliveOptions, RetryPolicy, TlsOptions
from dspark_client.call import ClientSettings
from dspark_client.connection import check_url, parse_headers
from dspark_client.errors import InvalidRequestError
from dspark_client.request_builder import Prompt


@pytest.mark.parametrize("url", ["", "http://host:8000", "https://host", "grpc://host:8001"])
def test_addresses_of_http_are_refused(url):
    with pytest.raises(InvalidRequestError, match="host:port"):
        check_url(url)


@pytest.mark.parametrize("url", ["localhost:8001", "[::1]:8001", "unix:///run/triton.sock", "dns:///host:8001"])
def test_addresses_of_grpc_are_taken(url):
    check_url(url)


def test_calls_take_turns_between_the_addresses_of_a_name():
    """As a headless service's name has them; nobody resolves one here, so they are listed."""
    answers = [[piece("a", last=True)]] * 12
    with serving(*answers) as (first, first_url), serving(*answers) as (second, second_url):
        ports = [url.rpartition(":")[2] for url in (first_url, second_url)]
        with DSparkClient("ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)) as client:
            for _ in range(12):
                assert [piece.text for piece in client.stream("x")] == ["a"]
    # The first calls may go out before both are connected.
    assert len(first.requests) + len(second.requests) == 12
    assert min(len(first.requests), len(second.requests)) >= 4


def test_headers_of_a_call_win_and_are_lowered():
    options = ConnectionOptions(headers={"Authorization": "a", "X-Team": "t"})
    metadata = dict(options.metadata({"authorization": "b"}))
    assert metadata == {"authorization": "b", "x-team": "t"}


def test_a_header_that_crashes_the_server_is_refused():
    with pytest.raises(InvalidRequestError, match="crashes"):
        ConnectionOptions().metadata({"Triton_gRPC_error": "true"})


@pytest.mark.parametrize(
    "headers", [{"a b": "x"}, {"": "x"}, {"ä": "x"}, {"a-bin": "x"}, {"a": "ä"}, {"a": "b\n"}, {"a": 5}]
)
def test_a_header_that_grpc_cannot_send_is_refused(headers):
    with pytest.raises(InvalidRequestError, match=r"^headers: expected"):
        ConnectionOptions().metadata(headers)
    with pytest.raises(InvalidRequestError, match=r"^headers: expected"):
        ConnectionOptions(headers=headers).metadata()


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 1e7])
def test_keepalive_times_are_checked(seconds):
    for times in ({"interval_s": seconds}, {"interval_s": 1.0, "timeout_s": seconds}):
        with pytest.raises(InvalidRequestError, match=r"^keepalive: expected"):
            KeepaliveOptions(**times)


def test_headers_are_read_from_lines():
    assert parse_headers(["a=b=c", "d="]) == {"a": "b=c", "d": ""}
    for line in ("novalue", "=x"):
        with pytest.raises(InvalidRequestError, match="name=value"):
            parse_headers([line])


def test_keepalive_and_server_name_reach_grpc():
    options = ConnectionOptions(
        tls=TlsOptions(server_name="inner"), keepalive=KeepaliveOptions(30.5, timeout_s=2, without_calls=True)
    )
    arguments = dict(options.channel_arguments())
    assert arguments["grpc.keepalive_time_ms"] == 30500
    assert arguments["grpc.keepalive_timeout_ms"] == 2000
    assert arguments["grpc.keepalive_permit_without_calls"] == 1
    assert arguments["grpc.ssl_target_name_override"] == "inner"
    assert "grpc.keepalive_time_ms" not in dict(ConnectionOptions().channel_arguments())


def test_tls_files_are_checked(tmp_path):
    with pytest.raises(InvalidRequestError, match="together"):
        TlsOptions(certificate_chain=tmp_path / "a")
    with pytest.raises(InvalidRequestError, match="readable PEM"):
        TlsOptions(root_certificates=tmp_path / "missing.pem").credentials()


def test_compression_is_checked():
    with pytest.raises(InvalidRequestError, match="gzip"):
        ConnectionOptions(compression="brotli")


def prepared(options=None, *, default=None, timeout=None):
    settings = ClientSettings("host:1", "dspark", "", ConnectionOptions(), RetryPolicy(), default)
    call = settings.prepare(
        Prompt("x"), options or GenerateOptions(), stream=True, timeout=timeout, headers=None, request_id=""
    )
    names = [tensor.name for tensor in call.request.inputs]
    raw = dict(zip(names, call.request.raw_input_contents, strict=True)).get("timeout_ms")
    return None if raw is None else int(np.frombuffer(raw, "<i4")[0]), call.deadline.timeout_s


def test_a_timeout_bounds_the_client_and_the_server():
    assert prepared() == (None, None)
    assert prepared(timeout=1.5) == (1500, 1.5)
    assert prepared(default=2) == (2000, 2)
    assert prepared(default=2, timeout=0.0001) == (1, 0.0001)
    assert prepared(timeout=1e9) == (2**31 - 1, 1e9)
    assert prepared(timeout=math.inf) == (2**31 - 1, math.inf)


def test_the_servers_own_deadline_is_kept_and_the_client_waits_longer_than_it():
    assert prepared(GenerateOptions(timeout_ms=300), timeout=10) == (300, 10)
    sent, patience = prepared(GenerateOptions(timeout_ms=300))
    assert sent == 300
    assert 0.3 < patience < 10
    with pytest.raises(InvalidRequestError, match=r"^timeout_ms: expected"):
        prepared(GenerateOptions(timeout_ms=10**400))
