"""Predict latency from a layout: the operations of one prompt or one token, times the measured cost of each.

A prediction steers a search. It is never reported as a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.models.layout import Layout, LinearSpec

Amounts = Mapping[str, float]
"""The amount of each kind of operation in a model; prompts and tokens have the same kinds."""

_RIDGE = 1e-3
"""Weight of the penalty that keeps the cost of rarely measured kinds near 0, relative to squared relative errors."""


@dataclass(frozen=True)
class Sample:
    """A timed model: its operations, and its milliseconds by metric (`prefill_ms`, `decode_ms`)."""

    amounts: Amounts
    milliseconds: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """The fitted cost of each kind of operation."""

    unit_ms: Mapping[str, Mapping[str, float]]
    """By metric and kind: milliseconds per unit."""
    errors: Mapping[str, float]
    """By metric: the 90 % quantile of the leave-one-out relative errors."""

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Table:
        """Return the table that `dataclasses.asdict` turned into plain data."""
        return Table(record["unit_ms"], record["errors"])


def amounts(layout: Layout) -> dict[str, float]:
    """Return the operations of a model of this layout, by kind.

    `model` and `block` are costs that do not depend on sizes, `vectors` counts the elements of norms and biases,
    `attention` the width of the heads' outputs. Linears are counted by their storage: `linear KIND` is their number,
    `weights KIND` and `head KIND` are millions of weights.
    """
    by_kind: dict[str, float] = {"model": 1.0, "block": float(layout.depth)}

    def add(kind: str, amount: float) -> None:
        by_kind[kind] = by_kind.get(kind, 0.0) + amount

    for name, tensor in layout.others.items():
        if layout.block_of(name) >= 0:
            add("vectors", math.prod(tensor.shape) / 1e6)
    out = layout.family.attention.out
    for name, spec in layout.linears.items():
        add(f"linear {_form(spec)}", 1.0)
        add(f"weights {_kind(spec)}", spec.out_features * spec.in_features / 1e6)
        if name.endswith((f".{out}", f".{out}.v")):
            add("attention", spec.in_features / 1e6)
    if layout.task == "causal-lm" and layout.tables:
        head = list(layout.tables.values())[-1]  # a tied embedding is the head
        add(f"head {_kind(head)}", head.out_features * head.in_features / 1e6)
    return by_kind


def predict(layout: Layout, table: Table) -> dict[str, float]:
    """Return milliseconds by metric: the sum over the operations of a model.

    Raises LookupError if the table lacks a kind of operation.
    """
    operations = amounts(layout)
    return {metric: predicted_ms(operations, units) for metric, units in table.unit_ms.items()}


def predicted_ms(operations: Amounts, unit_ms: Mapping[str, float]) -> float:
    """Return the milliseconds of these operations. Raises LookupError for a kind without a cost."""
    unknown = sorted(operations.keys() - unit_ms.keys())
    if unknown:
        raise LookupError(f"the table of operations has no {', '.join(unknown)}")
    return sum(amount * unit_ms[kind] for kind, amount in operations.items())


def fit(samples: Sequence[Sample]) -> Table:
    """Fit the table to samples: non-negative least squares of relative errors (Lawson & Hanson 1974, ch. 23)."""
    units: dict[str, dict[str, float]] = {}
    errors: dict[str, float] = {}
    for metric in samples[0].milliseconds:
        units[metric] = _fitted(samples, metric)
        relative_errors = []
        for index, sample in enumerate(samples):
            training = [*samples[:index], *samples[index + 1 :]]
            if training and kinds(fitted.amounts for fitted in training) >= sample.amounts.keys():
                predicted = predicted_ms(sample.amounts, _fitted(training, metric))
                relative_errors.append(abs(predicted / sample.milliseconds[metric] - 1))
        errors[metric] = math.inf
        if relative_errors:
            errors[metric] = float(np.percentile(relative_errors, 90))
    return Table(units, errors)


def most_informative(pool: Sequence[Amounts], timed: Sequence[Amounts], count: int) -> list[int]:
    """Return the indices of the models of a pool whose timing tells most about their kinds of operation.

    Greedy D-optimal design: the next model is the one with the largest prediction variance, given the models chosen
    so far and those already timed (Atkinson, Donev & Tobias 2007, ch. 12).
    """
    names = _kinds([*pool, *timed])
    rows, timed_rows = _matrix(pool, names), _matrix(timed, names)
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-12)
    rows, timed_rows = rows / scale, timed_rows / scale
    information = _RIDGE * np.eye(len(names)) + timed_rows.T @ timed_rows
    chosen: list[int] = []
    for _ in range(min(count, len(pool))):
        variances = np.einsum("ik,kl,il->i", rows, np.linalg.inv(information), rows)
        variances[chosen] = -1.0
        chosen.append(int(variances.argmax()))
        information += np.outer(rows[chosen[-1]], rows[chosen[-1]])
    return chosen


def kinds(pool: Iterable[Amounts]) -> set[str]:
    """Return the kinds of operation of all these models."""
    return {kind for operations in pool for kind in operations}


def _fitted(samples: Sequence[Sample], metric: str) -> dict[str, float]:
    from scipy.optimize import nnls  # slow to import, and not needed for predictions

    names = _kinds([sample.amounts for sample in samples])
    times = np.array([sample.milliseconds[metric] for sample in samples])
    relative = _matrix([sample.amounts for sample in samples], names) / times[:, None]
    scale = np.linalg.norm(relative, axis=0)
    # The penalty decides where the samples do not: kinds that always occur together share their time.
    system = np.vstack([relative / scale, math.sqrt(_RIDGE) * np.eye(len(names))])
    solution, _ = nnls(system, np.concatenate([np.ones(len(times)), np.zeros(len(names))]))
    return {name: float(value) for name, value in zip(names, solution / scale, strict=True)}


def _matrix(pool: Sequence[Amounts], names: Sequence[str]) -> NDArray[np.float64]:
    matrix = np.zeros((len(pool), len(names)))
    for row, operations in zip(matrix, pool, strict=True):
        row[:] = [operations.get(name, 0.0) for name in names]
    return matrix


def _kinds(pool: Iterable[Amounts]) -> list[str]:
    return sorted(kinds(pool))


def _form(spec: LinearSpec) -> str:
    if spec.kept is not None:
        return "sparse"
    if spec.packing is None:
        return "dense"
    return f"packed {spec.packing.bits}"


def _kind(spec: LinearSpec) -> str:
    packing = spec.packing
    if packing is None:
        return _form(spec)
    kind = f"{_form(spec)} group {packing.group}"
    if packing.activation_bits != 16:
        kind += f" inputs {packing.activation_bits}"
    return kind
