"""How far the foretold size of a file is off: random recipes on tiny models, written in every installed format.

Run from the repository's root: python -m benchmarks.size [--recipes N] [--seed N]. What is off by a byte is listed.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs import formats, techniques
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.models import loading
from jobs.models.layout import Layout
from jobs.technique import Technique

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "bert")
_PACKED = {"bits": (2, 3, 4, 4, 8, 8), "group": (0, 32, 32, 64), "embedding_bits": (16, 16, 8, 4)}
_SKIPPED = (0.5, 0.4, 0.8, 0.2)
"""How often each stage is skipped: so that each format can hold many of the recipes."""
_STAGES: tuple[dict[str, dict[str, tuple[object, ...]]], ...] = (
    {"drop_layers": {"count": (1, 2)}},
    {
        "prune_ffn": {"ratio": (0.1, 0.3, 0.6), "correction": ("none", "bias", "least_squares")},
        "prune_heads": {"ratio": (0.5,)},
        "prune_hidden": {"ratio": (0.25, 0.5)},
    },
    {"svd": {"keep": (0.3, 0.6)}, "magnitude": {"sparsity": (0.3, 0.7)}},
    {
        "rtn": {**_PACKED, "symmetric": (False, True)},
        "gptq": {**_PACKED, "symmetric": (False, True)},
        "hqq": {"bits": (3, 4), "group": (32, 64)},
    },
)


@dataclass(frozen=True)
class Written:
    """A recipe written in a format. foretold: None where the format refuses it."""

    family: str
    recipe: str
    format: str
    foretold: int | None
    found: int
    seconds: float


def random_steps(chance: random.Random) -> list[Technique]:
    """A random recipe of up to four steps, in the order of the stages."""
    steps = []
    for stage, skipped in zip(_STAGES, _SKIPPED, strict=True):
        if chance.random() < skipped:
            continue
        name = chance.choice(sorted(stage))
        options = {option: chance.choice(values) for option, values in stage[name].items()}
        steps.append(techniques.load(name).of(options))
    return steps


def compress(original: Path, steps: list[Technique], folder: Path) -> Path | None:
    """Write the artifact of these steps into `folder`; None where one of them does not do this model."""
    model = loading.load(original)
    tokens = torch.randint(3, 512, (8, 32), generator=torch.Generator().manual_seed(0))
    for at, step in enumerate(steps):
        try:
            step.output_layout(model.layout())
        except ValueError:
            return None
        # Each step has a parent of its own, whose statistics nobody else may take for theirs.
        statistics = Statistics(folder.with_name(f"{folder.name}-{at}"), "parent")
        model = step.compress(model, Context(statistics, folder.parent, seed=0, calibration=tokens))
    loading.save(model, folder, {})
    return folder


def artifacts(
    originals: dict[str, Path], number: int, seed: int, scratch: Path
) -> Iterator[tuple[str, str, Path]]:
    """So many random recipes that are possible: their family, their text and their artifact's folder."""
    chance = random.Random(seed)
    made = tried = 0
    while made < number:
        family, steps, tried = chance.choice(sorted(originals)), random_steps(chance), tried + 1
        artifact = compress(originals[family], steps, scratch / f"artifact-{tried}")
        if artifact is not None:
            made += 1
            yield family, " → ".join(map(str, steps)) or "as it is", artifact


def written(name: str, family: str, recipe: str, artifact: Path, original: Path) -> Written:
    """What a format foretells of an artifact, and what it weighs."""
    kind, layout = formats.load(name), Layout.read(artifact)
    if kind.refusal(layout) is not None:
        return Written(family, recipe, name, None, 0, 0.0)
    started = time.perf_counter()
    foretold = kind.size_bytes(layout, original)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as scratch:
        formats.write(name, artifact, Path(scratch) / "out")
        return Written(family, recipe, name, foretold, formats.size_of(Path(scratch) / "out", name), seconds)


def main() -> None:
    from tests import conftest  # the tiny models that the tests have

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        words = conftest.tokenizer_on(conftest.prose())
        originals = {
            family: conftest.save_tiny(family, None, words, Path(scratch) / family) for family in FAMILIES
        }
        rows = [
            written(name, family, recipe, artifact, originals[family])
            for family, recipe, artifact in artifacts(originals, options.recipes, options.seed, Path(scratch))
            for name in formats.names()
            if formats.load(name).missing() is None
        ]
    print(f"{'format':20} {'written':>8} {'refused':>8} {'exact':>8} {'ms to foretell':>15}")
    for name in sorted({row.format for row in rows}):
        some = [row for row in rows if row.format == name]
        told = [row for row in some if row.foretold is not None]
        exact = sum(row.foretold == row.found for row in told)
        mean = 1000 * sum(row.seconds for row in told) / max(1, len(told))
        print(f"{name:20} {len(told):8} {len(some) - len(told):8} {exact:8} {mean:15.1f}")
    for row in rows:
        if row.foretold is not None and row.foretold != row.found:
            print(f"{row.format} of {row.family}, {row.recipe}: foretold {row.foretold}, found {row.found}")


if __name__ == "__main__":
    main()
