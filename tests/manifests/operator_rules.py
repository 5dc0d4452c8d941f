"""What KubeRay v1.7.0 demands of a RayService or RayJob beyond its schema.

It refuses the object, or something does not work, if a rule is broken. Each rule gives a message
for every offence it finds in one document. Features behind a gate are refused as a whole.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from tests.manifests.rendering import JSON, clusters, groups

Rule = Callable[[JSON], Iterator[str]]
RULES: dict[str, Rule] = {}

LONGEST = {"RayService": 47, "RayJob": 47}
GATED = ("networkPolicy", "tlsOptions", "historyServerOptions")
RAY_RESOURCES = {"num-cpus", "num-gpus", "memory", "resources"}


def rule(check: Rule) -> Rule:
    RULES[check.__name__] = check
    return check


def environment(group: JSON) -> set[str]:
    [ray, *_] = group["template"]["spec"]["containers"]
    return {variable["name"] for variable in ray.get("env", [])}


def each_group(document: JSON) -> Iterator[tuple[str, JSON]]:
    for cluster in clusters(document):
        yield from groups(cluster)


@rule
def name_is_short(document: JSON) -> Iterator[str]:
    name = document["metadata"]["name"]
    if len(name) > LONGEST[document["kind"]]:
        yield f"{name} has more than {LONGEST[document['kind']]} characters"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"{name} is no DNS label"


@rule
def serve_config_is_a_string_of_yaml(document: JSON) -> Iterator[str]:
    if document["kind"] == "RayService":
        config: Any = document["spec"].get("serveConfigV2")
        parsed = yaml.safe_load(config) if isinstance(config, str) else None
        if not isinstance(parsed, dict) or not parsed.get("applications"):
            yield "serveConfigV2 has no applications"


@rule
def incremental_upgrade_is_complete(document: JSON) -> Iterator[str]:
    strategy = document["spec"].get("upgradeStrategy", {})
    if document["kind"] != "RayService" or strategy.get("type") in (None, "None", "NewCluster"):
        return
    if strategy["type"] != "NewClusterWithIncrementalUpgrade":
        yield f"{strategy['type']} is no upgrade strategy of a RayService"
    if not document["spec"]["rayClusterConfig"].get("enableInTreeAutoscaling"):
        yield "an incremental upgrade needs enableInTreeAutoscaling"
    options = strategy.get("clusterUpgradeOptions", {})
    if not options.get("gatewayClassName"):
        yield "an incremental upgrade needs a gatewayClassName"
    for percent in ("stepSizePercent", "maxSurgePercent"):
        if not 0 <= options.get(percent, 100) <= 100:
            yield f"{percent} is not between 0 and 100"
    if options.get("intervalSeconds", 0) <= 0:
        yield "intervalSeconds is not above 0"


@rule
def redis_is_named_in_one_place(document: JSON) -> Iterator[str]:
    annotations = document["metadata"].get("annotations", {})
    for cluster in clusters(document):
        head = cluster["headGroupSpec"]
        managed = environment(head) & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "REDIS_USERNAME"}
        params = head["rayStartParams"].keys() & {"redis-password", "redis-username"}
        noted = annotations.keys() & {"ray.io/ft-enabled", "ray.io/external-storage-namespace"}
        for name in sorted(managed | params | noted):
            yield f"{name} is for gcsFaultToleranceOptions to set"
        if "storage" in cluster.get("gcsFaultToleranceOptions", {}):
            yield "gcsFaultToleranceOptions.storage is not for redis"


@rule
def replicas_are_bounded(document: JSON) -> Iterator[str]:
    for name, group in each_group(document):
        if name == "headgroup":
            continue
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        if least is None or most is None:
            yield f"{name} lacks minReplicas or maxReplicas"
        elif not 0 <= least <= group.get("replicas", least) <= most:
            yield f"{name} has replicas outside of {least} to {most}"


@rule
def autoscaled_pods_are_not_restarted(document: JSON) -> Iterator[str]:
    for cluster in clusters(document):
        for name, group in groups(cluster):
            policy = group["template"]["spec"].get("restartPolicy", "Never")
            if cluster.get("enableInTreeAutoscaling") and policy != "Never":
                yield f"{name} has restartPolicy {policy}, its autoscaler is v2"
            if "RAY_enable_autoscaler_v2" in environment(group):
                yield f"{name}: autoscalerOptions.version says which autoscaler it is"


@rule
def labels_are_not_parameters(document: JSON) -> Iterator[str]:
    for name, group in each_group(document):
        if "labels" in group["rayStartParams"]:
            yield f"{name} has labels in rayStartParams"


@rule
def resources_are_named_in_one_place(document: JSON) -> Iterator[str]:
    for name, group in each_group(document):
        if group.get("resources") and group["rayStartParams"].keys() & RAY_RESOURCES:
            yield f"{name} has resources in rayStartParams too"


@rule
def head_runs_nothing(document: JSON) -> Iterator[str]:
    for cluster in clusters(document):
        if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
            yield 'the head has CPUs to run actors on: num-cpus is not "0"'


@rule
def names_and_upgrades_are_the_operators(document: JSON) -> Iterator[str]:
    for cluster in clusters(document):
        service = cluster["headGroupSpec"].get("headService", {})
        if service.get("metadata", {}).get("name"):
            yield "headService.metadata.name is set"
        if "upgradeStrategy" in cluster:
            yield "the RayCluster has an upgradeStrategy of its own"


@rule
def job_is_deleted_as_it_says(document: JSON) -> Iterator[str]:
    spec = document["spec"]
    if document["kind"] != "RayJob":
        return
    if not spec.get("shutdownAfterJobFinishes"):
        for field in ("suspend", "ttlSecondsAfterFinished"):
            if spec.get(field):
                yield f"{field} needs shutdownAfterJobFinishes"
    if "deletionStrategy" in spec:
        yield "deletionStrategy is behind a feature gate"
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(field, 1) <= 0:
            yield f"{field} is not above 0"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit is below 0"


@rule
def job_has_a_cluster_of_its_own(document: JSON) -> Iterator[str]:
    """A RayService's cluster has another name after each upgrade."""
    spec = document["spec"]
    if document["kind"] == "RayJob":
        if spec.get("clusterSelector"):
            yield "clusterSelector excludes suspend, backoffLimit and SidecarMode"
        mode = spec.get("submissionMode", "K8sJobMode")
        if mode == "InteractiveMode" and spec.get("backoffLimit"):
            yield "InteractiveMode excludes backoffLimit"
        if mode == "SidecarMode" and "submitterPodTemplate" in spec:
            yield "SidecarMode excludes submitterPodTemplate"


@rule
def token_fits_the_version(document: JSON) -> Iterator[str]:
    for cluster in clusters(document):
        options = cluster.get("authOptions", {})
        if options.get("mode") != "token":
            yield "Ray's ports ask for no token"
        if options.get("enableK8sTokenAuth"):
            yield "enableK8sTokenAuth is for RayClusters only"
        version = tuple(map(int, cluster.get("rayVersion", "0").split(".")))
        if version < (2, 52):
            yield "a token needs a rayVersion of at least 2.52.0"


@rule
def nothing_is_behind_a_gate(document: JSON) -> Iterator[str]:
    for cluster in clusters(document):
        for field in GATED:
            if field in cluster:
                yield f"{field} is behind a feature gate"
        for name, group in groups(cluster):
            if group.get("suspend"):
                yield f"{name} is suspended, which is behind a feature gate"


@rule
def initializing_timeout_is_a_duration(document: JSON) -> Iterator[str]:
    given = document["metadata"].get("annotations", {}).get("ray.io/initializing-timeout", "1s")
    if not re.fullmatch(r"[1-9][0-9]*|([1-9][0-9]*(h|m|s))+", given):
        yield f"ray.io/initializing-timeout: {given} is no duration"


@rule
def ray_is_the_first_container(document: JSON) -> Iterator[str]:
    """KubeRay takes the first one for Ray's, and adds an autoscaler and a wait of its own."""
    for name, group in each_group(document):
        names = [container["name"] for container in group["template"]["spec"]["containers"]]
        inits = [c["name"] for c in group["template"]["spec"].get("initContainers", [])]
        if names != ["ray"] or "wait-gcs-ready" in inits:
            yield f"{name} has containers {names}, {inits}"
