"""Domains of knobs: ranges and choices accept, refuse and normalise values."""

from __future__ import annotations

import math

import pytest

from jobs.knobs import Choice, Range


@pytest.mark.parametrize("value", [0.0, 1, 0.5])
def test_a_range_contains_its_ends_and_the_values_between(value: float) -> None:
    assert value in Range(0, 1)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, True, "0.5", None])
def test_a_range_excludes_other_numbers_and_types(value: object) -> None:
    assert value not in Range(0, 1)


def test_an_integer_range_excludes_fractions_and_normalises_values() -> None:
    domain = Range(0, 8, integer=True)
    assert 1.5 not in domain
    assert 2.0 in domain
    assert isinstance(domain.normal(2.0), int)
    assert isinstance(Range(0, 1).normal(1), float)
    assert str(domain) == "whole numbers in [0, 8]"


def test_a_choice_distinguishes_numbers_from_booleans() -> None:
    assert True not in Choice((1, 2))
    assert 1 not in Choice((True, False))
    assert 1.0 in Choice((1, 2))
    assert Choice((2, 4)).normal(4.0) == 4
    assert str(Choice((2, 4))) == "{2, 4}"
