"""The compose files: one machine, nothing open beyond it, no password in them."""

import re
import tomllib
from typing import Any

import pytest
import yaml

from service.api.health import router
from service.settings import Settings
from service.store.database import parse_url
from tests.images.dockerfile import CHECKOUT

FOLDER = CHECKOUT / "docker"
VERSION = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
REFERENCE = re.compile(r"\$\{(\w+)(?::\?([^}]*))?\}")


@pytest.fixture(scope="module")
def text() -> str:
    return (FOLDER / "compose.yaml").read_text()


@pytest.fixture(scope="module")
def services(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text)["services"]
    return found


@pytest.fixture(scope="module")
def environment(services: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = services["errata"]["environment"]
    return found


def test_passwords_are_given_from_outside_or_it_says_where(text: str) -> None:
    assert {name for name, _ in REFERENCE.findall(text)} == {"POSTGRES_PASSWORD"}
    for name, message in REFERENCE.findall(text):
        assert "docker/compose.yaml" in message, name
    assert ".env" in (CHECKOUT / ".gitignore").read_text().splitlines()
    assert 'echo "POSTGRES_PASSWORD=$(openssl rand -hex 24)" > docker/.env' in text


def test_every_setting_exists(environment: dict[str, str]) -> None:
    known = {f"ERRATA_{name.upper()}" for name in Settings.model_fields}
    assert {name for name in environment if name.startswith("ERRATA_")} <= known
    assert all(isinstance(value, str) for value in environment.values())


def test_the_service_finds_the_database(
    services: dict[str, Any], environment: dict[str, str]
) -> None:
    url = parse_url(REFERENCE.sub("0123abcd", environment["ERRATA_DATABASE_URL"]))
    postgres = services["postgres"]["environment"]
    assert url.host in services
    assert (url.port, url.password) == (5432, "0123abcd")
    assert (url.username, url.database) == (postgres["POSTGRES_USER"], postgres["POSTGRES_DB"])
    assert services["errata"]["depends_on"][url.host] == {"condition": "service_healthy"}


def test_only_this_machine_reaches_it(
    services: dict[str, Any], environment: dict[str, str]
) -> None:
    """Which is why the service may listen on every address of its container."""
    ports = [port for one in services.values() for port in one.get("ports", [])]
    assert ports == ["127.0.0.1:8000:8000"]
    assert environment["ERRATA_HOST"] == "0.0.0.0"
    assert environment["ERRATA_BEHIND_PROXY"] == "true"


def test_the_root_file_system_is_read_only(services: dict[str, Any]) -> None:
    errata = services["errata"]
    assert errata["read_only"]
    assert errata["cap_drop"] == ["ALL"]
    written = [place.split(":")[0] for place in errata["tmpfs"]]
    written += [volume.split(":")[1] for volume in errata["volumes"]]
    assert sorted(written) == ["/data", "/home/ray/.ray", "/tmp"]


def test_healthy_means_that_queries_are_answered(services: dict[str, Any]) -> None:
    asked = services["errata"]["healthcheck"]["test"][-1]
    assert asked.startswith("http://127.0.0.1:8000/")
    assert asked.removeprefix("http://127.0.0.1:8000") in {
        getattr(route, "path", "") for route in router.routes
    }


def test_images_are_pinned(services: dict[str, Any]) -> None:
    assert services["errata"]["image"] == f"errata:{VERSION}"
    assert re.fullmatch(r"postgres:18\.\d+-bookworm", services["postgres"]["image"])


@pytest.mark.parametrize(
    ("file", "kind", "tag"), [("compose.yaml", "cpu", ""), ("compose.cuda.yaml", "cuda", "-cuda")]
)
def test_each_builds_its_own_image(file: str, kind: str, tag: str) -> None:
    errata = yaml.safe_load((FOLDER / file).read_text())["services"]["errata"]
    assert errata["image"] == f"errata:{VERSION}{tag}"
    assert errata["build"]["dockerfile"] == f"docker/Dockerfile.{kind}"
    assert (FOLDER / errata["build"].get("context", "..") / errata["build"]["dockerfile"]).is_file()


def test_volumes_are_declared(text: str, services: dict[str, Any]) -> None:
    used = {volume.split(":")[0] for one in services.values() for volume in one["volumes"]}
    assert used == set(yaml.safe_load(text)["volumes"])
