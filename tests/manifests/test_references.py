"""What a manifest mentions is there: in the overlay, in the checkout, or made by KubeRay."""

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer
import yaml

from service.cli import app
from service.settings import Settings
from tests.manifests.rendering import JSON, K8S, REPO, Manifests, Pod

BY_KUBERAY = {"errata-serve-svc", "errata-head-svc", "errata-gateway-istio"}
"""Services that come with the RayService `errata`, or with its Gateway."""


def containers(manifests: Manifests) -> Iterator[tuple[Pod, JSON]]:
    for pod in manifests.pods():
        for container in pod.containers:
            yield pod, container


def test_images_are_built_here_or_pinned(manifests: Manifests) -> None:
    built = "\n".join(path.read_text() for path in (REPO / "docker").glob("Dockerfile*"))
    for pod, container in containers(manifests):
        name, _, tag = container["image"].rpartition(":")
        if name.rpartition("/")[2] == "errata":
            assert f"errata:{tag} " in built, pod.owner
        else:
            assert re.fullmatch(r"[0-9]+\.[0-9]+(\.[0-9]+)?-\w+", tag), container["image"]


def test_all_our_pods_have_the_same_image(manifests: Manifests) -> None:
    images = {c["image"] for _, c in containers(manifests) if "errata:" in c["image"]}
    assert len(images) == 1


def test_settings_are_settings(manifests: Manifests) -> None:
    given = dict(manifests.settings)
    for _, container in containers(manifests):
        given |= {e["name"]: e.get("value", "") for e in container.get("env", [])}
    given.pop("ERRATA_API_URL", None)  # Of the client commands.
    names = {name.removeprefix("ERRATA_").lower() for name in given if name.startswith("ERRATA_")}
    assert names <= Settings.model_fields.keys()


def test_settings_have_values_that_are_accepted(
    manifests: Manifests, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in manifests.settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ERRATA_DATABASE_URL", "postgresql://errata:secret@host/errata")
    settings = Settings(_env_file=None)
    assert settings.behind_proxy
    assert settings.version_store is not None
    # Above 0, none of them is on the head, which has no CPUs.
    assert settings.api_cpus > 0
    assert settings.replica_cpus > 0
    # Of the shared embedded default there must be nothing left.
    assert settings.database_url is not None


def test_config_maps_claims_and_accounts_are_there(manifests: Manifests) -> None:
    there = {(d["kind"], d["metadata"]["name"]) for d in manifests.documents}
    for pod in manifests.pods():
        account = pod.spec.get("serviceAccountName")
        assert account is None or ("ServiceAccount", account) in there, pod.owner
        for volume in pod.spec.get("volumes", []):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or ("PersistentVolumeClaim", claim) in there, pod.owner
        for container in pod.containers:
            for source in container.get("envFrom", []):
                assert ("ConfigMap", source["configMapRef"]["name"]) in there, pod.owner


def test_mounts_name_volumes(manifests: Manifests) -> None:
    claimed = {
        f"StatefulSet {d['metadata']['name']}": {
            claim["metadata"]["name"] for claim in d["spec"]["volumeClaimTemplates"]
        }
        for d in manifests.of("StatefulSet")
    }
    for pod in manifests.pods():
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
        mounted = {m["name"] for c in pod.containers for m in c.get("volumeMounts", [])}
        assert volumes | claimed.get(pod.owner, set()) == mounted, pod.owner


def test_paths_of_the_settings_are_mounted(manifests: Manifests) -> None:
    settings = manifests.settings
    paths = [
        settings["ERRATA_DATA_DIR"],
        settings["ERRATA_MODEL"],
        settings["ERRATA_VERSION_STORE"],
    ]
    for pod in manifests.pods():
        if pod.owner.startswith("Ray"):
            mounts = [mount["mountPath"] for mount in pod.spec["containers"][0]["volumeMounts"]]
            for path in (path for path in paths if path.startswith("/")):
                assert any(path == m or path.startswith(f"{m}/") for m in mounts), path


def test_services_are_there_and_find_pods(manifests: Manifests) -> None:
    services = {d["metadata"]["name"]: d for d in manifests.of("Service")}
    for service in services.values():
        selector = service["spec"]["selector"]
        [pod] = [pod for pod in manifests.pods() if selector.items() <= pod.labels.items()]
        ports = {port["name"] for port in pod.spec["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for stateful in manifests.of("StatefulSet"):
        assert stateful["spec"]["serviceName"] in services
    text = yaml.safe_dump_all(manifests.documents)
    for name in re.findall(r"(?:https?|redis)://(errata-[\w-]+):", text):
        assert name in services.keys() | BY_KUBERAY
    for ingress in manifests.of("Ingress"):
        [path] = ingress["spec"]["rules"][0]["http"]["paths"]
        assert path["backend"]["service"]["name"] in BY_KUBERAY


def test_ports_are_those_of_the_serve_config(manifests: Manifests) -> None:
    [service] = manifests.of("RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    for pod in manifests.pods():
        if pod.owner.startswith("Ray"):
            ports = {p["name"]: p["containerPort"] for p in pod.spec["containers"][0]["ports"]}
            assert ports["serve"] == config["http_options"]["port"]
            assert ports["metrics"] == 8080
    [backend] = {
        path["backend"]["service"]["port"]["number"]
        for ingress in manifests.of("Ingress")
        for path in ingress["spec"]["rules"][0]["http"]["paths"]
        if path["backend"]["service"]["name"] == "errata-serve-svc"
    } or {config["http_options"]["port"]}
    assert backend == config["http_options"]["port"]


def test_the_serve_config_is_the_one_of_deploy(manifests: Manifests) -> None:
    [service] = manifests.of("RayService")
    assert service["spec"]["serveConfigV2"] == (REPO / "deploy/serve/serve.yaml").read_text()


def test_the_serve_config_imports_what_is_there(dev: Manifests) -> None:
    [service] = dev.of("RayService")
    for application in yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]:
        module, _, attribute = application["import_path"].partition(":")
        source = (REPO / module.replace(".", "/")).with_suffix(".py").read_text()
        assert attribute in {getattr(node, "name", "") for node in ast.parse(source).body}
        assert application.get("args", {}).keys() <= Settings.model_fields.keys()


def test_python_modules_are_there(manifests: Manifests) -> None:
    for _, container in containers(manifests):
        command = container.get("command", [])
        if command[:2] == ["python", "-m"]:
            spec = importlib.util.find_spec(command[2])
            assert spec is not None
            assert spec.origin is not None
            assert spec.origin.startswith(str(REPO / "deploy"))


def parse(command: list[str]) -> None:
    """Raises what a user would be told, unless the command line takes `command`; runs nothing."""
    found: Any = typer.main.get_command(app)
    while hasattr(found, "commands"):
        name, *command = command
        found = found.commands[name]
    found.make_context(name, command)


def test_the_rayjobs_command_is_a_command(manifests: Manifests) -> None:
    [job] = manifests.of("RayJob")
    program, *command = shlex.split(job["spec"]["entrypoint"])
    assert program == "errata"
    parse(command)


def test_a_command_that_is_none_is_noticed() -> None:
    with pytest.raises(Exception, match="No such option: --hear"):
        parse(["jobs", "run", "--hear"])


def test_what_starts_a_rayjob_names_one_that_is_there(manifests: Manifests) -> None:
    starter = manifests.one("CronJob", "errata-train")
    [container] = starter["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    template = manifests.one("RayJob", container["command"][3])
    assert template["spec"]["suspend"]
    assert starter["spec"]["concurrencyPolicy"] == "Forbid"
    # The copy is named as the Job: the CronJob's name and eleven characters.
    assert len(starter["metadata"]["name"]) + 11 <= 47


def test_roles_are_bound_and_no_more_than_needed(manifests: Manifests) -> None:
    [role] = manifests.of("Role")
    assert role["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "create"]}
    ]
    [binding] = manifests.of("RoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    [subject] = binding["subjects"]
    assert (
        subject["namespace"]
        == manifests.one("ServiceAccount", subject["name"])["metadata"]["namespace"]
    )
    assert not manifests.of("ClusterRole")


def test_budgets_find_pods(manifests: Manifests) -> None:
    for budget in manifests.of("PodDisruptionBudget"):
        selector = budget["spec"]["selector"]["matchLabels"]
        assert any(selector.items() <= pod.labels.items() for pod in manifests.pods())


def test_everything_is_in_one_namespace(manifests: Manifests) -> None:
    assert {document["metadata"]["namespace"] for document in manifests.documents} == {"errata"}


def test_the_base_knows_no_namespace() -> None:
    for path in (*(K8S / "base").rglob("*.yaml"), *(K8S / "components").rglob("*.yaml")):
        assert not re.search(r"^\s*namespace:", path.read_text(), re.MULTILINE), path


def test_every_component_is_used_and_described() -> None:
    used = "\n".join(path.read_text() for path in K8S.glob("overlays/*/kustomization.yaml"))
    readme = (K8S / "README.md").read_text()
    for component in (K8S / "components").iterdir():
        assert f"../../components/{component.name}\n" in used
        assert component.name in readme
    for overlay in (K8S / "overlays").iterdir():
        assert overlay.name in readme
