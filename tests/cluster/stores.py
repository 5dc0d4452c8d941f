"""What nodes of any cluster reach by the network: PostgreSQL, and the objects of the version store.

Both are on the host.
"""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from tests.cluster.postgres import Postgres
from tests.cluster.rig import Network
from tests.faults.object_store import BUCKET, ObjectStore
from tests.proxy import TcpProxy
from workers.artifact import Manifest

AWS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "2",
}


class Stores:
    """And the network itself; `directory` is for whatever a test keeps, and goes at the end."""

    directory: Path
    network: Network
    postgres: Postgres
    objects: ObjectStore
    proxy: TcpProxy

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            # Not pytest's directory: PostgreSQL's own account must pass through its parents, and
            # the sockets of Ray have long names.
            self.directory = Path(tempfile.mkdtemp(prefix="errata-"))
            stack.callback(shutil.rmtree, self.directory)
            self.network = stack.enter_context(Network())
            host = self.network.host
            self.postgres = stack.enter_context(Postgres(self.directory, host, self.network.range))
            self.objects = stack.enter_context(ObjectStore())
            # At an address of its own, so that the objects can be kept from a node alone.
            proxy = TcpProxy(self.objects.address, self.network.other_host)
            self.proxy = stack.enter_context(proxy)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    @property
    def node(self) -> Path:
        """A directory that each node has to itself."""
        return self.directory / "node"

    @property
    def data(self) -> Path:
        """The service's data directory, on each node its own."""
        return self.node / "data"

    def environment(self, **parameters: str) -> dict[str, str]:
        """For a node whose service keeps all it has here; `parameters` of its connections."""
        host, port = self.proxy.address
        query = "&".join(f"{name}={value}" for name, value in parameters.items())
        return {
            **AWS,
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "ERRATA_DATABASE_URL": f"{self.postgres.url}{f'?{query}' if query else ''}",
            "ERRATA_VERSION_STORE": f"s3://{BUCKET}",
            "ERRATA_DATA_DIR": str(self.data),
        }

    def manifest(self, version_id: str) -> Manifest:
        content = self.objects.get(f"versions/{version_id}/manifest.json")
        return Manifest.model_validate_json(content)
