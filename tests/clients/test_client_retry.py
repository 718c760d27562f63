"""A request is sent again only where that is safe, and never past its deadline."""

import math
import random
import time

import pytest

from dspark_client import errors
from dspark_client.retry import Deadline, RetryPolicy

NO_DEADLINE = Deadline(None)
AGAIN = [errors.ServerUnavailableError("full"), errors.ServerConnectionError("refused")]
NEVER = [
    errors.InvalidRequestError("bad"),
    errors.DeadlineError("late"),
    errors.RequestCancelledError("gone"),
    errors.ServerError("boom"),
]


def wait(error, attempt=1, *, policy=None, started=False, deadline=NO_DEADLINE, seed=0):
    return (policy or RetryPolicy()).wait_after(
        error, attempt, started=started, deadline=deadline, rng=random.Random(seed)
    )


@pytest.mark.parametrize("error", AGAIN)
def test_unavailable_and_unreachable_are_tried_again(error):
    assert wait(error) is not None


@pytest.mark.parametrize("error", NEVER)
def test_nothing_else_is(error):
    assert wait(error) is None


@pytest.mark.parametrize("error", AGAIN)
def test_never_after_the_first_piece(error):
    assert wait(error, started=True) is None


def test_attempts_are_bounded():
    policy = RetryPolicy(max_attempts=3)
    assert [wait(AGAIN[0], n, policy=policy) is not None for n in (1, 2, 3, 4)] == [True, True, False, False]
    assert wait(AGAIN[0], 1, policy=RetryPolicy(max_attempts=1)) is None


def test_waits_double_up_to_the_bound_and_jitter_over_all_of_it():
    policy = RetryPolicy(max_attempts=10**6, initial_backoff_s=0.5, max_backoff_s=3.0)
    assert [policy.bound(n) for n in (1, 2, 3, 4, 5, 10**5)] == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0]
    for attempt in (1, 3, 9):
        waits = [wait(AGAIN[0], attempt, policy=policy, seed=seed) for seed in range(300)]
        bound = policy.bound(attempt)
        assert 0 <= min(waits) < 0.1 * bound
        assert 0.9 * bound < max(waits) <= bound


def test_no_attempt_begins_after_the_deadline():
    over = Deadline(1.0, started_s=time.monotonic() - 2.0)
    assert over.remaining() == 0.0
    assert wait(AGAIN[0], deadline=over) is None
    assert wait(AGAIN[0], deadline=Deadline(60.0)) is not None


def test_deadline_counts_down():
    deadline = Deadline(5.0, started_s=time.monotonic() - 1.0)
    assert 3.0 < deadline.remaining() <= 4.0
    assert NO_DEADLINE.remaining() is None


@pytest.mark.parametrize(
    "settings",
    [
        {"max_attempts": 0},
        {"initial_backoff_s": 0.0},
        {"initial_backoff_s": 2.0, "max_backoff_s": 1.0},
        {"max_backoff_s": float("nan")},
    ],
)
def test_settings_are_checked(settings):
    with pytest.raises(errors.InvalidRequestError, match="expected"):
        RetryPolicy(**settings)


def test_a_deadline_is_no_longer_than_grpc_can_count():
    assert Deadline(math.inf).remaining() == Deadline(1e300).remaining() == 1e9


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), "5"])
def test_a_timeout_is_positive(seconds):
    with pytest.raises(errors.InvalidRequestError, match="timeout: expected"):
        Deadline(seconds)
