"""Templates: the shipped ones are valid, by Ray's own checks too; each problem of one is one clear line."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.templates import filling, kuberay
from cluster.templates.checking import check, problems_of
from cluster.templates.filling import Choices
from cluster.templates.instances import table
from cluster.templates.yaml_lines import Document, documents

GCP = Choices(project="my-project-1")
SHIPPED = [
    ("aws", Choices(), "aws.yaml"),
    ("gcp", GCP, "gcp.yaml"),
    ("kuberay", Choices(), "raycluster.yaml"),
    ("kuberay", Choices(), "rayjob.yaml"),
]
KINDS = [
    *(("aws", Choices(gpu=gpu), "aws.yaml") for gpu in ("A10G", "A100", "H100", "L4", "L40S", "T4")),
    *(("gcp", Choices(gpu=gpu, project="my-project-1"), "gcp.yaml") for gpu in ("A100", "H100", "L4", "T4")),
]


def written(folder: Path, template: str, choices: Choices, name: str) -> Path:
    filling.write(filling.fill(template, choices), folder)
    return folder / name


def changed(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


def line_of(path: Path, text: str) -> int:
    return next(n for n, line in enumerate(path.read_text().splitlines(), 1) if text in line)


@pytest.mark.parametrize(("template", "choices", "name"), SHIPPED + KINDS)
def test_what_is_written_is_valid(template: str, choices: Choices, name: str, tmp_path: Path) -> None:
    assert check(written(tmp_path, template, choices, name)) == []


SPOT = "available_node_types.gpu-spot"
MARKET = f"{SPOT}.node_config.InstanceMarketOptions"
AWS_TYPOS = [
    ("cluster_name: slimfront", "cluster_nam: slimfront", "cluster_nam: got cluster_nam, expected cluster_name"),
    ("idle_timeout_minutes", "idle_timeout_minute",
     "idle_timeout_minute: got idle_timeout_minute, expected idle_timeout_minutes"),
    ("  cache_stopped_nodes", "  cache_stoped_nodes",
     "provider.cache_stoped_nodes: got cache_stoped_nodes, expected cache_stopped_nodes"),
    ("    max_workers: 1", "    max_worker: 1",
     "available_node_types.laptop-timing.max_worker: got max_worker, expected max_workers"),
    ("VolumeSize: 200", "VolumeSiz: 200",
     "available_node_types.head.node_config.BlockDeviceMappings[0].Ebs.VolumeSiz: got VolumeSiz, expected VolumeSize"),
    ("VolumeSize: 200", "VolumeSize: much",
     "available_node_types.head.node_config.BlockDeviceMappings[0].Ebs.VolumeSize: got 'much', expected integer"),
    ("head_node_type: head", "head_node_type: hea", "head_node_type: got hea, expected head"),
    ("max_workers: 4 ", "max_workers: many ", "max_workers: got 'many', expected a whole number"),
    ("  region: us-east-1", "  region: us-east-1\n  availability_zone: us-west-2a",
     "provider.availability_zone: got us-west-2a, expected a zone of us-east-1"),
    ("  region: us-east-1\n", "", "provider: got no region, which must be given"),
    ("head_node_type: head\n", "", "file: got no head_node_type, which must be given with available_node_types"),
    ("available_node_types:", "node_types:",
     "file: got no available_node_types: Ray would start machines of its own choice"),
    ("      InstanceType: m7i.large\n", "",
     "available_node_types.head.node_config: got no InstanceType, which must be given"),
    ("type: aws", "type: azure", "provider.type: got azure, expected one of aws, gcp: no more is checked"),
]  # fmt: skip
AWS_NUMBERS = [
    ("    min_workers: 0\n    max_workers: 4", "    min_workers: 3\n    max_workers: 2",
     f"{SPOT}.min_workers: got 3, expected no more than its max_workers, 2"),
    ("    min_workers: 0", "    min_workers: -1",
     f"{SPOT}.min_workers: got -1, expected 0 or more"),
    ("    min_workers: 0\n    max_workers: 4", "    min_workers: 5",
     "max_workers: got 4, expected 5 or more, the sum of all types' min_workers"),
    ("GPU: 1}", "GPU: 2}", f"{SPOT}.resources.GPU: got 2, but a g6.2xlarge has 1"),
    ("GPU: 1}", "GPU: 16}", f"{SPOT}.resources.GPU: got 16, but a g6.2xlarge has 1 (no type has "
     "more than 8: g5.48xlarge)"),
    ("{CPU: 8,", "{CPU: 9,", f"{SPOT}.resources.CPU: got 9, but a g6.2xlarge has 8"),
    ("{CPU: 4}", "{CPU: 8}", "available_node_types.laptop-timing.resources.CPU: got 8, but a c7i.2xlarge has 4"),
    ("InstanceType: c7i.2xlarge", "InstanceType: c7i.2xlage",
     "available_node_types.laptop-timing.node_config.InstanceType: got c7i.2xlage, expected c7i.2xlarge"),
    ("      InstanceType: c7i.2xlarge\n", "      InstanceType:\n",
     "available_node_types.laptop-timing.node_config.InstanceType: got None, expected string"),
]  # fmt: skip
AWS_SPOT = [
    ("MarketType: spot", "MarketType: spott",
     f"{MARKET}.MarketType: got spott, expected spot"),
    ("        MarketType: spot\n", "",
     f"{MARKET}.SpotOptions: got spot options without MarketType: spot next to them"),
    ("one-time", "persistent",
     f"{MARKET}.SpotOptions.SpotInstanceType: got persistent, "
     "expected one-time: AWS would restart machines that the autoscaler ended"),
    ("InstanceInterruptionBehavior: terminate", "InstanceInterruptionBehavior: stop",
     f"{MARKET}.SpotOptions.InstanceInterruptionBehavior: got stop, "
     "expected terminate, the only value that one-time allows"),
    ("{SpotInstanceType", "{BlockDurationMinutes: 60, SpotInstanceType",
     f"{MARKET}.SpotOptions.BlockDurationMinutes: got a duration: AWS no longer accepts one for spot machines"),
    ("{SpotInstanceType", "{MaxPrice: cheap, SpotInstanceType",
     f"{MARKET}.SpotOptions.MaxPrice: got cheap, expected dollars an "
     "hour, as in '0.50'"),
]  # fmt: skip
GCP_WRONG = [
    ("automaticRestart: false", "automaticRestart: true",
     f"{SPOT}.node_config.scheduling.automaticRestart: got true, expected false: a spot machine is not restarted"),
    ("        onHostMaintenance: TERMINATE", "        onHostMaintenance: MIGRATE",
     f"{SPOT}.node_config.scheduling.onHostMaintenance: got MIGRATE, expected TERMINATE: "
     "a spot machine cannot be moved"),
    ("provisioningModel: SPOT", "provisioningModel: SPOTS",
     f"{SPOT}.node_config.scheduling.provisioningModel: got SPOTS, expected SPOT"),
    ("        provisioningModel: SPOT\n", "",
     f"{SPOT}.node_config.scheduling.instanceTerminationAction: got an action for the end of spot "
     "without provisioningModel: SPOT"),
    ("true, onHostMaintenance: TERMINATE}", "true}",
     "available_node_types.gpu.node_config: got a machine with GPUs that may be moved, expected "
     "scheduling.onHostMaintenance: TERMINATE"),
    ("machineType: c3-standard-8", "machinType: c3-standard-8",
     "available_node_types.laptop-timing.node_config.machinType: got machinType, expected machineType"),
    ("project_id: my-project-1", "project_id: null",
     "provider: got no project_id, which must be given: Ray would choose one by itself"),
    ("GPU: 1, memory: ", "GPU: 1, memory: 9",
     f"{SPOT}.resources.memory: got 921646635171, but a g2-standard-8 has 34359738368"),
    ("GPU: 1,", "GPU: 2,", f"{SPOT}.resources.GPU: got 2, but a g2-standard-8 has 1"),
    (", GPU: 1,", ",", f"{SPOT}.resources: got no GPU, but a g2-standard-8 has 1: "
     "no task that needs one would start it"),
]  # fmt: skip
GPU_GROUP = "spec.workerGroupSpecs[0]"
CLUSTER_WRONG = [
    ("enableInTreeAutoscaling: true", "enableInTreeAutoScaling: true",
     "spec.enableInTreeAutoScaling: got enableInTreeAutoScaling, expected enableInTreeAutoscaling"),
    ("enableInTreeAutoscaling: true", "enableInTreeAutoscaling: false",
     "spec.autoscalerOptions: got options without enableInTreeAutoscaling: true: they do nothing"),
    (f'rayVersion: "{metadata.version("ray")}"', 'rayVersion: "2.9.0"',
     "spec.autoscalerOptions.version: got v2 with rayVersion 2.9.0, expected 2.10.0 or later"),
    ("mode: token", "mode: tokn", "spec.authOptions.mode: got tokn, expected token"),
    ("tolerations:", "toleration:",
     f"{GPU_GROUP}.template.spec.toleration: got toleration, expected tolerations"),
    ("effect: NoSchedule", "effect: NoShedule",
     f"{GPU_GROUP}.template.spec.tolerations[0].effect: got NoShedule, expected NoSchedule"),
    ("minReplicas: 0", "minReplicas: 9",
     f"{GPU_GROUP}.minReplicas: got 9, expected no more than its maxReplicas, 4"),
    ("replicas: 0", "replicas: 5", f"{GPU_GROUP}.replicas: got 5, expected 0 to 4, its minReplicas to maxReplicas"),
    ("rayStartParams: {}", 'rayStartParams: {num-gpus: "2"}',
     f"{GPU_GROUP}.rayStartParams.num-gpus: got 2, but the pod has 1 (nvidia.com/gpu under limits)"),
    ("nvidia.com/gpu: 1}", "nvidia.com/gpu: 2}",
     f"{GPU_GROUP}.template.spec.containers[0].resources.requests.nvidia.com/gpu: got 2, expected the number under "
     "limits, 1: Kubernetes refuses others"),
    ("tolerations:", "nodeSelector: {node.kubernetes.io/instance-type: m7i.large}\n          tolerations:",
     f"{GPU_GROUP}.template.spec.containers[0].resources.limits.nvidia.com/gpu: got 1, but a m7i.large has 0"),
    ('limits: {cpu: "6", memory: 24Gi, nvidia.com/gpu: 1}', "limits: {nvidia.com/gpu: 0.5}",
     f"{GPU_GROUP}.template.spec.containers[0].resources.limits.nvidia.com/gpu: got 0.5, expected a whole number: pods "
     "cannot share a GPU"),
    ("groupName: laptop-timing", "groupName: gpu", "spec.workerGroupSpecs: got 2 groups of the name gpu"),
    ("  name: slimfront\n", "  name: Slimfront\n",
     "metadata.name: got Slimfront, expected at most 52 of a-z, 0-9 and -, a letter first"),
    ("{name: study, mountPath", "{name: stud, mountPath",
     "spec.headGroupSpec.template.spec.containers[0].volumeMounts[0].name: got stud, which is none of the pod's "
     "volumes"),
    (f"image: slimfront:{metadata.version('slimfront')}", "image: rayproject/ray:2.9.0-py311",
     "spec.headGroupSpec.template.spec.containers[0].image: got Ray 2.9.0, expected "
     f"{metadata.version('ray')}, the rayVersion: Ray refuses others"),
    (f'rayVersion: "{metadata.version("ray")}"', 'rayVersion: "2.40.0"',
     "spec.authOptions.mode: got token with rayVersion 2.40.0, expected 2.52.0 or later"),
]  # fmt: skip
JOB_WRONG = [
    ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false",
     "spec.ttlSecondsAfterFinished: got a time to live, but no shutdownAfterJobFinishes: true; KubeRay refuses that"),
    ("submissionMode: K8sJobMode", "submissionMode: K8sJob",
     "spec.submissionMode: got K8sJob, expected K8sJobMode"),
    ("  entrypoint: slimfront search /home/ray/study/study.yaml\n", "",
     "spec: got no entrypoint, which must be given: the command to run"),
    ("  backoffLimit: 1", "  activeDeadlineSeconds: 0", "spec.activeDeadlineSeconds: got 0, expected 1 or more"),
    ("  name: slimfront\n", "  labels: {}\n", "metadata: got no name, which must be given"),
    ("  rayClusterSpec:", "  clusterSelector: {a: b}\n  rayClusterSpec:",
     "spec: expected either rayClusterSpec or clusterSelector"),
    ("  backoffLimit: 1", "  backoffLimits: 1", "spec.backoffLimits: got backoffLimits, expected backoffLimit"),
]  # fmt: skip


def cases() -> Iterator[tuple[str, Choices, str, str, str, str]]:
    wrongs = (AWS_TYPOS + AWS_NUMBERS + AWS_SPOT, GCP_WRONG, CLUSTER_WRONG, JOB_WRONG)
    for (template, choices, name), wrong in zip(SHIPPED, wrongs, strict=True):
        yield from ((template, choices, name, old, new, message) for old, new, message in wrong)


@pytest.mark.parametrize(("template", "choices", "name", "old", "new", "message"), [*cases()])
def test_each_problem_is_one_line(
    template: str, choices: Choices, name: str, old: str, new: str, message: str, tmp_path: Path
) -> None:
    path = changed(written(tmp_path, template, choices, name), old, new)
    problems = [line.text for line in check(path) if line.certain]
    assert [text.partition(" ")[2] for text in problems].count(message) == 1, problems


def test_a_launch_template_may_name_the_instance_type(tmp_path: Path) -> None:
    path = changed(
        written(tmp_path, *SHIPPED[0]),
        "InstanceType: m7i.large",
        "LaunchTemplate: {LaunchTemplateName: ours}",
    )
    assert check(path) == []


def test_kubernetes_may_be_left_to_choose_a_name(tmp_path: Path) -> None:
    assert (
        check(changed(written(tmp_path, *SHIPPED[3]), "  name: slimfront\n", "  generateName: slimfront-\n"))
        == []
    )


def test_gpus_are_attached_to_n1_types_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "gcp", Choices(gpu="T4", project="my-project-1"), "gcp.yaml")
    changed(path, "instance: n1-standard-8", "instance: n2-standard-8")
    (line,) = check(changed(path, "machineType: n1-standard-8", "machineType: n2-standard-8"))
    assert line.text.endswith(
        "guestAccelerators: got GPUs for n2-standard-8: only n1 types take attached GPUs"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("InstanceType: c7i.2xlarge", "InstanceType: c7i.4xlarge",
         "laptop-timing.labels.instance: got c7i.2xlarge, expected c7i.4xlarge: the node's price is found by it"),
        ("region: us-east-1}", "region: us-west-2}",
         "head.labels.region: got us-west-2, expected us-east-1: the node's price is found by it"),
    ],
)  # fmt: skip
def test_a_label_with_the_price_of_another_node_is_a_problem(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    (line,) = check(changed(written(tmp_path, *SHIPPED[0]), old, new))
    assert line.certain
    assert line.text.endswith(message)


def test_a_line_names_the_file_and_its_line(tmp_path: Path) -> None:
    path = changed(written(tmp_path, *SHIPPED[0]), "one-time", "persistent")
    assert [line.text.split(" ")[0] for line in check(path)] == [f"{path}:{line_of(path, 'persistent')}"]


def test_all_problems_are_reported_in_the_order_of_the_lines(tmp_path: Path) -> None:
    path = written(tmp_path, *SHIPPED[0])
    changed(changed(path, "GPU: 1}", "GPU: 3}"), "idle_timeout_minutes", "idle_minutes")
    changed(path, "CoreCount", "CoreCont")
    lines = [int(line.text.split(":")[1].split(" ")[0]) for line in check(path)]
    assert lines == sorted(line_of(path, text) for text in ("GPU: 3}", "idle_minutes", "CoreCont"))


def test_a_problem_of_an_alias_is_reported_once_at_its_anchor(tmp_path: Path) -> None:
    path = changed(written(tmp_path, *SHIPPED[0]), "VolumeType: gp3", "VolumeType: gp33")
    (line,) = check(path)
    assert line.text.startswith(f"{path}:{line_of(path, 'gp33')} available_node_types.head.")


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("aws.yaml", "c7i.2xlarge", "c9i.2xlarge", "does not have (or is it c"),
        ("gcp.yaml", "c3-standard-8", "c3-highcpu-8", "does not have"),
        ("gcp.yaml", "resources: {CPU: 4, memory: 21646635171}", "resources: {CPU: 4}", "got no memory, in bytes"),
        ("aws.yaml", "c7i.2xlarge", "hpc7g.4xlarge", "its resources are not in the table of"),
        ("aws.yaml", "    - --env RAY_AUTH_MODE=token\n", "", "reaches the head may run programs on the cluster"),
        ("aws.yaml", "max_workers: 4  ", "max_workers: 3  ", "but all types together may have 3"),
        ("aws.yaml", "      MetadataOptions", "      InstanceMarketOptions: {MarketType: spot}\n      MetadataOptions",
         "a head that the cloud may take back at any time"),
        ("raycluster.yaml", "mode: token", "mode: disabled", "reaches the head may run programs on the cluster"),
        ("raycluster.yaml", "kind: RayCluster", "kind: RayService", "not checked"),
        ("raycluster.yaml", "apiVersion: ray.io/v1", "apiVersion: v1", "got v1: only ray.io/v1 is checked"),
        ("rayjob.yaml", "  shutdownAfterJobFinishes: true\n  ttlSecondsAfterFinished: 600\n", "", "would stay"),
    ],
)  # fmt: skip
def test_an_uncertain_problem_is_a_warning(
    name: str, old: str, new: str, message: str, tmp_path: Path
) -> None:
    template, choices, _ = next(shipped for shipped in SHIPPED if shipped[2] == name)
    path = changed(written(tmp_path, template, choices, name), old, new)
    if old not in new and old in path.read_text():  # a label contains the type too
        changed(path, old, new)
    lines = check(path)
    assert lines
    assert all(message in line.text and not line.certain for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", ":1 got expected ',' or ']'"),
        ("", " got nothing, expected a template"),
        ("- 1", ":1 got list, expected keys with values"),
        ("name: quickstart\nmodel: x", ":1 got neither a file of Ray's launcher"),
        ("cluster_name: x\non: 1", ":2 got 'on' as a key, expected text: put it in quotes"),
        ("cluster_name: {{ name }}", ":1 got a structure as a key"),
        ("cluster_name: &a\n  b: *a", ":1 got an alias of a value that contains it"),
        ("a: &a [1,2,3,4,5,6,7,8,9]\n" + "".join(
            f"{n}: &{n} [{', '.join([f'*{b}'] * 9)}]\n" for b, n in zip("abcdef", "bcdefg", strict=True)
        ), " got more than 100000 keys: aliases multiply them"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_template_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        check(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


def test_a_key_that_is_given_twice_is_reported(tmp_path: Path) -> None:
    path = changed(
        written(tmp_path, *SHIPPED[0]), "resources: {CPU: 0}", "resources: {CPU: 0}\n    resources: {CPU: 1}"
    )
    assert [line.text for line in check(path)] == [
        f"{path}:{line_of(path, '{CPU: 1}')} available_node_types.head.resources: is given twice"
    ]


@pytest.mark.parametrize(("template", "choices", "name"), SHIPPED)
def test_any_value_at_any_key_is_reported_without_an_exception(
    template: str, choices: Choices, name: str, tmp_path: Path
) -> None:
    path = written(tmp_path, template, choices, name)
    (document,) = documents(path)
    for key in document.lines.keys() - {()}:
        for value in (None, 7, -1, "x", [], [None], {}, {"a": 1}, True):
            data = copy.deepcopy(document.data)
            inside: Any = data
            for part in key[:-1]:
                inside = inside[part]
            inside[key[-1]] = value
            with suppress(ValueError):  # neither Ray's nor KubeRay's any more
                problems = problems_of(path, Document(data, document.lines, ()))
                assert all(document.line(problem.key) for problem in problems)


def test_kuberays_schema_is_closed_everywhere() -> None:
    def objects(schema: Any) -> Iterator[dict[str, Any]]:
        if isinstance(schema, dict):
            if "properties" in schema:
                yield schema
            for value in schema.values():
                yield from objects(value)

    schemas = list(objects(kuberay.schema("RayJob")))
    assert len(schemas) > 20
    assert all(schema["additionalProperties"] is False for schema in schemas)


def test_the_table_has_the_resources_of_a_machine_type() -> None:
    aws, gcp = table("aws"), table("gcp")
    assert (aws.types["g5.12xlarge"].gpus, aws.types["g5.12xlarge"].gpu) == (4, "A10G")
    assert (gcp.types["a2-highgpu-2g"].cpus, gcp.types["a2-highgpu-2g"].gpus) == (24, 2)
    assert gcp.most_gpus == "a2-megagpu-16g"
    assert aws.as_of == "2026-11-23"


def test_the_image_has_the_versions_of_this_machine(tmp_path: Path) -> None:
    contents = filling.fill("kuberay", Choices())
    assert f"FROM python:{platform.python_version()}-slim" in contents["Dockerfile"]
    lines = contents["constraints.txt"].splitlines()
    assert f"ray=={metadata.version('ray')}" in lines
    assert f"torch=={metadata.version('torch').partition('+')[0]}" in lines
    assert f'rayVersion: "{metadata.version("ray")}"' in contents["rayjob.yaml"]


def test_the_file_contains_the_choices() -> None:
    choices = Choices(
        "team", "registry.example.org/team/slimfront:2", 9, "europe-west4", "europe-west4-b", "my-project-1"
    )
    content = yaml.safe_load(filling.fill("gcp", choices)["gcp.yaml"])
    assert content["cluster_name"] == "team"
    assert content["docker"]["image"] == "registry.example.org/team/slimfront:2"
    assert content["max_workers"] == 9
    assert content["provider"] == {
        "type": "gcp", "region": "europe-west4", "availability_zone": "europe-west4-b", "project_id": "my-project-1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("template", "choices", "message"),
    [
        ("azure", Choices(), "template: got azure, expected one of aws, gcp, kuberay"),
        ("aws", Choices(name="My Cluster"), "name: got My Cluster, expected a letter and up to 29 of a-z, 0-9 and -"),
        ("aws", Choices(image='x"\ny: 1'), "image: got x"),
        ("aws", Choices(max_workers=0), "max_workers: got 0, expected 1 or more"),
        ("aws", Choices(gpu="L5"), "gpu: got L5, expected one of A100, A10G, H100, L4, L40S, T4"),
        ("aws", Choices(region="US"), "region: got US, expected a region, as in us-east-1 or us-central1"),
        ("gcp", Choices(), "project: got nothing, expected the id of a project of Google Cloud"),
        ("gcp", Choices(project="my-project-1", zone="us-east1-b"), "zone: got us-east1-b, expected a zone of us-c"),
        ("kuberay", Choices(gpu="L4"), "gpu: got L4, which does not apply to kuberay"),
    ],
)  # fmt: skip
def test_a_wrong_choice_is_refused(template: str, choices: Choices, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        filling.fill(template, choices)
    assert str(caught.value).startswith(message)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("mine")
    with pytest.raises(FileExistsError, match="Dockerfile would be overwritten"):
        filling.write(filling.fill("aws", Choices()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["Dockerfile"]


RAY_SAYS = """
import sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
for name in sys.argv[1:]:
    config = prepare_config(yaml.safe_load(open(name)))
    validate_config(config)
    print(config["cluster_name"], *config["available_node_types"])
"""


@pytest.mark.ray
def test_ray_accepts_the_files(tmp_path: Path) -> None:
    paths = [written(tmp_path / name, template, choices, name) for template, choices, name in SHIPPED[:2]]
    done = subprocess.run(
        [sys.executable, "-c", RAY_SAYS, *map(str, paths)], capture_output=True, text=True, check=False,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["slimfront head gpu-spot gpu laptop-timing"] * 2


LAUNCHED = """
import sys, boto3, yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config
with mock_aws():
    boto3.client("iam").create_instance_profile(InstanceProfileName="slimfront")
    config = bootstrap_aws(prepare_config(yaml.safe_load(open(sys.argv[1]))))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, node_type in config["available_node_types"].items():
        provider.create_node(node_type["node_config"], {"ray-user-node-type": name}, 1)
    for reservation in boto3.client("ec2").describe_instances()["Reservations"]:
        for instance in reservation["Instances"]:
            print("started", instance["InstanceType"], instance.get("InstanceLifecycle", "on-demand"))
"""


@pytest.mark.ray
def test_ec2_starts_each_node_type(tmp_path: Path) -> None:
    pytest.importorskip("moto")
    path = written(tmp_path / "cluster", *SHIPPED[0])
    (tmp_path / ".ssh").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHED, str(path)], capture_output=True, text=True, check=False,
        env={
            **os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path), "MOTO_IAM_LOAD_MANAGED_POLICIES": "true",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    started = sorted(line for line in done.stdout.splitlines() if line.startswith("started"))
    assert started == [
        "started c7i.2xlarge on-demand", "started g6.2xlarge on-demand", "started g6.2xlarge spot",
        "started m7i.large on-demand",
    ]  # fmt: skip
