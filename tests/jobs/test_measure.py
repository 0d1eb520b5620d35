"""One measurement joins the numbers of all meters and records its environment."""

import importlib.metadata
from pathlib import Path

from jobs.materials import Materials, Target, TextSource
from jobs.measure import environment, measure
from jobs.measurement.meter import ShippedModel


def test_all_meters_are_joined_with_environment_and_seconds(tiny_llama: Path, text_file: Path) -> None:
    materials = Materials(str(tiny_llama), "causal-lm", TextSource(str(text_file), 2, 16))
    measurement = measure(["text", "size"], ShippedModel(tiny_llama, tiny_llama, materials))
    assert set(measurement.metrics) == {"perplexity", "accuracy", "size_bytes"}
    assert measurement.environment == environment(Target())
    assert measurement.seconds > 0
    assert {metric: len(items) for metric, items in measurement.items.items()} == {
        "perplexity": 2,
        "accuracy": 2,
    }


def test_the_environment_lists_machine_libraries_and_threads() -> None:
    actual = environment(Target(threads=3))
    assert actual["torch"] == importlib.metadata.version("torch")
    assert actual["threads"] == "3"
    assert actual["cpu"]
    assert environment(Target(threads=2)) != actual
