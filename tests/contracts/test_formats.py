"""The contract of all formats, run over every file of jobs/formats, every family and many kinds of recipes."""

from __future__ import annotations

import filecmp
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import size
from jobs import formats, techniques
from jobs.models import families
from jobs.models.layout import Layout
from jobs.technique import Technique

Steps = tuple[tuple[str, dict[str, object]], ...]

KINDS: dict[str, Steps] = {
    "as it is": (),
    "8 bits": (("rtn", {"bits": 8, "group": 0, "symmetric": True}),),
    "4 bits": (("rtn", {"bits": 4, "group": 32}),),
    "3 bits": (("gptq", {"bits": 3, "group": 32}),),
    "uneven groups": (("rtn", {"bits": 4, "group": 128, "symmetric": True}),),
    "real zeros": (("hqq", {"bits": 4, "group": 32}),),
    "rounded activations": (("smoothquant", {}),),
    "packed embedding": (("rtn", {"bits": 4, "group": 32, "symmetric": True, "embedding_bits": 8}),),
    "mended rounding": (("rtn", {"bits": 4, "group": 32, "correction_rank": 4}),),
    "low rank": (("svd", {"keep": 0.5}),),
    "fewer neurons": (("prune_ffn", {"ratio": 0.4}),),
    "fewer neurons, biases": (("prune_ffn", {"ratio": 0.4, "correction": "bias"}),),
    "fewer heads": (("prune_heads", {"ratio": 0.5}),),
    "narrower": (("prune_hidden", {"ratio": 0.5}),),
    "fewer blocks": (("drop_layers", {"count": 2}),),
    "sparse": (("magnitude", {"sparsity": 0.5}),),
    "chain": (
        ("drop_layers", {"count": 1}),
        ("prune_ffn", {"ratio": 0.4}),
        ("rtn", {"bits": 4, "group": 32, "symmetric": True}),
    ),
    "chain with low rank": (
        ("drop_layers", {"count": 1}),
        ("svd", {"keep": 0.5}),
        ("rtn", {"bits": 8, "symmetric": True}),
    ),
}
TYPICAL = ("llama", "qwen2", "gpt2", "bert")
"""Families that differ most: they are compressed by every kind of recipe, the others only by a chain."""
CASES = [
    (family, kind)
    for family in families.names()
    for kind in KINDS
    if family in TYPICAL or kind in ("as it is", "chain")
]
RECIPES = 40

Tiny = Callable[..., Path]
ArtifactOf = Callable[[str, str], Path]


@pytest.fixture(params=formats.names())
def name(request: pytest.FixtureRequest) -> str:
    lacking = formats.load(request.param).missing()
    if lacking is not None:
        pytest.skip(lacking)
    return str(request.param)


def steps_of(kind: str) -> list[Technique]:
    return [techniques.load(technique).of(options) for technique, options in KINDS[kind]]


@pytest.fixture(scope="session")
def artifact_of(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> ArtifactOf:
    """Compress a family's tiny model by a kind of recipe, once; skip the test if a step does not support it."""
    artifacts: dict[tuple[str, str], Path | None] = {}

    def compressed(family: str, kind: str) -> Path:
        if (family, kind) not in artifacts:
            folder = tmp_path_factory.mktemp("artifact") / "model"
            artifacts[family, kind] = size.compress(tiny(family), steps_of(kind), folder)
        artifact = artifacts[family, kind]
        if artifact is None:
            pytest.skip(f"no {kind} of a {family}")
        return artifact

    return compressed


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_predicted_size_is_exact_or_the_refusal_has_a_reason(
    name: str, family: str, kind: str, artifact_of: ArtifactOf, tiny: Tiny, tmp_path: Path
) -> None:
    artifact = artifact_of(family, kind)
    layout, out = Layout.read(artifact), tmp_path / "out"
    reason = formats.load(name).refusal(layout)
    if reason is not None:
        with pytest.raises(
            ValueError, match=re.escape(f"{name} cannot hold this model: {reason}")
        ) as refusal:
            formats.write(name, artifact, out)
        assert formats.NATIVE in str(refusal.value)  # a format that supports it
        assert not out.exists()
        return
    predicted_bytes = formats.load(name).size_bytes(layout, tiny(family))
    formats.write(name, artifact, out)
    assert formats.size_of(out, name) == predicted_bytes
    assert formats.format_of(out) == name
    assert json.loads((out / formats.EXPORT_MANIFEST).read_text())["task"] == layout.task


@pytest.mark.parametrize("kind", ["as it is", "chain", "packed embedding"])
@pytest.mark.parametrize("family", TYPICAL)
def test_two_exports_are_identical_to_the_byte(
    name: str, family: str, kind: str, artifact_of: ArtifactOf, tmp_path: Path
) -> None:
    artifact = artifact_of(family, kind)
    if formats.load(name).refusal(Layout.read(artifact)) is not None:
        pytest.skip(f"{name} does not support this model")
    for out in ("first", "second"):
        formats.write(name, artifact, tmp_path / out)
    files = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "second").iterdir())
    same, _, _ = filecmp.cmpfiles(tmp_path / "first", tmp_path / "second", files, shallow=False)
    assert sorted(same) == files


@pytest.fixture(scope="session")
def random_artifacts(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, Path]]:
    originals = {family: tiny(family) for family in size.FAMILIES}
    return list(size.artifacts(originals, RECIPES, 1, tmp_path_factory.mktemp("random_artifacts")))


def test_the_size_of_random_recipes_is_predicted_to_the_byte(
    name: str, random_artifacts: list[tuple[str, str, Path]], tiny: Tiny
) -> None:
    rows = [
        size.exported_size(name, family, text, artifact, tiny(family))
        for family, text, artifact in random_artifacts
    ]
    supported = [row for row in rows if row.predicted is not None]
    assert supported
    assert [row for row in supported if row.predicted != row.actual] == []


def test_a_packed_linear_is_refused_with_its_name_and_suitable_formats(
    artifact_of: ArtifactOf, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"4-bit integers in model\.layers\.0.*these can:.*slimfront"):
        formats.write("safetensors", artifact_of("llama", "4 bits"), tmp_path / "out")


def test_an_unknown_format_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(LookupError, match="did you mean safetensors"):
        formats.load("safetensor")
