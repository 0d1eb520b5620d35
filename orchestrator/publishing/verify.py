"""Verify an export: measure it again and compare each metric with the recorded value."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import formats, measure, meters, runtimes
from jobs.materials import Materials, materials_from_dict
from jobs.measurement.measurement import Measurement
from jobs.measurement.meter import ShippedModel
from jobs.models import sources
from orchestrator.persistence.study_folder import MEASUREMENT
from orchestrator.study.results import COSTS, differing

_SIGMAS = 3.0
"""Two measurements may differ by this many standard errors of their difference."""
_DRIFT = 0.03
"""The relative difference that times and memory may always have, since each error covers one session only."""


@dataclass(frozen=True)
class VerifiedMetric:
    """The recorded and the new value of one metric."""

    metric: str
    recorded: float
    measured: float
    allowed: float | None
    """The largest difference that passes; None if the values are not comparable."""
    note: str = ""
    """The reason why the values are not comparable."""

    @property
    def ok(self) -> bool:
        return self.allowed is None or abs(self.measured - self.recorded) <= self.allowed


def verify(folder: Path) -> list[VerifiedMetric]:
    """Measure the recorded metrics of this export again, except those that this machine cannot measure.

    Raises ValueError if a file was changed, LookupError if no runtime of this machine runs the export,
    FileNotFoundError if the texts of the evaluation are not on this machine.
    """
    record, materials = recorded(folder)
    names = {meters.meter_of(metric, materials.task) for metric in record["metrics"]}
    usable = {name for name in names if meters.load(name).missing(materials.target) is None}
    with tempfile.TemporaryDirectory() as scratch:
        original = original_of(folder, materials, usable)
        subject = ShippedModel(folder, original, materials, workdir=Path(scratch))
        measurement = measure.measure(sorted(usable), subject)
    return compare(record, measurement)


def recorded(folder: Path) -> tuple[dict[str, Any], Materials]:
    """Return the record of an export and the materials to measure it with on this machine.

    Raises the errors of `verify`.
    """
    check_files(folder)
    record: dict[str, Any] = json.loads((folder / MEASUREMENT).read_text())
    return record, _with_usable_runtime(folder, materials_from_dict(record["materials"]))


def check_files(folder: Path) -> None:
    """Raise ValueError if a file of an export is missing or has another checksum than in its manifest."""
    formats.format_of(folder)
    manifest = json.loads((folder / formats.EXPORT_MANIFEST).read_text())
    expected: Mapping[str, str] = manifest.get("checksums", {})
    actual = formats.checksums(folder)
    for name, digest in expected.items():
        if name not in actual:
            raise ValueError(f"{folder / name} is missing: export the model again")
        if actual[name] != digest:
            raise ValueError(
                f"the checksum of {folder / name} is wrong: the file was changed or damaged; export the model again"
            )


def compare(record: Mapping[str, Any], measurement: Measurement) -> list[VerifiedMetric]:
    """Compare recorded metrics with a new measurement; costs only within one environment."""
    changed = differing(record["environment"], measurement.environment)
    rows = []
    for metric, recorded in sorted(record["metrics"].items()):
        if metric not in measurement.metrics:
            continue
        error, new_error = record["errors"].get(metric), measurement.errors.get(metric, 0.0)
        allowed, note = None, ""
        if metric in measurement.unreliable:
            note = "too noisy on this machine to compare"
        elif metric == "size_bytes":
            allowed = 0.0
        elif error is None:
            note = "recorded without an error"
        elif changed and metric.endswith(COSTS):
            note = f"recorded with another {', '.join(changed)}"
        else:
            allowed = _allowed(metric, recorded, error, new_error)
        rows.append(VerifiedMetric(metric, recorded, measurement.metrics[metric], allowed, note))
    return rows


def _allowed(metric: str, recorded: float, error: float, new_error: float) -> float:
    allowed = _SIGMAS * math.hypot(error, new_error)
    if metric.endswith(COSTS):
        allowed = max(allowed, _DRIFT * recorded)
    return allowed


def _with_usable_runtime(folder: Path, materials: Materials) -> Materials:
    """Return the materials with a runtime that runs the format of this export: the recorded runtime if it does.

    Raises LookupError if this machine has no such runtime.
    """
    format, target = formats.format_of(folder), materials.target
    runtime = runtimes.load(target.runtime)
    if format in runtime.READS:
        reason = runtime.missing()
        if reason is not None:
            raise LookupError(reason)
        return materials
    return dataclasses.replace(
        materials, target=dataclasses.replace(target, runtime=runtimes.runtime_for(format))
    )


def original_of(folder: Path, materials: Materials, meter_names: set[str]) -> Path:
    """Return the original's folder if one of these meters compares with it.

    Otherwise return the export's, whose tokenizer is the original's.
    """
    if "agreement" in meter_names:
        return sources.locate(materials.model)
    return folder
