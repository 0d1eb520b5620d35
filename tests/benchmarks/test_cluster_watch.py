"""What is seen of nodes and work, put together and counted."""

from __future__ import annotations

import pytest

from benchmarks.cluster_watch import PERIOD_SECONDS, Attempt, Seen, Sightings, Stay
from tests.fake_cluster import Node


def test_what_is_seen_again_and_again_is_one_stay_and_one_piece_of_work() -> None:
    sightings = Sightings()
    one, two = Node("1", "slot", 11, 98.0), Node("2", "slot", 12, 99.0)
    sightings.look(100.0, [one], {})
    sightings.look(100.5, [one, two], {"a": "1"})
    sightings.look(101.0, [one, two], {"a": "1", "b": "2"})
    sightings.look(101.5, [two], {"b": "2"})
    seen = sightings.seen()
    assert seen.stays == (Stay("1", 98.0, 101.0), Stay("2", 99.0, 101.5))
    # Seen from half a period before to half a period after, but for the node that was gone by then.
    half = PERIOD_SECONDS / 2
    assert seen.attempts == (Attempt("a", "1", 100.5 - half, 101.0), Attempt("b", "2", 101.0 - half, 101.5))
    assert seen.most_nodes == 2


def seen() -> Seen:
    """Two nodes for 100 s and 50 s; the first worked 80 s, the second was lost at work after 20 s of it."""
    stays = (Stay("1", 0.0, 100.0), Stay("2", 10.0, 60.0))
    attempts = (Attempt("a", "1", 10.0, 50.0), Attempt("b", "1", 50.0, 90.0), Attempt("c", "2", 39.9, 59.9))
    return Seen(stays, attempts)


def test_utilisation_is_the_share_of_the_time_that_nodes_were_up() -> None:
    assert seen().utilisation() == pytest.approx(100 / 150)
    assert seen().utilisation_between(0.0, 40.0) == pytest.approx(30.1 / 70)
    assert (seen().starting, seen().leaving) == ([10.0, pytest.approx(29.9)], [10.0, pytest.approx(0.1)])
    assert (seen().first_work, seen().last_work, seen().most_nodes) == (10.0, 90.0, 2)


def test_what_ends_with_its_node_is_lost_and_what_ends_before_is_not() -> None:
    assert [attempt.name for attempt in seen().lost] == ["c"]
