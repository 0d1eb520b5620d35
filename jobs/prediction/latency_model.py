"""Operations: what a model of some layout does for one prompt or one token, and how long by what was measured.

A prediction steers a search; it is no measurement and is never reported as one.
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
"""How much of each kind of operation a model does; the same kinds for a prompt as for a token."""

_RIDGE = 1e-3
"""How strongly a kind that few models tell of is held near 0, against relative errors of the models."""


@dataclass(frozen=True)
class Sample:
    """A model that was timed: what it does, and how long by metric (`prefill_ms`, `decode_ms`)."""

    amounts: Amounts
    milliseconds: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """unit_ms: by metric, the milliseconds that one unit of each kind takes. errors: by metric, the relative error
    that nine of ten of the samples stayed under when each was predicted from the others."""

    unit_ms: Mapping[str, Mapping[str, float]]
    errors: Mapping[str, float]

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Table:
        return Table(record["unit_ms"], record["errors"])


def amounts(layout: Layout) -> dict[str, float]:
    """What a model of this layout does, by kind.

    `model` and `block` are what each costs whatever its size, `vectors` the elements of its norms and biases,
    `attention` the width of what its heads give. Linears count by how they are stored: `linear KIND` is their number,
    `weights KIND` and `head KIND` are millions of weights.
    """
    found: dict[str, float] = {"model": 1.0, "block": float(layout.depth)}

    def add(kind: str, amount: float) -> None:
        found[kind] = found.get(kind, 0.0) + amount

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
        head = list(layout.tables.values())[-1]  # where it is tied, the embedding is the head
        add(f"head {_kind(head)}", head.out_features * head.in_features / 1e6)
    return found


def predict(layout: Layout, table: Table) -> dict[str, float]:
    """Milliseconds by metric: the sum over what the model does.

    Raises LookupError where the table holds nothing of some kind of operation.
    """
    does = amounts(layout)
    return {metric: predicted_ms(does, units) for metric, units in table.unit_ms.items()}


def predicted_ms(does: Amounts, unit_ms: Mapping[str, float]) -> float:
    unknown = sorted(does.keys() - unit_ms.keys())
    if unknown:
        raise LookupError(f"the table of operations holds nothing of {', '.join(unknown)}")
    return sum(amount * unit_ms[kind] for kind, amount in does.items())


def fit(samples: Sequence[Sample]) -> Table:
    """The table by which the samples' times come out best: what each unit takes is not negative, and the sum of
    the squared relative errors is least (Lawson & Hanson 1974, ch. 23)."""
    units: dict[str, dict[str, float]] = {}
    errors: dict[str, float] = {}
    for metric in samples[0].milliseconds:
        units[metric] = _fitted(samples, metric)
        off = []
        for left_out, sample in enumerate(samples):
            others = [*samples[:left_out], *samples[left_out + 1 :]]
            known = {kind for one in others for kind in one.amounts}
            if others and known >= sample.amounts.keys():
                foretold = predicted_ms(sample.amounts, _fitted(others, metric))
                off.append(abs(foretold / sample.milliseconds[metric] - 1))
        errors[metric] = float(np.percentile(off, 90)) if off else math.inf
    return Table(units, errors)


def telling(pool: Sequence[Amounts], known: Sequence[Amounts], count: int) -> list[int]:
    """Which of a pool of models to time, to learn most about the kinds of operation that they do.

    Greedy D-optimal design: next comes the one whose prediction is the least certain, by what was chosen before
    and by `known`, which was timed already (Atkinson, Donev & Tobias 2007, ch. 12).
    """
    kinds = _kinds([*pool, *known])
    rows, had = _matrix(pool, kinds), _matrix(known, kinds)
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-12)
    rows, had = rows / scale, had / scale
    information = _RIDGE * np.eye(len(kinds)) + had.T @ had
    chosen: list[int] = []
    for _ in range(min(count, len(pool))):
        uncertain = np.einsum("ik,kl,il->i", rows, np.linalg.inv(information), rows)
        uncertain[chosen] = -1.0
        chosen.append(int(uncertain.argmax()))
        information += np.outer(rows[chosen[-1]], rows[chosen[-1]])
    return chosen


def kinds(pool: Iterable[Amounts]) -> set[str]:
    """Every kind of operation that any of these models does."""
    return {kind for one in pool for kind in one}


def _fitted(samples: Sequence[Sample], metric: str) -> dict[str, float]:
    from scipy.optimize import nnls  # slow to import, and most who predict never fit

    names = _kinds([sample.amounts for sample in samples])
    times = np.array([sample.milliseconds[metric] for sample in samples])
    relative = _matrix([sample.amounts for sample in samples], names) / times[:, None]
    scale = np.linalg.norm(relative, axis=0)
    # The ridge settles what the samples leave open: kinds that only ever come together share their time.
    held = np.vstack([relative / scale, math.sqrt(_RIDGE) * np.eye(len(names))])
    found, _ = nnls(held, np.concatenate([np.ones(len(times)), np.zeros(len(names))]))
    return {name: float(value) for name, value in zip(names, found / scale, strict=True)}


def _matrix(pool: Sequence[Amounts], names: Sequence[str]) -> NDArray[np.float64]:
    return np.array([[one.get(name, 0.0) for name in names] for one in pool]).reshape(len(pool), len(names))


def _kinds(pool: Iterable[Amounts]) -> list[str]:
    return sorted(kinds(pool))


def _form(spec: LinearSpec) -> str:
    if spec.kept is not None:
        return "sparse"
    return "dense" if spec.packing is None else f"packed {spec.packing.bits}"


def _kind(spec: LinearSpec) -> str:
    packing = spec.packing
    if packing is None:
        return _form(spec)
    inputs = "" if packing.activation_bits == 16 else f" inputs {packing.activation_bits}"
    return f"{_form(spec)} group {packing.group}{inputs}"
