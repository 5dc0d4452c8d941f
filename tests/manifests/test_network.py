"""Only the named flows pass the NetworkPolicies."""

import pytest

from tests.manifests.network import Place, connects
from tests.manifests.rendering import Manifests

COMPONENT = "app.kubernetes.io/component"
NAME = "kubernetes.io/metadata.name"
SERVING = Place({COMPONENT: "serving", "ray.io/node-type": "worker"})
HEAD = Place({COMPONENT: "serving", "ray.io/node-type": "head"})
TRAINING = Place({COMPONENT: "training"})
STARTER = Place({COMPONENT: "start-training"})
POSTGRES = Place({COMPONENT: "postgres"})
REDIS = Place({COMPONENT: "redis"})
MODELS = Place({COMPONENT: "models"})
GATEWAY = Place({"gateway.networking.k8s.io/gateway-name": "errata-gateway"})
STRANGER = Place({"app": "other"})
OPERATOR = Place({"app.kubernetes.io/name": "kuberay-operator"}, {NAME: "kuberay-system"})
PROXY = Place({}, {NAME: "haproxy-controller", "errata/proxy": "true"})
PROMETHEUS = Place({}, {NAME: "monitoring", "errata/monitoring": "true"})
FOREIGN = Place({}, {NAME: "default"})
DNS = Place({"k8s-app": "kube-dns"}, {NAME: "kube-system"})
ISTIOD = Place({}, {NAME: "istio-system"})
API_SERVER = Place(address="172.20.0.1")
INTERNET = Place(address="93.184.216.34")
DATABASE = Place(address="10.1.2.3")
METADATA = Place(address="169.254.169.254")

EVERYWHERE = {
    (SERVING, HEAD, 6379): True,
    (HEAD, SERVING, 34567): True,
    (TRAINING, TRAINING, 34567): True,
    (SERVING, TRAINING, 6379): False,
    (TRAINING, SERVING, 8000): False,
    (OPERATOR, HEAD, 8265): True,
    (OPERATOR, TRAINING, 8265): True,
    (OPERATOR, SERVING, 8000): True,
    (OPERATOR, SERVING, 10001): False,
    (PROXY, SERVING, 8000): True,
    (PROXY, SERVING, 8265): False,
    (PROXY, TRAINING, 8000): False,
    (PROMETHEUS, SERVING, 8080): True,
    (PROMETHEUS, TRAINING, 8080): True,
    (PROMETHEUS, SERVING, 8000): False,
    (FOREIGN, SERVING, 8000): False,
    (FOREIGN, HEAD, 8265): False,
    (STRANGER, SERVING, 8000): False,
    (STRANGER, HEAD, 6379): False,
    (STRANGER, INTERNET, 443): False,
    (FOREIGN, STRANGER, 80): False,
    (STARTER, API_SERVER, 443): True,
    (STARTER, SERVING, 8000): True,
    (STARTER, HEAD, 8265): False,
    (SERVING, DNS, 53): True,
    (SERVING, FOREIGN, 53): False,
    (SERVING, METADATA, 80): False,
    (SERVING, METADATA, 443): False,
    (SERVING, API_SERVER, 6443): False,
}
BUNDLED_DATABASE = {
    (SERVING, POSTGRES, 5432): True,
    (TRAINING, POSTGRES, 5432): True,
    (STARTER, POSTGRES, 5432): False,
    (PROXY, POSTGRES, 5432): False,
    (POSTGRES, INTERNET, 443): False,
    (SERVING, INTERNET, 443): False,
}
BUNDLED_REDIS = {
    (HEAD, REDIS, 6379): True,
    (TRAINING, REDIS, 6379): False,
    (STRANGER, REDIS, 6379): False,
    (REDIS, INTERNET, 443): False,
}
PRODUCTION = {
    (SERVING, DATABASE, 5432): True,
    (TRAINING, DATABASE, 5432): True,
    (SERVING, INTERNET, 5432): False,
    (SERVING, INTERNET, 443): True,
    (TRAINING, INTERNET, 443): True,
    (SERVING, INTERNET, 80): False,
    (HEAD, API_SERVER, 6443): True,
    (MODELS, INTERNET, 443): True,
    (MODELS, DATABASE, 5432): False,
}
BY_GATEWAY = {
    (PROXY, GATEWAY, 80): True,
    (FOREIGN, GATEWAY, 80): False,
    (GATEWAY, SERVING, 8000): True,
    (GATEWAY, HEAD, 8265): False,
    (GATEWAY, ISTIOD, 15012): True,
}
FLOWS = {
    "dev": EVERYWHERE | BUNDLED_DATABASE | BUNDLED_REDIS,
    "prod": EVERYWHERE | BUNDLED_REDIS | PRODUCTION,
    "72b": EVERYWHERE | BUNDLED_REDIS | PRODUCTION,
    "incremental-upgrade": EVERYWHERE | BUNDLED_REDIS | PRODUCTION | BY_GATEWAY,
}


def test_only_the_named_flows_pass(manifests: Manifests) -> None:
    policies = manifests.of("NetworkPolicy")
    expected = FLOWS[manifests.overlay]
    assert {flow: connects(policies, *flow) for flow in expected} == expected


def test_every_pod_is_denied_by_default(manifests: Manifests) -> None:
    nothing = Place({"any": "pod"})
    for pod in (nothing, *(Place(pod.labels) for pod in manifests.pods())):
        assert not connects(manifests.of("NetworkPolicy"), FOREIGN, pod, 22)
        assert not connects(manifests.of("NetworkPolicy"), pod, INTERNET, 22)


@pytest.mark.parametrize("policy", ["default-deny", "serving"])
def test_a_policy_that_is_missing_is_noticed(dev: Manifests, policy: str) -> None:
    left = [p for p in dev.of("NetworkPolicy") if p["metadata"]["name"] != policy]
    assert {flow: connects(left, *flow) for flow in FLOWS["dev"]} != FLOWS["dev"]
