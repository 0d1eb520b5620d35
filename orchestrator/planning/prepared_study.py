"""The data type of a study that is ready to run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.materials import Materials
from jobs.models.layout import Layout
from jobs.prediction.latency_model import Table
from orchestrator.config.schema import StudyConfig
from orchestrator.persistence.study_folder import StudyFolder
from orchestrator.planning.layer_sensitivity import Levels
from orchestrator.planning.search_space import KnobsPerPart, SearchSpace
from orchestrator.study.budget import Budget
from orchestrator.study.events import StudyPlan


@dataclass(frozen=True)
class PreparedStudy:
    """A study that is ready to run: it is valid, its model is on this machine, its data was read once."""

    config: StudyConfig
    text: str
    """The study file, with the overrides of the command line as comments."""
    space: SearchSpace
    materials: Materials
    original: Path
    """The folder of the original model."""
    layout: Layout
    """The layout of the original model."""
    plan: StudyPlan
    budget: Budget
    table: Table | None = None
    """Predicts latencies; None if the study predicts none, or until the table is fitted."""
    levels: Levels | None = None
    """The measured sensitivity of each block; None if no option differs by block, or until it is measured."""

    @property
    def folder(self) -> StudyFolder:
        return StudyFolder.of(self.config.store, self.config.name)

    @property
    def digest(self) -> str:
        """16 hex digits of the digest of everything that decides a study's results: not of the number of candidates,
        the cluster or the budget."""
        options = []
        for stage, alternatives in self.space.stages.items():
            for option in alternatives:
                name, version = option.technique.name(), option.technique.version
                parts = [stage, name, version, str(option.searched), str(option.fixed)]
                if option.per_part:
                    parts.append(_digested_text(option.per_part))
                options.append(parts)
        content = [
            self.plan.original.id,
            self.plan.materials_digest,
            options,
            list(self.space.orders),
            [(o.metric, o.goal, o.limit) for o in self.plan.objectives],
            self.config.search.algorithm,
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _digested_text(per_part: Mapping[str, KnobsPerPart]) -> str:
    """Return the knobs per part as digests contain them. The text has never changed, so that stored studies resume."""
    entries = []
    for name, knobs in per_part.items():
        entries.append(
            f"{name!r}: Spread(domain={knobs.domain!r}, runs={knobs.runs!r}, by_linear={knobs.by_linear!r}, "
            f"grouped={knobs.grouped!r})"
        )
    return "{" + ", ".join(entries) + "}"
