"""The versions of a cluster's image: complete, consistent, and those of this machine."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cluster.templates import pins

EXTRAS = ("gguf", "onnx", "openvino", "tasks")
ROOT = Path(__file__).parents[2]
LOCK = """# a comment
jinja2==3.1.6
numpy==2.4.6 ; python_full_version < '3.12'
numpy==2.5.5 ; python_full_version >= '3.12'
nvidia-nccl-cu13==2.29.7 ; sys_platform == 'linux'
"""


def applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def test_indirect_dependencies_are_pinned_and_those_of_developers_are_not() -> None:
    versions = pins.installed_versions("slimfront", EXTRAS)
    assert {"torch", "jinja2", "botocore", "tokenizers", "lm-eval"} <= set(
        versions
    )  # jinja2 is a need of torch
    assert not {"slimfront", "pytest", "mypy"} & set(versions)
    assert versions["torch"] == metadata.version("torch").partition("+")[0]


def test_the_pins_satisfy_the_requirements_of_every_pinned_package() -> None:
    versions = pins.installed_versions("slimfront", EXTRAS)
    for name in versions:
        for requirement in map(Requirement, metadata.requires(name) or ()):
            if applies(requirement):
                version = versions[canonicalize_name(requirement.name)]
                assert requirement.specifier.contains(version, prereleases=True), (name, str(requirement))


def test_a_machine_with_the_locked_versions_writes_the_whole_lock() -> None:
    assert pins.constraints({"jinja2": "3.1.6", "numpy": "2.5.5"}, LOCK) == LOCK


def test_installed_versions_replace_a_lock_that_has_others() -> None:
    text = pins.constraints({"jinja2": "3.1.6", "numpy": "2.3.0", "rich": "14.0"}, LOCK)
    lines = text.splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "jinja2==3.1.6",
        "numpy==2.3.0",
        "rich==14.0",
    ]
    assert [line.split() for line in lines if line.startswith("#  ")] == [["#", "numpy"], ["#", "rich"]]


def test_the_lock_has_every_package_that_slimfront_needs() -> None:
    lock = pins.read_lock()
    assert lock == (ROOT / "constraints.txt").read_text()
    assert set(pins.installed_versions("slimfront", EXTRAS)) <= set(pins.locked_versions(lock))


def test_the_wheel_contains_the_lock(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("extra_metadata/constraints.txt"))
        assert wheel.read(name).decode() == pins.read_lock()
