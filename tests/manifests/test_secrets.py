"""Secrets are referred to, never held, never optional, and the README says how to make each."""

import re
from collections.abc import Iterator
from typing import Any

from tests.manifests.rendering import JSON, K8S, REPO, Manifests

README = K8S / "README.md"


def references(node: Any) -> Iterator[JSON]:
    """Every `secretKeyRef`."""
    if isinstance(node, list):
        for item in node:
            yield from references(item)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "secretKeyRef":
                yield value
            else:
                yield from references(value)


def documented() -> dict[str, set[str]]:
    """The keys of each secret, from the commands of the README."""
    commands = README.read_text().replace("\\\n", " ")
    found: dict[str, set[str]] = {}
    for name, arguments in re.findall(r"create secret generic (\S+)([^\n`]*)", commands):
        found.setdefault(name, set()).update(re.findall(r"--from-literal=(\w+)=", arguments))
    for name, _ in re.findall(r"create secret tls (\S+)([^\n`]*)", commands):
        found[name] = {"tls.crt", "tls.key"}
    return found


def test_no_manifest_holds_a_secret(manifests: Manifests) -> None:
    assert not manifests.of("Secret")
    for path in (*K8S.rglob("*.yaml"), *K8S.rglob("*.env"), *(REPO / "deploy/serve").rglob("*")):
        text = path.read_text()
        values = re.findall(
            r"(?im)(?:password|secret\w*|\btoken|\bkey): *['\"]?([^\s'\"{}]+)", text
        )
        # A secret's name, or what it is found by in it; labels and taints have keys too.
        names = r"url|password|AWS_\w+|errata-\w+|[a-z.]+/[a-z]+,"
        assert [value for value in values if not re.fullmatch(names, value)] == []
        assert not re.search(r"://[^\s/:@]+:[^\s/$@]+@", text), path


def test_no_setting_holds_what_a_secret_should(manifests: Manifests) -> None:
    for name in manifests.settings:
        assert not re.search(r"DATABASE_URL|API_KEY|SECRET|PASSWORD|_TOKEN$|ACCESS_KEY", name)


def test_a_pod_without_its_secret_does_not_start(manifests: Manifests) -> None:
    """Kubernetes then says `secret "errata-database" not found`; an optional one would be empty."""
    found = list(references(manifests.documents))
    assert {"errata-database", "errata-redis"} <= {reference["name"] for reference in found}
    for reference in found:
        assert not reference.get("optional", False)


def test_secrets_are_single_variables(manifests: Manifests) -> None:
    """A whole secret as environment would bring whatever else is in it."""
    for pod in manifests.pods():
        for container in pod.containers:
            assert not any("secretRef" in source for source in container.get("envFrom", []))


def test_the_readme_makes_every_secret(manifests: Manifests) -> None:
    made = documented()
    for reference in references(manifests.documents):
        assert reference["key"] in made.get(reference["name"], set()), reference
    for ingress in manifests.of("Ingress"):
        for entry in ingress["spec"]["tls"]:
            assert entry["secretName"] in made
        assert ingress["metadata"]["annotations"]["haproxy.org/auth-secret"] in made


def test_the_readme_makes_no_secret_that_nothing_needs(manifests: Manifests) -> None:
    mentioned = "\n".join(path.read_text() for path in K8S.rglob("*.yaml"))
    for name in documented():
        assert name in mentioned


def test_an_optional_secret_is_noticed() -> None:
    optional = {
        "env": [{"valueFrom": {"secretKeyRef": {"name": "a", "key": "b", "optional": True}}}]
    }
    [reference] = references([optional])
    assert reference["optional"]
