"""The names and paths of a study's files, and of the folder that all studies of a store share on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cluster.storage.open import is_remote
from orchestrator.persistence.atomic_files import write_json

CACHE = "cache"
"""The folder of statistics and graphs, which all studies of a store share."""

DOWNLOADS = "downloads"
"""The folder of copies of artifacts, next to the cache. Only remote stores use it."""

SCRATCH = "scratch"

CHECKPOINTS = "checkpoints"

STUDY_FILE = "study.yaml"

RECIPE, MEASUREMENT = "recipe.json", "measurement.json"
"""Files of an exported model."""


@dataclass(frozen=True)
class StudyFolder:
    """The folder of one study. It exists from the study's first launch on."""

    path: Path

    @staticmethod
    def of(store: str, study: str) -> StudyFolder:
        """The folder of the study of this name whose store has this address."""
        return StudyFolder(home(store) / study)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def home(self) -> Path:
        """The local folder of all studies of the store."""
        return self.path.parent

    @property
    def ledger(self) -> Path:
        """The SQLite file of events."""
        return self.path / "ledger.db"

    @property
    def study_file(self) -> Path:
        """The text of the study, with the overrides of the command line as comments."""
        return self.path / STUDY_FILE

    @property
    def materials(self) -> Path:
        """The data and the target of the study's jobs, as JSON."""
        return self.path / "materials.json"

    @property
    def front(self) -> Path:
        return self.path / "front.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def outbox(self) -> Path:
        """The SQLite file of tracking messages that are not sent yet."""
        return self.path / "outbox.db"

    @property
    def scratch(self) -> Path:
        """The folder in which jobs in progress write."""
        return self.path / SCRATCH

    @property
    def checkpoints(self) -> Path:
        """The folder of training checkpoints, from which interrupted trainings resume."""
        return self.path / CHECKPOINTS

    @property
    def cache(self) -> Path:
        """The folder of statistics and graphs, which all studies of the store share."""
        return self.home / CACHE

    @property
    def tracking_database(self) -> Path:
        """MLflow's SQLite file, where the study names no tracking server. All studies of the store share it."""
        return self.home.resolve() / "mlflow.db"

    def note_store(self, store: str) -> None:
        """Record the address of the study's store, if that is not the folder above."""
        if is_remote(store):
            write_json(self._store_file, {"store": store})
        else:
            self._store_file.unlink(missing_ok=True)

    def store(self) -> str:
        """The address of the study's store."""
        try:
            return str(json.loads(self._store_file.read_text())["store"])
        except FileNotFoundError:
            return str(self.home)

    @property
    def _store_file(self) -> Path:
        return self.path / "store.json"


def home(store: str) -> Path:
    """The local folder of all studies of the store at this address: the store itself, or `runs` for a remote store."""
    return Path("runs") if is_remote(store) else Path(store).expanduser()
