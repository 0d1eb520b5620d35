"""Register the front of a study as models in MLflow: one version per member, with aliases for the named picks.

Like every delivery this is idempotent: versions and logged models are looked up by the candidate's id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion

from orchestrator.pareto.front import PICKS
from orchestrator.study.front_snapshot import FrontMember, FrontSnapshot

OUTBOX_TAG, CANDIDATE_TAG = "slimfront.outbox", "slimfront.candidate"
_REPLACEMENTS = str.maketrans(dict.fromkeys("/:.%\"'", "_"))
"""Characters that MLflow accepts in an experiment's name but not in a logged model's."""


class Registry:
    """The registered model of one study. It has the study's name, and one version per candidate.

    Weights stay in the store; a version's tags hold their location.
    """

    def __init__(self, client: MlflowClient, experiment: str, outbox_id: str) -> None:
        self._client = client
        self._experiment = experiment
        self._outbox_id = outbox_id

    def show(self, front: FrontSnapshot, runs: Mapping[str, str], urls: Mapping[str, str]) -> None:
        """Register the members of a front and move the aliases to its picks.

        runs: the id of each member's run. urls: the location of each member's files.
        """
        name, members = front.study, front.members
        versions = self._versions(name)
        if versions is None:
            if not members:
                return
            self._client.create_registered_model(
                name, description="The front of a study, one version per member."
            )
            versions = {}
        for member in members:
            model = self._logged_model(name, member, runs[member.id], urls.get(member.id, ""))
            if member.id not in versions:
                versions[member.id] = self._register(name, member, runs[member.id], model)
        self._tag(name, versions, {member.id for member in members})
        self._move_aliases(name, {alias: versions[id].version for alias, id in front.picks.items()})

    def _versions(self, name: str) -> dict[str, ModelVersion] | None:
        """Return the versions by candidate id; None if no registered model has this name."""
        if not self._client.search_registered_models(f"name = '{name}'"):
            return None
        versions: dict[str, ModelVersion] = {}
        token = None
        while True:
            page = self._client.search_model_versions(f"name = '{name}'", page_token=token)
            for version in page:
                if CANDIDATE_TAG in version.tags:
                    versions[version.tags[CANDIDATE_TAG]] = version
            token = page.token
            if not token:
                return versions

    def _logged_model(self, study: str, member: FrontMember, run: str, url: str) -> LoggedModel:
        """Return the member's logged model with the metrics of its run; create it if there is none."""
        condition = f"tags.`{CANDIDATE_TAG}` = '{member.id}' AND tags.`{OUTBOX_TAG}` = '{self._outbox_id}'"
        existing: Sequence[LoggedModel] = self._client.search_logged_models([self._experiment], condition)
        data = self._client.get_run(run).data
        tags = {"recipe": member.recipe[:4000], "artifact": member.artifact or "", "stored_at": url}
        if existing:
            model = existing[0]
            self._client.set_logged_model_tags(model.model_id, tags)
        else:
            model = self._client.create_logged_model(
                self._experiment,
                f"{study}-{member.id[:8]}".translate(_REPLACEMENTS),
                run,
                {**tags, CANDIDATE_TAG: member.id, OUTBOX_TAG: self._outbox_id},
                dict(data.params),
            )
        logged = {metric.key: metric.value for metric in model.metrics or []}
        for key, value in data.metrics.items():
            if logged.get(key) != value:
                # The same point as in the run: with another time it would become a second point of a curve.
                point = self._client.get_metric_history(run, key)[-1]
                self._client.log_metric(run, key, value, point.timestamp, point.step, model_id=model.model_id)
        return self._client.finalize_logged_model(model.model_id, "READY")

    def _register(self, name: str, member: FrontMember, run: str, model: LoggedModel) -> ModelVersion:
        return self._client.create_model_version(
            name,
            model.artifact_location,
            run,
            tags={**model.tags, CANDIDATE_TAG: member.id},
            description=member.recipe[:4000],
            model_id=model.model_id,
        )

    def _tag(self, name: str, versions: Mapping[str, ModelVersion], members: set[str]) -> None:
        """Tag each version with whether it is on the front. Versions that left the front stay for their users."""
        for candidate, version in versions.items():
            on_front = str(candidate in members).lower()
            if version.tags.get("pareto") != on_front:
                self._client.set_model_version_tag(name, version.version, "pareto", on_front)

    def _move_aliases(self, name: str, versions: Mapping[str, str]) -> None:
        """Set the aliases of PICKS to these versions. Aliases that users have set stay."""
        present = self._client.get_registered_model(name).aliases
        for alias, version in versions.items():
            if str(present.get(alias)) != str(version):
                self._client.set_registered_model_alias(name, alias, version)
        for alias in present.keys() & {*PICKS} - versions.keys():
            self._client.delete_registered_model_alias(name, alias)
