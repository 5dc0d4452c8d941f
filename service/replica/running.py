"""Which replicas Serve itself counts: the list that heartbeats are reconciled with."""

import asyncio
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from service.errors import Unavailable

CONTROLLER = ("SERVE_CONTROLLER_ACTOR", "serve")
"""Name and namespace of Serve's controller; `ServeInstanceDetails` is what it answers, and what
Ray's dashboard shows. Serve has no function that tells ids of replicas."""
ANSWER_S = 5.0
GONE = "STOPPING"


async def running_replicas(handle: DeploymentHandle) -> set[str] | None:
    """Ids, as `ReplicaContext.replica_id.unique_id`, of the replicas of a deployment.

    All but those that are being ended: one that is still starting has joined, and will be given
    queries, before Serve calls it running. None while Serve has no list, as after a config that
    failed to deploy, which leaves what ran running. Raises `Unavailable` if Serve does not answer.
    """
    try:
        async with asyncio.timeout(ANSWER_S):
            controller = await asyncio.to_thread(ray.get_actor, *CONTROLLER)
            found = await controller.get_serve_instance_details.remote()
    except (TimeoutError, RayError, ValueError) as error:
        raise Unavailable(f"Serve's controller does not answer: {error}") from error
    # Not read as `ServeInstanceDetails`, whose validation takes ten times as long as the answer.
    application = found["applications"].get(handle.app_name)
    deployment = application and application["deployments"].get(handle.deployment_name)
    if not deployment:
        return None
    return {one["replica_id"] for one in deployment["replicas"] if one["state"] != GONE}


def http_host() -> str:
    """The address at which Serve listens on each node; blocks."""
    found: Any = ray.get(ray.get_actor(*CONTROLLER).get_serve_instance_details.remote())
    return str(found["http_options"]["host"])
