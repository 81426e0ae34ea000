"""The KubeRay manifests, checked by field, as pods, and by what Ray's autoscaler makes of them."""

from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import validate_config

from tests.cluster.files import CLUSTER, GROUPS, MANIFESTS, ROOT, read

FIELDS = yaml.safe_load((ROOT / "tests/cluster/kuberay_fields.yaml").read_text(encoding="utf-8"))
KUBERNETES = "1.37"


def check(manifest: dict[str, Any]) -> None:
    """Raise ValidationError for a field that KubeRay, or Kubernetes in a pod, does not have."""
    jsonschema.validate(manifest, {**FIELDS[manifest["kind"]], "definitions": FIELDS["definitions"]})
    for group in groups(manifest):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(manifest)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_field_is_known(name: str) -> None:
    check(read(name))


@pytest.mark.parametrize("place", ["spec", "group", "pod"])
def test_a_misspelt_field_is_found(place: str) -> None:
    manifest = read(MANIFESTS[1])
    group = groups(manifest)[1]
    {"spec": manifest["spec"], "group": group, "pod": group["template"]["spec"]}[place]["maxReplica"] = 1
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError), match="maxReplica"):
        check(manifest)


def test_the_autoscaler_reads_the_groups_as_they_are_meant() -> None:
    manifest = read("kuberay/raycluster.yaml")
    manifest["metadata"]["namespace"] = "default"
    config = _derive_autoscaling_config_from_ray_cr(manifest)
    validate_config(config)
    types = config["available_node_types"]
    found = {name: (node["labels"]["group"], node["resources"].get("GPU", 0)) for name, node in types.items()}
    head = config["head_node_type"]
    assert found == {
        head: ("head", 0),
        "reading": ("reading", 0),
        "generation": ("generation", 1),
        "training": ("training", 8),
    }
    assert types[head]["resources"]["CPU"] == 0
    assert types["reading"]["priority"] > types["generation"].get("priority", 0)
    assert {node["labels"]["group"] for node in types.values()} == GROUPS
    assert all(types[name]["min_workers"] == 0 and types[name]["max_workers"] for name in found if name != head)


def test_the_job_runs_on_the_cluster_of_the_other_file_and_ends_by_itself() -> None:
    job, cluster = read("kuberay/rayjob.yaml"), read("kuberay/raycluster.yaml")
    assert cluster_of(job) == cluster["spec"]
    assert job["spec"]["shutdownAfterJobFinishes"] and job["spec"]["activeDeadlineSeconds"]
    tries = (job["spec"]["backoffLimit"], job["spec"]["submitterConfig"]["backoffLimit"])
    assert tries == (0, 0), "KubeRay tries again whatever failed, so a mistake would start another cluster"
    assert {label.split("/")[0] for label in job["metadata"]["labels"]} == {"kueue.x-k8s.io"}


def test_spot_machines_generate_and_read_and_do_not_train() -> None:
    tolerant = {
        group.get("groupName")
        for group in groups(read("kuberay/raycluster.yaml"))
        if any("spot" in toleration["key"] for toleration in group["template"]["spec"].get("tolerations", ()))
    }
    assert tolerant == {"reading", "generation"}


def test_nothing_runs_as_root() -> None:
    for name in MANIFESTS:
        for group in groups(read(name)):
            context = group["template"]["spec"]["securityContext"]
            assert context["runAsNonRoot"] and context["runAsUser"] == 1000, "the user of the Dockerfile"
    dockerfile = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    assert "useradd --create-home --uid 1000 ray\nUSER ray\n" in dockerfile


def test_nothing_is_seen_from_outside_kubernetes() -> None:
    for name in MANIFESTS:
        cluster = cluster_of(read(name))
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
        assert not cluster["headGroupSpec"].get("enableIngress")
        assert cluster["authOptions"] == {"mode": "token"}
        assert "hostPort" not in (CLUSTER / name).read_text(encoding="utf-8")
