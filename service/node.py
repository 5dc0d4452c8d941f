"""The whole service on one machine, in the foreground: PostgreSQL, Ray, Serve; and their end."""

import asyncio
import fcntl
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from service.errors import ConfigurationError
from service.settings import Settings
from service.store.embedded import EmbeddedPostgres
from service.store.migrate import upgrade

log = logging.getLogger(__name__)

RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Proxies ask as `ServeInference` does: by gRPC, not through an HTTP proxy that is set for other
    # things, whatever the length (4 MiB is the default).
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "2147483647",
    "grpc_proxy": "",
}
"""What Ray's processes have in their environment, unless it is set."""


def run(settings: Settings, ready: Callable[[str], None]) -> None:
    """Starts everything, calls `ready` with the URL, and waits for SIGINT or SIGTERM.

    Raises `ConfigurationError` (or `workers.errors.UnsupportedModel`) before anything is started
    if the settings cannot work.
    """
    stop = threading.Event()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        url = stack.enter_context(started(settings))
        # Only now: Ray puts handlers of its own in place, which end the process at once.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        ready(url)
        stop.wait()
    log.info("ended")


@contextmanager
def started(settings: Settings) -> Iterator[str]:
    """The running service's URL; everything ends with the block."""
    from service.app import APP_NAME, base_model, build_app, ensure_base
    from service.preflight import alive_nodes, check_host, check_shared

    check_host(settings.host, settings.behind_proxy)
    check_port(settings.host, settings.port)
    log.info("reading the model %s", settings.model_path)
    base = base_model(settings)
    with owned(settings.data_dir), database(settings) as database_url:
        upgrade(database_url)
        asyncio.run(ensure_base(database_url, base.fingerprint))
        with ray_cluster(settings):
            from ray import serve

            check_shared(settings, len(alive_nodes()))
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": settings.host, "port": settings.port},
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )
            log.info("loading the model on %d replicas", settings.replicas)
            serve.run(build_app(settings, database_url, base), name=APP_NAME, route_prefix="/")
            try:
                yield f"http://{settings.host}:{settings.port}"
            finally:
                log.info("ending: requests in flight are answered first")
                serve.shutdown()


def check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"port: {port} on {host} cannot be used ({error.strerror}); choose another: --port"
            ) from error


@contextmanager
def owned(data_dir: Path) -> Iterator[None]:
    """Makes the data directory if it is not there, and keeps a second service out of it."""
    with ExitStack() as stack:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((data_dir / "lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(
                f"data_dir: {data_dir} is in use by another errata; end it or choose another"
            ) from error
        except OSError as error:
            raise ConfigurationError(
                f"data_dir: {data_dir} is not writable ({error.strerror}); "
                "choose another with --data-dir or ERRATA_DATA_DIR"
            ) from error
        yield


@contextmanager
def database(settings: Settings) -> Iterator[str]:
    """The database's URL: the one that is set, or that of an embedded server."""
    if settings.database_url:
        yield settings.database_url
        return
    log.info("starting PostgreSQL in %s", settings.data_dir)
    server = EmbeddedPostgres(settings.data_dir.resolve())
    try:
        yield server.start()
    finally:
        server.stop()


@contextmanager
def ray_cluster(settings: Settings) -> Iterator[None]:
    """A Ray of our own on loopback, or the one that `RAY_ADDRESS` names."""
    for name, value in RAY.items():
        os.environ.setdefault(name, value)
    import ray

    log.info("starting Ray")
    # What they say of a healthy start is of no use to who runs `errata up`.
    for name in ("ray.serve", "ray._private.authentication.authentication_token_setup"):
        logging.getLogger(name).setLevel(logging.ERROR)

    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level="WARNING")
    else:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, settings.train_workers + 1),
            # Ray Train asks it whether a run's controller lives, and gives a dead one's CPUs back.
            include_dashboard=True,
            log_to_driver=False,
            logging_level="WARNING",
            _node_ip_address="127.0.0.1",
        )
    try:
        yield
    finally:
        ray.shutdown()
