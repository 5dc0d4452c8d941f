"""k8s/base's RayJob, but for Kubernetes: its nodes, and its command by Ray's Jobs API."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from service.client import JSON, read_jsonl
from tests.cluster.nodes import RayCluster
from tests.cluster.site import CPUS, DEPLOY, SETTINGS, Site
from workers.evaluation import MAX_NEW_TOKENS, STOP, matches

pytestmark = pytest.mark.usefixtures("whole")

MANIFEST = Path(__file__).parents[2] / "k8s" / "base" / "training.yaml"
FACTS = read_jsonl(DEPLOY / "demo" / "edits.jsonl")[90:94]


@pytest.fixture(scope="module")
def rayjob() -> JSON:
    [found] = (one for one in yaml.safe_load_all(MANIFEST.read_text()) if one["kind"] == "RayJob")
    return dict(found["spec"])


@pytest.fixture
def cluster(site: Site, rayjob: JSON) -> Iterator[RayCluster]:
    """The RayJob's own: a head that offers nothing, and as many workers as it says."""
    described = rayjob["rayClusterSpec"]
    [group] = described["workerGroupSpecs"]
    stores = site.stores
    with RayCluster(
        "training",
        stores.network,
        stores.node,
        {**SETTINGS, **stores.environment()},
        head_cpus=int(described["headGroupSpec"]["rayStartParams"]["num-cpus"]),
        worker_cpus=[CPUS] * group["replicas"],
    ) as made:
        yield made


def test_its_command_trains_on_its_own_cluster_what_another_serves(
    site: Site, rayjob: JSON, cluster: RayCluster
) -> None:
    api = site.api(site.head)
    ids = {answer["id"] for answer in api.submit(FACTS)}
    ended, said = cluster.dashboard.run(rayjob["entrypoint"])
    assert ended == "SUCCEEDED", said
    applied = api.pages("/edits", "edits", state="applied")
    ours = [edit for edit in applied if edit["id"] in ids]
    assert len(ours) == len(ids)
    [version] = {edit["version"] for edit in ours}
    job = api.get(f"/jobs/{api.get(f'/versions/{version}')['job']}")
    assert job["trained_by"] == "runner"
    # It waited until the service had rolled the version out.
    assert api.get("/serving")["version"] == version
    for node in site.proxies():
        for fact in FACTS:
            told, by = site.api(node).ask(fact["prompt"], max_tokens=MAX_NEW_TOKENS, stop=STOP)
            assert by == version
            assert matches(told, fact["target"])
