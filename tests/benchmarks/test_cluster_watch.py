"""Observations of nodes and attempts, accumulated and summarized."""

from __future__ import annotations

import pytest

from benchmarks.cluster_watch import PERIOD_SECONDS, Attempt, Observations, Recorder, Stay
from tests.fake_cluster import Node


def test_repeated_observations_of_a_node_and_a_job_are_one_stay_and_one_attempt() -> None:
    recorder = Recorder()
    first, second = Node("1", "slot", 11, 98.0), Node("2", "slot", 12, 99.0)
    recorder.record(100.0, [first], {})
    recorder.record(100.5, [first, second], {"a": "1"})
    recorder.record(101.0, [first, second], {"a": "1", "b": "2"})
    recorder.record(101.5, [second], {"b": "2"})
    observations = recorder.observations()
    assert observations.stays == (Stay("1", 98.0, 101.0), Stay("2", 99.0, 101.5))
    # An attempt lasts from half a period before its first observation to half a period after its last one, or until
    # its node ends.
    half = PERIOD_SECONDS / 2
    assert observations.attempts == (
        Attempt("a", "1", 100.5 - half, 101.0),
        Attempt("b", "2", 101.0 - half, 101.5),
    )
    assert observations.most_nodes == 2


def observed() -> Observations:
    """Two nodes for 100 s and 50 s; the first worked 80 s, the second was lost after 20 s of work."""
    stays = (Stay("1", 0.0, 100.0), Stay("2", 10.0, 60.0))
    attempts = (Attempt("a", "1", 10.0, 50.0), Attempt("b", "1", 50.0, 90.0), Attempt("c", "2", 39.9, 59.9))
    return Observations(stays, attempts)


def test_utilisation_is_the_share_of_the_time_that_nodes_were_up() -> None:
    assert observed().utilisation() == pytest.approx(100 / 150)
    assert observed().utilisation_between(0.0, 40.0) == pytest.approx(30.1 / 70)
    assert (observed().starting, observed().leaving) == (
        [10.0, pytest.approx(29.9)],
        [10.0, pytest.approx(0.1)],
    )
    assert (observed().first_work, observed().last_work, observed().most_nodes) == (10.0, 90.0, 2)


def test_an_attempt_that_ends_with_its_node_is_lost_and_an_earlier_one_is_not() -> None:
    assert [attempt.name for attempt in observed().lost] == ["c"]
