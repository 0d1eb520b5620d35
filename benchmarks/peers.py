"""Compare our GPTQ, SparseGPT and Wanda with llm-compressor's: same model, calibration rows and evaluation windows.

Run from the repository's root: python -m benchmarks.peers [--peer PYTHON] [--rows N] [--only TEXT] [--json FILE]
PYTHON is the interpreter of a separate environment with llmcompressor; without it only our techniques run, each with
the parent's activations, which candidates share, and with `sequential`. Both sides compute weights, which the same
meter then measures in bf16 on 16,384 tokens of Brown news.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.techniques import DECODER, texts
from jobs import data, techniques
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.measure import measure
from jobs.measurement.meter import ShippedModel
from jobs.models import loading, sources
from jobs.models.layers import linear_of
from jobs.models.model import DTYPE, Model


@dataclass(frozen=True)
class Case:
    """A comparison of our technique with the peer."""

    technique: str
    options: dict[str, Any]
    peers: tuple[dict[str, Any], ...]
    """The peer's recipes. The best one counts."""

    def __str__(self) -> str:
        return f"{self.technique}({', '.join(f'{name}={value}' for name, value in self.options.items())})"


def _gptq(bits: int, symmetric: bool, actorder: str | None) -> dict[str, Any]:
    return {"kind": "gptq", "bits": bits, "group": 64, "symmetric": symmetric, "actorder": actorder}


CASES = (
    *(
        Case("gptq", {"bits": bits, "group": 64}, (_gptq(bits, False, "static"), _gptq(bits, True, None)))
        for bits in (4, 3)
    ),
    *(
        Case(kind, {"sparsity": 0.5, "pattern": pattern}, ({"kind": kind, "mask": mask},))
        for kind in ("sparsegpt", "wanda")
        for pattern, mask in (("unstructured", "0:0"), ("2:4", "2:4"))
    ),
)


def perplexity(model: Model, tokens: int) -> float:
    """Return the perplexity of the model as it is shipped: written and loaded again."""
    folder = sources.locate(DECODER)
    with tempfile.TemporaryDirectory() as scratch:
        loading.save(model, Path(scratch), {})
        materials = texts(encoder=False, quick=tokens < 16384)
        return measure(["text"], ShippedModel(Path(scratch), folder, materials)).metrics["perplexity"]


def ours(
    case: Case, sequential: bool, rows: torch.Tensor, statistics: Statistics, tokens: int
) -> tuple[float, float]:
    """Return the perplexity and the seconds of our technique. Only the first caller computes shared statistics."""
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(statistics, Path(scratch), seed=0, calibration=rows)
        started = time.perf_counter()
        step = techniques.load(case.technique).of({**case.options, "sequential": sequential})
        model = step.compress(loading.load(sources.locate(DECODER)), context)
        seconds = time.perf_counter() - started
        return perplexity(model, tokens), seconds


def theirs(peer: str, recipe: dict[str, Any], rows: Path, tokens: int) -> tuple[float, float]:
    """Return the perplexity and the seconds of the peer's recipe."""
    folder = sources.locate(DECODER)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "weights.safetensors"
        script = Path(__file__).parent / "peer_llmcompressor.py"
        subprocess.run(
            [peer, str(script), str(folder), str(rows), json.dumps(recipe), str(out)],
            check=True, cwd=scratch, capture_output=True,
        )  # fmt: skip
        model = loading.load(folder)
        with safe_open(out, framework="pt") as file:
            seconds = float(file.metadata()["seconds"])
            for name, layer in model.linears().items():
                weight = file.get_tensor(name).to(DTYPE)
                model.replace(name, linear_of(weight, layer.bias))  # type: ignore[arg-type]
        return perplexity(model, tokens), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="python of an environment with llmcompressor")
    parser.add_argument("--rows", type=int, default=64, help="calibration windows of 512 tokens")
    parser.add_argument("--tokens", type=int, default=16384, help="of evaluation text (16384 or 8192)")
    parser.add_argument("--only", default="", help="run the cases that contain this")
    parser.add_argument("--json", type=Path, help="write all numbers to this file as well")
    options = parser.parse_args()
    folder = sources.locate(DECODER)
    source = texts(encoder=False, quick=False).calibration
    assert source is not None
    rows = data.windows_for(source, folder)[: options.rows]
    comparisons: list[dict[str, Any]] = []
    print(f"original: perplexity {perplexity(loading.load(folder), options.tokens):.2f}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.safetensors"
        save_file({"rows": rows.contiguous()}, file)
        statistics = Statistics(Path(scratch) / "statistics", "original")
        for case in CASES:
            if options.only not in str(case):
                continue
            our_results = {
                way: ours(case, way == "sequential", rows, statistics, options.tokens)
                for way in ("parent", "sequential")
            }
            peer_results = [
                (*theirs(options.peer, recipe, file, options.tokens), recipe)
                for recipe in (case.peers if options.peer else ())
            ]
            comparisons.append({"case": str(case), "ours": our_results, "peers": peer_results})
            print(
                f"{case}:", *(f"{way} {p:.2f} ({s:.0f} s)" for way, (p, s) in our_results.items()), flush=True
            )
            for quality, seconds, recipe in peer_results:
                ratios = ", ".join(f"{way} {p / quality:.4f}" for way, (p, _) in our_results.items())
                print(
                    f"    llm-compressor {quality:.2f} ({seconds:.0f} s) {recipe}; ours over theirs: {ratios}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(comparisons, indent=1))


if __name__ == "__main__":
    main()
