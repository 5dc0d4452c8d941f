"""What a cluster lacks is said by the deployment's status, and what ran before goes on."""

from collections.abc import Iterator

import pytest

from service import build
from tests.cluster.nodes import Node
from tests.cluster.postgres import GUARDED
from tests.cluster.site import EDITS, Site
from tests.dashboard import PROGRAMS
from tests.faults.site import until

PROMPT = EDITS[0]["prompt"]
ELSE_AS_BEFORE = {"cluster_wait_s": 5}
"""Serve looks at a config only if it differs from that of what runs."""


@pytest.fixture(scope="module")
def proxies(site: Site) -> Iterator[list[Node]]:
    """Serve does not list what runs of a service whose last config was refused."""
    until(lambda: site.is_whole)
    yield site.proxies()
    site.deploy()
    until(lambda: site.is_whole)


@pytest.fixture(autouse=True)
def _answers(site: Site, proxies: list[Node]) -> Iterator[None]:
    yield
    for node in proxies:
        assert site.api(node).ask(PROMPT, max_tokens=1)


def test_a_version_store_that_one_node_does_not_reach(site: Site) -> None:
    lost = site.workers[1]
    with lost.machine.without_route(site.stores.proxy.address[0]):
        deployed = site.refused(ELSE_AS_BEFORE)
        here = f"ERRATA_CLUSTER_WAIT_S=0 {PROGRAMS}/errata jobs run --here 2>&1 || exit 0"
        trained = site.head.run("sh", "-c", here, timeout_s=180)
    for said in (deployed, trained):
        assert f"node {lost.address}: version_store: s3://errata cannot be read" in said
        assert "ERRATA_VERSION_STORE" in said
        assert site.workers[0].address not in said


def test_a_node_of_another_build(site: Site) -> None:
    other = site.workers[0]
    file = build.ROOT / "service" / "errors.py"
    with other.machine.with_file(file, f"{file.read_text()}\n# Another build.\n"):
        forget_build(other)
        said = site.refused(ELSE_AS_BEFORE)
    forget_build(other)
    assert f"image: node {other.address} runs another build of errata" in said
    assert "the same image" in said
    assert site.workers[1].address not in said


def forget_build(node: Node) -> None:
    """A process that has looked at its build once does not look again."""
    for process in node.processes("ray::IDLE"):
        process.kill()


def test_gpus_that_no_node_has(site: Site) -> None:
    said = site.refused({"replica_gpus": 1, "cluster_wait_s": 0})
    assert "replica_gpus: a replica reserves 1 GPU" in said
    assert "Traceback" not in said
    assert "ERRATA_REPLICA_GPUS=0" in said


def test_a_wrong_password(site: Site) -> None:
    said = site.refused({"database_url": site.stores.postgres.url_of(f"{GUARDED}:s3cret")})
    assert f'password authentication failed for user "{GUARDED}"' in said
    assert "ERRATA_DATABASE_URL" in said
    assert "s3cret" not in said
