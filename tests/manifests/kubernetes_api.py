"""A small Kubernetes API: RayJobs of one namespace behind TLS and a token, as a pod sees it.

Each RayJob that is created goes through the statuses it was told to, one each time it is looked at.
"""

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

JSON = dict[str, Any]
RAYJOBS = "/apis/ray.io/v1/namespaces/errata/rayjobs"


@dataclass
class Cluster:
    """What the API server holds, and how it behaves."""

    account: Path
    jobs: dict[str, JSON] = field(default_factory=dict)
    statuses: list[JSON] = field(default_factory=list)
    refusal: tuple[int, JSON] | None = None
    failures: int = 0
    """So many requests more are answered with 503."""
    token: str = "first"
    port: int = 0

    def answer(self, method: str, path: str, token: str, body: JSON) -> tuple[int, JSON]:
        if self.failures:
            self.failures -= 1
            return 503, {"message": "the server is busy"}
        if token != f"Bearer {self.token}":
            return 401, {"message": "Unauthorized"}
        if self.refusal is not None:
            return self.refusal
        name = path.removeprefix(RAYJOBS).removeprefix("/")
        return self.create(body) if method == "POST" else self.read(name)

    def create(self, body: JSON) -> tuple[int, JSON]:
        name = body["metadata"]["name"]
        if name in self.jobs:
            return 409, {"message": f'rayjobs.ray.io "{name}" already exists'}
        self.jobs[name] = body
        return 201, body

    def read(self, name: str) -> tuple[int, JSON]:
        if name not in self.jobs:
            details = {"name": name, "group": "ray.io", "kind": "rayjobs"}
            return 404, {"message": f'rayjobs.ray.io "{name}" not found', "details": details}
        job = self.jobs[name]
        if not job["spec"]["suspend"] and self.statuses:
            job["status"] = self.statuses.pop(0)
        return 200, job

    def renew_token(self, token: str) -> None:
        self.token = token
        (self.account / "token").write_text(token)


class Handler(BaseHTTPRequestHandler):
    cluster: Cluster

    def do_GET(self) -> None:
        self.respond({})

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        self.respond(json.loads(self.rfile.read(length)))

    def respond(self, body: JSON) -> None:
        token = self.headers.get("authorization", "")
        status, answer = self.cluster.answer(self.command, self.path, token, body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Nothing of it on the test's output."""


@contextmanager
def running(account: Path) -> Iterator[Cluster]:
    """The API server, and in `account` what a pod finds of its ServiceAccount."""
    account.mkdir()
    certificate = write_certificate(account)
    (account / "namespace").write_text("errata")
    cluster = Cluster(account)
    cluster.renew_token("first")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(account / "ca.crt", certificate)
    handler = type("Bound", (Handler,), {"cluster": cluster})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        cluster.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield cluster
        finally:
            server.shutdown()
            thread.join()


def write_certificate(account: Path) -> Path:
    """Writes `ca.crt`, of 127.0.0.1 and signed by itself; returns the key's file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubernetes")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    (account / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    file = account / "key.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return file
