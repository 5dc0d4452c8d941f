"""Each document of each overlay fits Kubernetes' schema or KubeRay's, and has no unknown field."""

import copy
import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from tests.manifests.rendering import JSON, Manifests

SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = "1.34"


@cache
def kuberay(kind: str) -> jsonschema.Draft202012Validator:
    with gzip.open(SCHEMAS / f"{kind.lower()}_v1.json.gz") as file:
        return jsonschema.Draft202012Validator(strict(json.load(file)))


def strict(schema: Any) -> Any:
    """The schema with unknown fields forbidden, as Kubernetes prunes them without a word."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    open_ended = (
        "additionalProperties" in schema or "x-kubernetes-preserve-unknown-fields" in schema
    )
    if isinstance(schema.get("properties"), dict) and not open_ended:
        closed["additionalProperties"] = False
    return closed


def errors(document: JSON) -> tuple[str, ...]:
    return errors_of(json.dumps(document))


@cache
def errors_of(serialized: str) -> tuple[str, ...]:
    """Overlays have most of their documents in common."""
    document: JSON = json.loads(serialized)
    if document["apiVersion"] == "ray.io/v1":
        found = kuberay(document["kind"]).iter_errors(document)
        return tuple(f"{error.json_path}: {error.message[:200]}" for error in found)
    try:
        assert kubernetes_validate.validate(document, KUBERNETES, strict=True) == KUBERNETES
    except kubernetes_validate.ValidationError as error:
        return (f"{'.'.join(map(str, error.path))}: {error.message[:200]}",)
    return ()


def test_every_document_fits_its_schema(manifests: Manifests) -> None:
    found = {
        f"{document['kind']} {document['metadata']['name']}": errors(document)
        for document in manifests.documents
    }
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_what_only_serves_to_render_is_not_applied(manifests: Manifests) -> None:
    assert not manifests.of("PodTemplate")
    assert [d["metadata"]["name"].rsplit("-", 1)[0] for d in manifests.of("ConfigMap")] == [
        "errata-settings"
    ]


@pytest.mark.parametrize(
    ("kind", "name", "path"),
    [
        ("RayService", "errata", ["spec", "rayClusterConfig", "gcsFaultToleranceOption"]),
        ("RayJob", "errata-train", ["spec", "rayClusterSpec", "headGroupSpec", "template", "sepc"]),
        ("CronJob", "errata-train", ["spec", "jobTemplate", "spec", "backofLimit"]),
        ("NetworkPolicy", "dns", ["spec", "podSelectors"]),
    ],
)
def test_a_misspelt_field_is_found(dev: Manifests, kind: str, name: str, path: list[str]) -> None:
    document = copy.deepcopy(dev.one(kind, name))
    *parents, last = path
    place = document
    for parent in parents:
        place = place[parent]
    place[last] = {}
    assert any(last in error for error in errors(document))


def governed(schema: Any, document: Any, path: str = "") -> list[str]:
    """Fields that are set and that the schema has a rule in CEL for, which no schema check runs."""
    if not isinstance(schema, dict):
        return []
    found = [path] if "x-kubernetes-validations" in schema else []
    if isinstance(document, dict):
        for key, value in document.items():
            found += governed(schema.get("properties", {}).get(key), value, f"{path}.{key}")
    if isinstance(document, list):
        for item in document:
            found += governed(schema.get("items"), item, f"{path}[]")
    return found


def test_no_rule_in_cel_applies(manifests: Manifests) -> None:
    for document in (*manifests.of("RayService"), *manifests.of("RayJob")):
        assert governed(kuberay(document["kind"]).schema, document) == []
