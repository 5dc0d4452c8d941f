"""The overlays as `kubectl kustomize` renders them, and the pods that come of them.

Knows Kubernetes' kinds and KubeRay's; what must hold of them is in the tests.
"""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[2]
K8S = REPO / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())

JSON = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod template, with the labels that its pods will have."""

    owner: str
    labels: dict[str, str]
    spec: JSON

    @property
    def containers(self) -> list[JSON]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


@dataclass(frozen=True)
class Manifests:
    """Every document of one overlay."""

    overlay: str
    documents: list[JSON]

    def of(self, kind: str) -> list[JSON]:
        return [document for document in self.documents if document["kind"] == kind]

    def one(self, kind: str, name: str) -> JSON:
        [found] = [d for d in self.of(kind) if d["metadata"]["name"] == name]
        return found

    @property
    def settings(self) -> dict[str, str]:
        """What the ConfigMap of the settings sets."""
        [found] = [d for d in self.of("ConfigMap") if "errata-settings" in d["metadata"]["name"]]
        return dict(found["data"])

    def pods(self) -> Iterator[Pod]:
        for document in self.documents:
            yield from pods_of(document)


def render(overlay: Path) -> Manifests:
    """Raises `AssertionError` with kubectl's message."""
    run = subprocess.run(
        ["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return Manifests(overlay.name, list(yaml.load_all(run.stdout, yaml.CSafeLoader)))


def clusters(document: JSON) -> Iterator[JSON]:
    """The RayCluster spec of a RayService or RayJob."""
    spec = document["spec"]
    if document["kind"] in ("RayService", "RayJob"):
        yield spec.get("rayClusterConfig") or spec["rayClusterSpec"]


def groups(cluster: JSON) -> Iterator[tuple[str, JSON]]:
    """Head and workers, by the name that KubeRay labels their pods with."""
    yield "headgroup", cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group


def pods_of(document: JSON) -> Iterator[Pod]:
    owner = f"{document['kind']} {document['metadata']['name']}"
    match document["kind"]:
        case "RayService" | "RayJob":
            for cluster in clusters(document):
                for name, group in groups(cluster):
                    yield ray_pod(f"{owner}, group {name}", name, group["template"])
        case "StatefulSet":
            template = document["spec"]["template"]
            yield Pod(owner, template["metadata"]["labels"], template["spec"])
        case "CronJob":
            template = document["spec"]["jobTemplate"]["spec"]["template"]
            yield Pod(owner, template["metadata"]["labels"], template["spec"])


def ray_pod(owner: str, group: str, template: JSON) -> Pod:
    node_type = "head" if group == "headgroup" else "worker"
    added = {"ray.io/group": group, "ray.io/node-type": node_type}
    return Pod(owner, {**template["metadata"]["labels"], **added}, template["spec"])
