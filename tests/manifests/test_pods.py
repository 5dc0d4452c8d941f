"""How every pod runs: without privileges, within bounds, probed, and ended with time to drain."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.manifests.rendering import JSON, REPO, Manifests, Pod

CONTAINER = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
DRAIN_S = 30
"""How long Serve lets a replica end what it has: `DRAIN_S` of service/replica/deployment.py."""
DRAIN_TIMEOUT = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
TOKENS = {"RayService errata, group headgroup", "CronJob errata-train"}
"""Which pods may mount their ServiceAccount's token: an autoscaler's head, what starts jobs."""


def all_pods(manifests: Manifests) -> list[Pod]:
    pods = list(manifests.pods())
    assert len(pods) >= 6
    return pods


def test_no_pod_has_privileges(manifests: Manifests) -> None:
    for pod in all_pods(manifests):
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"], pod.owner
        assert context["runAsUser"] > 0, pod.owner
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, pod.owner
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys(), pod.owner
        for container in pod.containers:
            assert container["securityContext"] == CONTAINER, (pod.owner, container["name"])


def test_containers_of_our_image_run_as_its_user(manifests: Manifests) -> None:
    for pod in all_pods(manifests):
        if any("errata:" in container["image"] for container in pod.containers):
            context = pod.spec["securityContext"]
            assert (context["runAsUser"], context["runAsGroup"]) == (1000, 100), pod.owner


def test_tokens_are_mounted_only_where_kubernetes_is_asked(manifests: Manifests) -> None:
    [service] = manifests.of("RayService")
    autoscaled = service["spec"]["rayClusterConfig"].get("enableInTreeAutoscaling", False)
    for pod in all_pods(manifests):
        mounted = pod.spec.get("automountServiceAccountToken", True)
        assert not mounted or pod.owner in TOKENS, pod.owner
        if "headgroup" in pod.owner and "RayService" in pod.owner:
            assert mounted == autoscaled


def test_services_are_no_environment_variables(manifests: Manifests) -> None:
    """A service `errata` would set ERRATA_PORT, which is a setting."""
    for pod in all_pods(manifests):
        assert pod.spec["enableServiceLinks"] is False, pod.owner


def test_resources_are_requested_and_limited(manifests: Manifests) -> None:
    for pod in all_pods(manifests):
        for container in pod.containers:
            requests, limits = (container["resources"][kind] for kind in ("requests", "limits"))
            assert {"cpu", "memory"} <= requests.keys(), pod.owner
            assert requests.keys() == limits.keys(), pod.owner
            for name in requests:
                assert amount(requests[name]) <= amount(limits[name]), (pod.owner, name)


def test_memory_volumes_fit_into_the_container(manifests: Manifests) -> None:
    for pod in all_pods(manifests):
        limit = sum(amount(c["resources"]["limits"]["memory"]) for c in pod.spec["containers"])
        for volume in pod.spec.get("volumes", []):
            if (volume.get("emptyDir") or {}).get("medium") == "Memory":
                assert amount(volume["emptyDir"]["sizeLimit"]) <= limit / 2, pod.owner


def amount(quantity: str) -> float:
    factors = {"m": 0.001, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    for suffix, factor in factors.items():
        if quantity.endswith(suffix):
            return float(quantity.removesuffix(suffix)) * factor
    return float(quantity)


@pytest.mark.parametrize(
    ("quantity", "bytes_or_cores"), [("500m", 0.5), ("2", 2), ("1Gi", 2**30), ("256Mi", 2**28)]
)
def test_quantities(quantity: str, bytes_or_cores: float) -> None:
    assert amount(quantity) == bytes_or_cores


def test_servers_are_probed(manifests: Manifests) -> None:
    """Ray's pods by KubeRay, which leaves probes that are set alone, and knows Serve's proxy."""
    for pod in all_pods(manifests):
        [container, *_] = pod.spec["containers"]
        probes = {probe for probe in container if probe.endswith("Probe")}
        if pod.owner.startswith("StatefulSet"):
            assert {"readinessProbe", "livenessProbe"} <= probes, pod.owner
        else:
            assert not probes, pod.owner


def test_a_ray_pod_has_the_time_to_drain(manifests: Manifests) -> None:
    """On SIGTERM, Serve starts its replicas elsewhere, and lets those here end what they have."""
    assert f"\nDRAIN_S = {DRAIN_S}.0\n" in (REPO / "service/replica/deployment.py").read_text()
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    assert (
        DRAIN_TIMEOUT
        in Path(ray.origin).with_name("_private").joinpath("ray_constants.py").read_text()
    )
    drains = float(manifests.settings[DRAIN_TIMEOUT])
    assert drains >= 2 * DRAIN_S
    for pod in all_pods(manifests):
        if pod.owner.startswith("Ray"):
            assert pod.spec["terminationGracePeriodSeconds"] >= drains + DRAIN_S, pod.owner
    [service] = manifests.of("RayService")
    assert service["spec"]["rayClusterDeletionDelaySeconds"] >= DRAIN_S


def written(pod: Pod, container: JSON) -> set[str]:
    return {
        mount["mountPath"]
        for mount in container.get("volumeMounts", [])
        if not mount.get("readOnly", False)
    }


def test_what_is_written_is_on_a_volume(manifests: Manifests) -> None:
    for pod in all_pods(manifests):
        if pod.owner.startswith("Ray"):
            [ray] = pod.spec["containers"]
            assert {"/tmp", "/dev/shm", manifests.settings["ERRATA_DATA_DIR"]} <= written(pod, ray)


def test_gpu_pods_are_as_the_settings_count_on(manifests: Manifests) -> None:
    """Each replica and each rank finds a GPU, and the head is asked for none."""
    gpus = manifests.settings.get("ERRATA_REPLICA_GPUS", "0")
    ranks = int(manifests.settings["ERRATA_TRAIN_WORKERS"])
    [service], [job] = manifests.of("RayService"), manifests.of("RayJob")
    replicas = int(manifests.settings.get("ERRATA_REPLICAS_MAX", "0"))
    by_group = {g["groupName"]: g for g in workers(service["spec"]["rayClusterConfig"])}
    [train] = workers(job["spec"]["rayClusterSpec"])
    if gpus == "0":
        assert not any("nvidia.com/gpu" in limits(group) for group in (*by_group.values(), train))
        assert float(limits(train)["cpu"]) >= ranks
    else:
        assert limits(by_group["gpu"])["nvidia.com/gpu"] == "1"
        assert by_group["gpu"]["maxReplicas"] >= replicas
        # Nor is anything else placed there, which belongs on workers.
        reserved = by_group["gpu"]["rayStartParams"]["num-cpus"]
        assert reserved == manifests.settings["ERRATA_REPLICA_CPUS"]
        assert train["replicas"] * int(limits(train)["nvidia.com/gpu"]) == ranks


def test_what_waits_for_nodes_gives_up_with_a_message(manifests: Manifests) -> None:
    """The RayJob by KubeRay; the service by itself, which KubeRay must not cut short."""
    [service], [job] = manifests.of("RayService"), manifests.of("RayJob")
    assert 0 < job["spec"]["preRunningDeadlineSeconds"] < job["spec"]["activeDeadlineSeconds"]
    assert "ray.io/initializing-timeout" not in service["metadata"].get("annotations", {})
    [starter] = [d for d in manifests.of("CronJob") if d["metadata"]["name"] == "errata-train"]
    limit = starter["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    assert limit > job["spec"]["activeDeadlineSeconds"]


def workers(cluster: JSON) -> list[JSON]:
    return list(cluster["workerGroupSpecs"])


def limits(group: JSON) -> dict[str, Any]:
    return dict(group["template"]["spec"]["containers"][0]["resources"]["limits"])


def test_apis_are_spread_over_zones(prod: Manifests) -> None:
    [service] = prod.of("RayService")
    for group in workers(service["spec"]["rayClusterConfig"]):
        [constraint] = group["template"]["spec"]["topologySpreadConstraints"]
        labels = group["template"]["metadata"]["labels"]
        assert constraint["topologyKey"] == "topology.kubernetes.io/zone"
        assert constraint["labelSelector"]["matchLabels"].items() <= labels.items()
    # Each Api, and the coordinator, finds its CPUs on workers: the head has none to give.
    cpus = sum(float(limits(g)["cpu"]) * g["minReplicas"] for g in workers_of(service, "workers"))
    actors = int(prod.settings["ERRATA_API_REPLICAS"]) + 1
    assert actors * float(prod.settings["ERRATA_API_CPUS"]) <= cpus


def workers_of(service: JSON, name: str) -> list[JSON]:
    groups = workers(service["spec"]["rayClusterConfig"])
    return [group for group in groups if group["groupName"] == name]
