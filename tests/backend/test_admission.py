"""The queue before the slots."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_backend.admission import AdmissionQueue


def waiting(priority: int, name: int = 0) -> SimpleNamespace:
    return SimpleNamespace(prepared=SimpleNamespace(request=SimpleNamespace(priority=priority)), name=name)


@given(st.lists(st.integers(-3, 3), max_size=40))
def test_higher_priority_first_then_arrival(priorities):
    queue = AdmissionQueue()
    for name, priority in enumerate(priorities):
        queue.push(waiting(priority, name))
    assert len(queue) == len(priorities)
    order = []
    while queue:
        head = queue.head()
        assert queue.pop() is head
        order.append(head.name)
    assert order == sorted(range(len(priorities)), key=lambda name: (-priorities[name], name))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.sets(st.integers(0, 39)))
def test_removal_keeps_the_order(priorities, unwanted):
    queue = AdmissionQueue()
    for name, priority in enumerate(priorities):
        queue.push(waiting(priority, name))
    queue.remove(lambda sequence: sequence.name in unwanted)
    kept = [name for name in range(len(priorities)) if name not in unwanted]
    assert sorted(sequence.name for sequence in queue) == kept
    order = [queue.pop().name for _ in range(len(queue))]
    assert order == sorted(kept, key=lambda name: (-priorities[name], name))


def test_empty():
    queue = AdmissionQueue()
    assert not queue
    with pytest.raises(IndexError):
        queue.head()
