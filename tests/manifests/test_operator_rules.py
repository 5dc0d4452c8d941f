"""KubeRay's own rules hold in every overlay, and each of them is able to fail."""

import copy
from functools import reduce
from typing import Any

import pytest

from tests.manifests.operator_rules import RULES
from tests.manifests.rendering import JSON, REPO, Manifests, clusters

CLUSTER = "spec.rayClusterConfig"
HEAD = f"{CLUSTER}.headGroupSpec"
WORKERS = f"{CLUSTER}.workerGroupSpecs.0"
UPGRADE = "spec.upgradeStrategy"

BROKEN: list[tuple[str, str, str, Any]] = [
    ("name_is_short", "RayService", "metadata.name", "e" * 48),
    ("name_is_short", "RayJob", "metadata.name", "errata.train"),
    ("serve_config_is_a_string_of_yaml", "RayService", "spec.serveConfigV2", ""),
    ("serve_config_is_a_string_of_yaml", "RayService", "spec.serveConfigV2", {"applications": [1]}),
    ("incremental_upgrade_is_complete", "RayService", UPGRADE, {"type": "Recreate"}),
    ("incremental_upgrade_is_complete", "RayService", f"{CLUSTER}.enableInTreeAutoscaling", False),
    (
        "incremental_upgrade_is_complete",
        "RayService",
        f"{UPGRADE}.clusterUpgradeOptions.gatewayClassName",
        "",
    ),
    (
        "incremental_upgrade_is_complete",
        "RayService",
        f"{UPGRADE}.clusterUpgradeOptions.stepSizePercent",
        101,
    ),
    (
        "incremental_upgrade_is_complete",
        "RayService",
        f"{UPGRADE}.clusterUpgradeOptions.intervalSeconds",
        0,
    ),
    (
        "redis_is_named_in_one_place",
        "RayService",
        "metadata.annotations",
        {"ray.io/ft-enabled": "true"},
    ),
    (
        "redis_is_named_in_one_place",
        "RayService",
        f"{HEAD}.template.spec.containers.0.env",
        [{"name": "REDIS_PASSWORD"}],
    ),
    (
        "redis_is_named_in_one_place",
        "RayService",
        f"{HEAD}.template.spec.containers.0.env",
        [{"name": "RAY_REDIS_ADDRESS"}],
    ),
    ("redis_is_named_in_one_place", "RayService", f"{HEAD}.rayStartParams.redis-password", "p"),
    (
        "redis_is_named_in_one_place",
        "RayService",
        f"{CLUSTER}.gcsFaultToleranceOptions.storage",
        {},
    ),
    ("replicas_are_bounded", "RayService", f"{WORKERS}.minReplicas", None),
    ("replicas_are_bounded", "RayService", f"{WORKERS}.maxReplicas", 0),
    (
        "autoscaled_pods_are_not_restarted",
        "RayService",
        f"{WORKERS}.template.spec.restartPolicy",
        "Always",
    ),
    (
        "autoscaled_pods_are_not_restarted",
        "RayService",
        f"{HEAD}.template.spec.containers.0.env",
        [{"name": "RAY_enable_autoscaler_v2"}],
    ),
    ("labels_are_not_parameters", "RayService", f"{WORKERS}.rayStartParams.labels", "a=b"),
    ("resources_are_named_in_one_place", "RayService", f"{HEAD}.resources", {"CPU": "1"}),
    ("head_runs_nothing", "RayService", f"{HEAD}.rayStartParams", {}),
    ("head_runs_nothing", "RayJob", "spec.rayClusterSpec.headGroupSpec.rayStartParams", {}),
    (
        "names_and_upgrades_are_the_operators",
        "RayService",
        f"{HEAD}.headService",
        {"metadata": {"name": "errata-head"}},
    ),
    (
        "names_and_upgrades_are_the_operators",
        "RayService",
        f"{CLUSTER}.upgradeStrategy",
        {"type": "Recreate"},
    ),
    ("job_is_deleted_as_it_says", "RayJob", "spec.shutdownAfterJobFinishes", False),
    ("job_is_deleted_as_it_says", "RayJob", "spec.deletionStrategy", {"deletionRules": []}),
    ("job_is_deleted_as_it_says", "RayJob", "spec.activeDeadlineSeconds", 0),
    ("job_is_deleted_as_it_says", "RayJob", "spec.backoffLimit", -1),
    ("job_has_a_cluster_of_its_own", "RayJob", "spec.clusterSelector", {"ray.io/cluster": "e"}),
    ("job_has_a_cluster_of_its_own", "RayJob", "spec.submissionMode", "InteractiveMode"),
    ("token_fits_the_version", "RayService", f"{CLUSTER}.authOptions", {"mode": "disabled"}),
    ("token_fits_the_version", "RayService", f"{CLUSTER}.authOptions.enableK8sTokenAuth", True),
    ("token_fits_the_version", "RayService", f"{CLUSTER}.rayVersion", "2.51.1"),
    ("nothing_is_behind_a_gate", "RayService", f"{CLUSTER}.tlsOptions", {"enabled": True}),
    ("nothing_is_behind_a_gate", "RayService", f"{WORKERS}.suspend", True),
    (
        "initializing_timeout_is_a_duration",
        "RayService",
        "metadata.annotations",
        {"ray.io/initializing-timeout": "soon"},
    ),
    (
        "ray_is_the_first_container",
        "RayService",
        f"{WORKERS}.template.spec.containers.0.name",
        "errata",
    ),
]


def step(place: Any, key: str) -> Any:
    return place[int(key)] if isinstance(place, list) else place[key]


def with_value(document: JSON, path: str, value: Any) -> JSON:
    changed = copy.deepcopy(document)
    *parents, last = path.split(".")
    reduce(step, parents, changed)[last] = value
    return changed


@pytest.mark.parametrize("name", RULES)
def test_rule_holds(manifests: Manifests, name: str) -> None:
    for document in (*manifests.of("RayService"), *manifests.of("RayJob")):
        assert list(RULES[name](document)) == []


@pytest.mark.parametrize(("name", "kind", "path", "value"), BROKEN)
def test_rule_is_able_to_fail(
    incremental: Manifests, name: str, kind: str, path: str, value: Any
) -> None:
    [document] = incremental.of(kind)
    assert list(RULES[name](document)) == []
    assert list(RULES[name](with_value(document, path, value)))


def test_each_rule_is_seen_to_fail() -> None:
    assert {name for name, *_ in BROKEN} == set(RULES)


def test_ray_is_the_version_of_the_constraints(manifests: Manifests) -> None:
    pinned = (REPO / "constraints.txt").read_text().splitlines()
    for document in (*manifests.of("RayService"), *manifests.of("RayJob")):
        for cluster in clusters(document):
            assert f"ray=={cluster['rayVersion']}" in pinned


def test_clients_of_an_incremental_upgrade_come_by_the_gateway(manifests: Manifests) -> None:
    [service] = manifests.of("RayService")
    incremental = "Incremental" in service["spec"]["upgradeStrategy"]["type"]
    for ingress in manifests.of("Ingress"):
        [rule] = ingress["spec"]["rules"]
        [path] = rule["http"]["paths"]
        assert ("gateway" in path["backend"]["service"]["name"]) == incremental


def test_budgets_are_such_as_kubernetes_understands_for_ray_pods(manifests: Manifests) -> None:
    """Without a scale subresource only a whole number of `minAvailable` works."""
    for budget in manifests.of("PodDisruptionBudget"):
        assert isinstance(budget["spec"]["minAvailable"], int)
        assert "maxUnavailable" not in budget["spec"]
