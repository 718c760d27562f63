"""Which error a caller meets for which words of the server."""

import grpc
import pytest

from dspark_client import errors
from dspark_client.errors import error_from_message, error_from_rpc


class Rpc(grpc.RpcError):
    """A finished call as gRPC raises it."""

    def __init__(self, code, details):
        self._code, self._details = code, details

    def code(self):
        return self._code

    def details(self):
        return self._details


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("INVALID_ARGUMENT", errors.InvalidRequestError),
        ("UNAVAILABLE", errors.ServerUnavailableError),
        ("DEADLINE_EXCEEDED", errors.DeadlineError),
        ("CANCELLED", errors.RequestCancelledError),
        ("INTERNAL", errors.ServerError),
    ],
)
def test_the_prefix_decides_and_is_not_shown(status, kind):
    for error in (
        error_from_message(f"[{status}] because\nof this"),
        error_from_message(f"[{status}] because\nof this", "INTERNAL"),
        error_from_rpc(Rpc(grpc.StatusCode.INTERNAL, f"[{status}] because\nof this"), "host:1"),
        error_from_rpc(Rpc(grpc.StatusCode.UNAVAILABLE, f"[{status}] because\nof this"), "host:1"),
    ):
        assert type(error) is kind
        assert str(error) == "because\nof this"
        assert error.status == status


def test_every_status_of_the_server_is_known():
    from dspark_backend.errors import Status

    for status in Status:
        assert error_from_message(f"[{status.value}] text").status == status.value


def test_brackets_that_are_no_status_are_part_of_the_message():
    error = error_from_message("[request id: 7] inference input 'x' is unexpected")
    assert type(error) is errors.InvalidRequestError
    assert str(error) == "[request id: 7] inference input 'x' is unexpected"
    assert str(error_from_message("[FUNNY] text", "INTERNAL")) == "[FUNNY] text"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Request for unknown model: 'nope' is not found", errors.InvalidRequestError),
        (
            "[request id: <id_unknown>] inference input 'max_tokens' data-type is 'INT64', but model 'dspark' expects "
            "'INT32'",
            errors.InvalidRequestError,
        ),
        ("Server is stopping, scheduler for model has stopped accepting new inference requests", None),
        ("Exceeds maximum queue size", None),
        ("something odd", errors.ServerError),
    ],
)
def test_triton_core_messages_without_status(text, kind):
    error = error_from_message(text)
    assert type(error) is (kind or errors.ServerUnavailableError)
    assert str(error) == text


@pytest.mark.parametrize(
    "details",
    [
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused",
        "Socket closed",
        "recvmsg:Connection reset by peer",
        "DNS resolution failed for nowhere.invalid:8001",
        "GOAWAY received",
        "keepalive watchdog timeout",
    ],
)
def test_transport_failures_name_the_address(details):
    error = error_from_rpc(Rpc(grpc.StatusCode.UNAVAILABLE, details), "gpu-7:8001")
    assert type(error) is errors.ServerConnectionError
    assert "gpu-7:8001" in str(error)
    assert details in str(error)
    assert isinstance(error, ConnectionError)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.ServerUnavailableError),
        (grpc.StatusCode.NOT_FOUND, errors.InvalidRequestError),
        (grpc.StatusCode.CANCELLED, errors.RequestCancelledError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.ServerUnavailableError),
        (grpc.StatusCode.PERMISSION_DENIED, errors.ServerError),
        (grpc.StatusCode.UNKNOWN, errors.ServerError),
    ],
)
def test_the_grpc_status_decides_without_a_prefix(code, kind):
    assert type(error_from_rpc(Rpc(code, "words"), "host:1")) is kind
    assert isinstance(error_from_rpc(Rpc(code, None), "host:1"), kind)


def test_an_unmapped_status_is_named():
    assert "PERMISSION_DENIED" in str(error_from_rpc(Rpc(grpc.StatusCode.PERMISSION_DENIED, "no"), "host:1"))


def test_errors_are_what_they_say_in_python_terms():
    assert issubclass(errors.InvalidRequestError, ValueError)
    assert issubclass(errors.DeadlineError, TimeoutError)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__module__ == errors.__name__]
    assert len(kinds) == 7
    assert all(issubclass(kind, errors.DSparkClientError) for kind in kinds)
