"""One service on one cluster of three machines for all tests here, where they can be had."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from service import display
from service.client import JSON
from tests.cluster.rig import PROGRAMS
from tests.cluster.site import EDITS, Site
from tests.faults.site import until

APT_PACKAGES = "iproute2 util-linux redis-server"


def lacking() -> str | None:
    """Why no machines can be made here."""
    if os.geteuid() != 0:
        return "root is needed to make network namespaces"
    if absent := [one for one in (*PROGRAMS, "redis-server") if shutil.which(one) is None]:
        return f"not installed: {', '.join(absent)} (apt-get install {APT_PACKAGES})"
    made = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    return made.stderr or None


@pytest.fixture(scope="package", autouse=True)
def machines() -> None:
    """They can be made."""
    if reason := lacking():
        # Where it must hold, nothing is passed over.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="package")
def site() -> Iterator[Site]:
    """The service runs, with the base model live."""
    with Site() as made:
        yield made


@pytest.fixture(scope="package")
def trained(site: Site) -> JSON:
    """A finished job over `EDITS`, whose version is live, trained by a rank on each worker."""
    until(lambda: site.is_whole)
    site.spread()  # Two ranks go to one node, if it is that free.
    api = site.api(site.head)
    ids = [answer["id"] for answer in api.submit(EDITS)]
    job = api.post("/jobs", {"edit_ids": ids, "hparams": {"formats": ["raw"]}})
    until(lambda: all(node.processes("ray::RayTrainWorker") for node in site.workers))
    ended = display.watch(api, job["id"], quiet=True)
    assert ended["state"] == "done", ended["error"]
    return ended


@pytest.fixture
def whole(site: Site) -> Iterator[None]:
    """Before and after each test."""
    until(lambda: site.is_whole)
    yield
    site.stores.proxy.release()
    until(lambda: site.is_whole)
