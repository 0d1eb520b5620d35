"""Verify: measure an export again, and hold each number against what was recorded of it."""

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
from jobs.measurement.meter import MeasuredModel
from jobs.models import sources
from orchestrator.persistence.study_folder import MEASUREMENT
from orchestrator.study.results import COSTS, differing

_SIGMAS = 3.0
"""How many of both errors together two measurements of one thing may lie apart."""
_DRIFT = 0.03
"""By so much of itself a time, or a process's memory, may differ besides: the errors are of one session each."""


@dataclass(frozen=True)
class VerifiedMetric:
    """One metric, recorded and measured again. allowed: how far apart they may lie; None where they are not
    comparable, for the reason in `note`."""

    metric: str
    recorded: float
    measured: float
    allowed: float | None
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.allowed is None or abs(self.measured - self.recorded) <= self.allowed


def verify(folder: Path) -> list[VerifiedMetric]:
    """Measure what was recorded of this export once more, here, but for what this machine cannot measure.

    Raises ValueError where a file is not the one that was exported, LookupError where nothing here runs it,
    FileNotFoundError where the texts it was measured on are not here.
    """
    record, materials = recorded(folder)
    every = {meters.meter_of(metric, materials.task) for metric in record["metrics"]}
    wanted = {name for name in every if meters.load(name).missing(materials.target) is None}
    with tempfile.TemporaryDirectory() as scratch:
        subject = MeasuredModel(
            folder, original_of(folder, materials, wanted), materials, workdir=Path(scratch)
        )
        found = measure.measure(sorted(wanted), subject)
    return compare(record, found)


def recorded(folder: Path) -> tuple[dict[str, Any], Materials]:
    """What was recorded of an export, and what it was measured with, for a runtime that is here. Raises as `verify`
    does."""
    check_files(folder)
    record: dict[str, Any] = json.loads((folder / MEASUREMENT).read_text())
    return record, _here(folder, materials_from_dict(record["materials"]))


def check_files(folder: Path) -> None:
    """Refuse, with a ValueError, an export whose files are not those that were written."""
    formats.format_of(folder)
    expected: Mapping[str, str] = json.loads((folder / formats.EXPORT_MANIFEST).read_text()).get(
        "checksums", {}
    )
    found = formats.checksums(folder)
    for name, digest in expected.items():
        if name not in found:
            raise ValueError(f"{folder / name} is missing: export the model again")
        if found[name] != digest:
            raise ValueError(
                f"the checksum of {folder / name} is off: it was changed or damaged; export it again"
            )


def compare(record: Mapping[str, Any], found: Measurement) -> list[VerifiedMetric]:
    """What was recorded beside what was found. What another environment costs is shown, and not held against it."""
    elsewhere = differing(record["environment"], found.environment)
    checked = []
    for metric, recorded in sorted(record["metrics"].items()):
        if metric not in found.metrics:
            continue
        measured, error = found.metrics[metric], record["errors"].get(metric)
        if metric in found.unreliable:
            checked.append(VerifiedMetric(metric, recorded, measured, None, "too noisy here to compare"))
        elif metric == "size_bytes":
            checked.append(VerifiedMetric(metric, recorded, measured, 0.0))
        elif error is None:
            checked.append(VerifiedMetric(metric, recorded, measured, None, "recorded without an error"))
        elif elsewhere and metric.endswith(COSTS):
            note = f"recorded with another {', '.join(elsewhere)}"
            checked.append(VerifiedMetric(metric, recorded, measured, None, note))
        else:
            allowed = _SIGMAS * math.hypot(error, found.errors.get(metric, 0.0))
            if metric.endswith(COSTS):
                allowed = max(allowed, _DRIFT * recorded)
            checked.append(VerifiedMetric(metric, recorded, measured, allowed))
    return checked


def _here(folder: Path, materials: Materials) -> Materials:
    """The same, for a runtime that runs the form of this export: the recorded one if that does."""
    format, target = formats.format_of(folder), materials.target
    recorded = runtimes.load(target.runtime)
    if format in recorded.READS:
        lacking = recorded.missing()
        if lacking is not None:
            raise LookupError(lacking)
        return materials
    return dataclasses.replace(
        materials, target=dataclasses.replace(target, runtime=runtimes.runtime_for(format))
    )


def original_of(folder: Path, materials: Materials, wanted: set[str]) -> Path:
    """The original, where it is compared with; else the export, whose tokenizer is the original's."""
    return sources.locate(materials.model) if "agreement" in wanted else folder
