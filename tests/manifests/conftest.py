"""Each overlay, rendered once."""

import os
import shutil
from functools import cache

import pytest

from tests.manifests.rendering import K8S, OVERLAYS, Manifests, render


@cache
def rendered(overlay: str) -> Manifests:
    return render(K8S / "overlays" / overlay)


@pytest.fixture(scope="session")
def kubectl() -> None:
    """Skips where there is no kubectl; in CI it must be there."""
    if shutil.which("kubectl") is None:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say("kubectl is not installed: the manifests cannot be rendered")


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest, kubectl: None) -> Manifests:
    return rendered(request.param)


@pytest.fixture
def dev(kubectl: None) -> Manifests:
    return rendered("dev")


@pytest.fixture
def prod(kubectl: None) -> Manifests:
    return rendered("prod")


@pytest.fixture
def incremental(kubectl: None) -> Manifests:
    return rendered("incremental-upgrade")
