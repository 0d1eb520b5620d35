"""Measure the error of predicted file sizes: random recipes on tiny models, written in every installed format.

Run from the repository's root: python -m benchmarks.size [--recipes N] [--seed N]. Files whose size differs from the
prediction by a byte or more are listed.
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
_SKIP_PROBABILITIES = (0.5, 0.4, 0.8, 0.2)
"""By stage. Chosen so that each format can store many of the recipes."""
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
class ExportedSize:
    """The size of a recipe's artifact in a format."""

    family: str
    recipe: str
    format: str
    predicted: int | None
    """None if the format refuses the artifact."""
    actual: int
    seconds: float
    """Time of the prediction."""


def random_steps(generator: random.Random) -> list[Technique]:
    """Return a random recipe of up to four steps, in the order of the stages."""
    steps = []
    for stage, skip_probability in zip(_STAGES, _SKIP_PROBABILITIES, strict=True):
        if generator.random() < skip_probability:
            continue
        name = generator.choice(sorted(stage))
        options = {option: generator.choice(values) for option, values in stage[name].items()}
        steps.append(techniques.load(name).of(options))
    return steps


def compress(original: Path, steps: list[Technique], folder: Path) -> Path | None:
    """Write the artifact of these steps into `folder`; return None if one of them refuses this model."""
    model = loading.load(original)
    tokens = torch.randint(3, 512, (8, 32), generator=torch.Generator().manual_seed(0))
    for number, step in enumerate(steps):
        try:
            step.output_layout(model.layout())
        except ValueError:
            return None
        # Each step has a parent of its own: its statistics must not be reused for another model.
        statistics = Statistics(folder.with_name(f"{folder.name}-{number}"), "parent")
        model = step.compress(model, Context(statistics, folder.parent, seed=0, calibration=tokens))
    loading.save(model, folder, {})
    return folder


def artifacts(
    originals: dict[str, Path], number: int, seed: int, scratch: Path
) -> Iterator[tuple[str, str, Path]]:
    """Yield this number of random possible recipes: family, text and the artifact's folder."""
    generator = random.Random(seed)
    completed = attempts = 0
    while completed < number:
        attempts += 1
        family, steps = generator.choice(sorted(originals)), random_steps(generator)
        artifact = compress(originals[family], steps, scratch / f"artifact-{attempts}")
        if artifact is not None:
            completed += 1
            yield family, " → ".join(map(str, steps)) or "as it is", artifact


def exported_size(name: str, family: str, recipe: str, artifact: Path, original: Path) -> ExportedSize:
    """Return the predicted and the actual size of an artifact in a format."""
    format, layout = formats.load(name), Layout.read(artifact)
    if format.refusal(layout) is not None:
        return ExportedSize(family, recipe, name, None, 0, 0.0)
    start = time.perf_counter()
    predicted = format.size_bytes(layout, original)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as scratch:
        formats.write(name, artifact, Path(scratch) / "out")
        actual = formats.size_of(Path(scratch) / "out", name)
    return ExportedSize(family, recipe, name, predicted, actual, seconds)


def measure_sizes(recipes: int, seed: int) -> list[ExportedSize]:
    """Return the sizes of random recipes in all installed formats."""
    from tests import conftest  # the tiny models of the tests

    installed = [name for name in formats.names() if formats.load(name).missing() is None]
    sizes = []
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = conftest.tokenizer_on(conftest.prose())
        originals = {
            family: conftest.save_tiny(family, None, tokenizer, Path(scratch) / family) for family in FAMILIES
        }
        for family, recipe, artifact in artifacts(originals, recipes, seed, Path(scratch)):
            for name in installed:
                sizes.append(exported_size(name, family, recipe, artifact, originals[family]))
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sizes = measure_sizes(options.recipes, options.seed)
    print(f"{'format':20} {'written':>8} {'refused':>8} {'exact':>8} {'ms to predict':>15}")
    for name in sorted({size.format for size in sizes}):
        of_format = [size for size in sizes if size.format == name]
        predicted = [size for size in of_format if size.predicted is not None]
        exact = sum(size.predicted == size.actual for size in predicted)
        mean_ms = 1000 * sum(size.seconds for size in predicted) / max(1, len(predicted))
        refused = len(of_format) - len(predicted)
        print(f"{name:20} {len(predicted):8} {refused:8} {exact:8} {mean_ms:15.1f}")
    for size in sizes:
        if size.predicted is not None and size.predicted != size.actual:
            print(
                f"{size.format} of {size.family}, {size.recipe}: predicted {size.predicted}, actual {size.actual}"
            )


if __name__ == "__main__":
    main()
