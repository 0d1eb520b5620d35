"""One measurement joins all meters and says where it was taken."""

import importlib.metadata
from pathlib import Path

from jobs.materials import Materials, Target, TextSource
from jobs.measure import environment, measure
from jobs.measurement.meter import ShippedModel


def test_all_meters_are_joined_with_environment_and_seconds(tiny_llama: Path, text_file: Path) -> None:
    materials = Materials(str(tiny_llama), "causal-lm", TextSource(str(text_file), 2, 16))
    found = measure(["text", "size"], ShippedModel(tiny_llama, tiny_llama, materials))
    assert set(found.metrics) == {"perplexity", "accuracy", "size_bytes"}
    assert found.environment == environment(Target())
    assert found.seconds > 0
    assert {metric: len(items) for metric, items in found.items.items()} == {"perplexity": 2, "accuracy": 2}


def test_the_environment_names_machine_libraries_and_threads() -> None:
    found = environment(Target(threads=3))
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["threads"] == "3"
    assert found["cpu"]
    assert environment(Target(threads=2)) != found
