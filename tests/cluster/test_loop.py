"""The main job, with nothing shared by the nodes but the network: facts change, and change back."""

import pytest

from service import display
from service.client import JSON
from tests.cluster.site import EDITS, Site
from workers.evaluation import MAX_NEW_TOKENS, STOP, matches

pytestmark = pytest.mark.usefixtures("whole")

PROMPT, TARGET = EDITS[0]["prompt"], EDITS[0]["target"]


def answers(site: Site) -> list[tuple[str, str]]:
    """What is told, and by which version, by the proxy on each node."""
    return [site.api(node).ask(PROMPT, max_tokens=MAX_NEW_TOKENS, stop=STOP) for node in site.nodes]


def test_ranks_on_two_nodes_train_and_replicas_on_both_swap(site: Site, trained: JSON) -> None:
    version = trained["version"]
    assert [len(tensor.shards) for tensor in site.stores.manifest(version).tensors] == [2]
    assert set(site.replicas().values()) == {node.address for node in site.workers}
    for told, by in answers(site):
        assert matches(told, TARGET)
        assert by == version

    api = site.api(site.head)
    api.post("/versions/v0/activate", {})
    display.await_rollout(api, "v0")
    for told, by in answers(site):
        assert not matches(told, TARGET)
        assert by == "v0"


def test_no_node_sees_the_files_of_another(site: Site, trained: JSON) -> None:
    """So whatever passed from one to another did so by the version store or by Ray."""
    for node in site.nodes:
        node.machine.run(["touch", str(site.stores.node / node.address)])
    for node in site.nodes:
        shown = node.machine.run(["ls", str(site.stores.node)]).split()
        assert [name for name in shown if name.startswith("198.")] == [node.address]
    assert list((site.stores.node).iterdir()) == []
