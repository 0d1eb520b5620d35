"""Registry: the front of a study among MLflow's models, one version a member, with aliases for those that have a name.

Like all that is delivered it can be repeated: what is there is found again by the candidate's id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion

from orchestrator.pareto.front import PICKS

OUTBOX_TAG, CANDIDATE_TAG = "slimfront.outbox", "slimfront.candidate"
_NO_NAME = str.maketrans(dict.fromkeys("/:.%\"'", "_"))
"""What MLflow takes in an experiment's name, and not in a logged model's."""


class Registry:
    """What one outbox shows of its study in the registry. The registered model has the study's name; a candidate has
    one version in it, whoever registered it. Weights stay in the store: a model tells where there."""

    def __init__(self, client: MlflowClient, experiment: str, outbox_id: str) -> None:
        self._client = client
        self._experiment = experiment
        self._outbox_id = outbox_id

    def show(self, front: Mapping[str, Any], runs: Mapping[str, str], places: Mapping[str, str]) -> None:
        """Register the members of a front (as front.json has it), and let its aliases name them and no others.

        runs: the id of each member's run; places: where each member's files lie.
        """
        name, members = front["study"], front["members"]
        held = self._versions(name)
        if held is None:
            if not members:
                return
            self._client.create_registered_model(
                name, description="The front of a study, one version a member."
            )
            held = {}
        for member in members:
            model = self._logged_model(name, member, runs[member["id"]], places.get(member["id"], ""))
            if member["id"] not in held:
                held[member["id"]] = self._register(name, member, runs[member["id"]], model)
        self._tag(name, held, {member["id"] for member in members})
        self._move_aliases(name, {alias: held[id].version for alias, id in front["picks"].items()})

    def _versions(self, name: str) -> dict[str, ModelVersion] | None:
        """The versions by candidate; None where there is no registered model of that name."""
        if not self._client.search_registered_models(f"name = '{name}'"):
            return None
        found: dict[str, ModelVersion] = {}
        token = None
        while True:
            page = self._client.search_model_versions(f"name = '{name}'", page_token=token)
            found |= {one.tags[CANDIDATE_TAG]: one for one in page if CANDIDATE_TAG in one.tags}
            token = page.token
            if not token:
                return found

    def _logged_model(self, study: str, member: Mapping[str, Any], run: str, place: str) -> LoggedModel:
        """The member's logged model with what its run has of metrics, made now if an earlier delivery has not."""
        condition = f"tags.`{CANDIDATE_TAG}` = '{member['id']}' AND tags.`{OUTBOX_TAG}` = '{self._outbox_id}'"
        found: Sequence[LoggedModel] = self._client.search_logged_models([self._experiment], condition)
        data = self._client.get_run(run).data
        tags = {"recipe": member["recipe"][:4000], "artifact": member["artifact"] or "", "stored_at": place}
        if found:
            model = found[0]
            self._client.set_logged_model_tags(model.model_id, tags)
        else:
            model = self._client.create_logged_model(
                self._experiment,
                f"{study}-{member['id'][:8]}".translate(_NO_NAME),
                run,
                {**tags, CANDIDATE_TAG: member["id"], OUTBOX_TAG: self._outbox_id},
                dict(data.params),
            )
        told = {metric.key: metric.value for metric in model.metrics or []}
        for key, value in data.metrics.items():
            if told.get(key) != value:
                # The very point that the run has: with another time it would become a second one of a curve.
                point = self._client.get_metric_history(run, key)[-1]
                self._client.log_metric(run, key, value, point.timestamp, point.step, model_id=model.model_id)
        return self._client.finalize_logged_model(model.model_id, "READY")

    def _register(self, name: str, member: Mapping[str, Any], run: str, model: LoggedModel) -> ModelVersion:
        return self._client.create_model_version(
            name,
            model.artifact_location,
            run,
            tags={**model.tags, CANDIDATE_TAG: member["id"]},
            description=member["recipe"][:4000],
            model_id=model.model_id,
        )

    def _tag(self, name: str, held: Mapping[str, ModelVersion], members: set[str]) -> None:
        """Who left the front keeps the version, which somebody may use, and the tag says so."""
        for candidate, version in held.items():
            on_front = str(candidate in members).lower()
            if version.tags.get("pareto") != on_front:
                self._client.set_model_version_tag(name, version.version, "pareto", on_front)

    def _move_aliases(self, name: str, wanted: Mapping[str, str]) -> None:
        """Only those of PICKS are ours; what people called a version stays."""
        there = self._client.get_registered_model(name).aliases
        for alias, version in wanted.items():
            if str(there.get(alias)) != str(version):
                self._client.set_registered_model_alias(name, alias, version)
        for alias in there.keys() & {*PICKS} - wanted.keys():
            self._client.delete_registered_model_alias(name, alias)
