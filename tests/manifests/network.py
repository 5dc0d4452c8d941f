"""What Kubernetes' NetworkPolicies let through, decided as a network plugin does.

Knows ports by number, pods and namespaces by their labels, and addresses outside by one example.
"""

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from tests.manifests.rendering import JSON

Labels = dict[str, str]


@dataclass(frozen=True, eq=False)
class Place:
    """One end of a connection: a pod of our namespace or of another, or an address outside."""

    pod: Labels = field(default_factory=dict)
    namespace: Labels | None = None
    """None: our own."""
    address: str | None = None


def selects(selector: JSON, labels: Labels) -> bool:
    """An empty selector selects everything."""
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    return exact and all(
        (labels.get(expression["key"]) in expression["values"]) == (expression["operator"] == "In")
        for expression in selector.get("matchExpressions", [])
    )


def is_peer(peer: JSON, place: Place) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        nets = [ip_network(cidr) for cidr in (block["cidr"], *block.get("except", []))]
        return place.address is not None and [ip_address(place.address) in net for net in nets] == [
            True,
            *([False] * (len(nets) - 1)),
        ]
    if place.address is not None:
        return False
    if "namespaceSelector" in peer:
        inside = place.namespace is not None and selects(peer["namespaceSelector"], place.namespace)
    else:
        inside = place.namespace is None
    return inside and selects(peer.get("podSelector", {}), place.pod)


def is_let(policies: list[JSON], way: str, here: Place, there: Place, port: int) -> bool:
    """`way`: Ingress, `there` connects to `here`; or Egress, the other way round."""
    if here.namespace is not None or here.address is not None:
        return True
    side = "from" if way == "Ingress" else "to"
    mine = [
        policy["spec"]
        for policy in policies
        if way in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], here.pod)
    ]
    rules = [rule for policy in mine for rule in policy.get(way.lower(), [])]
    return not mine or any(
        any(is_peer(peer, there) for peer in rule.get(side, [])) or side not in rule
        for rule in rules
        if "ports" not in rule or port in [allowed["port"] for allowed in rule["ports"]]
    )


def connects(policies: list[JSON], source: Place, target: Place, port: int) -> bool:
    return is_let(policies, "Egress", source, target, port) and is_let(
        policies, "Ingress", target, source, port
    )
