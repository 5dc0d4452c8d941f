"""A TCP proxy in front of a server, for tests of what its clients do when the network fails.

It passes bytes on and knows no protocol; each connection has two threads of its own.
"""

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

_BUFFER_BYTES = 1 << 16
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class TcpProxy:
    """Listens on a free port of `host` and forwards to a server.

    `target` is its host and port, or the path of its unix socket. As a context it starts and stops.
    """

    def __init__(self, target: tuple[str, int] | Path, host: str = "127.0.0.1") -> None:
        self._target = target
        self._listener = socket.create_server((host, 0))
        self._flowing = threading.Event()
        self._flowing.set()
        self._refusing = False
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.connections = 0
        """How many were accepted and not refused."""
        self.sent = bytearray()
        """All that clients sent."""
        self.answer: Callable[[bytes], bytes | None] = bytes
        """What becomes of bytes from the server; None ends the connection."""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port for clients."""
        host, port = self._listener.getsockname()
        return host, port

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._run(self._accept)

    def stop(self) -> None:
        """Ends every connection and thread."""
        # Closing alone does not wake the thread that waits in accept.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self.release()
        for thread in self._threads:
            thread.join()

    def hold(self) -> None:
        """From now on nothing is passed on; connections are accepted and stay open."""
        self._flowing.clear()

    def refuse(self) -> None:
        """From now on new connections are reset at once; those there are end."""
        self._refusing = True
        self.cut()

    def release(self) -> None:
        """Ends `hold` and `refuse`; what was held back is passed on."""
        self._refusing = False
        self._flowing.set()

    def cut(self) -> None:
        """Ends the connections there are, in the middle of what they do."""
        with self._lock:
            ended, self._sockets = self._sockets, set()
        for each in ended:
            _end(each)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                client.close()
                continue
            self.connections += 1
            self._run(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        try:
            server = self._connect()
        except OSError:
            _end(client)
            return
        with self._lock:
            self._sockets |= {client, server}
        self._run(self._forward, server, client, lambda data: self.answer(data))
        self._forward(client, server, self._record)

    def _connect(self) -> socket.socket:
        if isinstance(self._target, tuple):
            return socket.create_connection(self._target)
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(str(self._target))
        except OSError:
            server.close()
            raise
        return server

    def _record(self, data: bytes) -> bytes:
        self.sent += data
        return data

    def _forward(
        self,
        source: socket.socket,
        sink: socket.socket,
        change: Callable[[bytes], bytes | None],
    ) -> None:
        # An error is the end of a connection, which the other side is told by its own end.
        with suppress(OSError):
            while data := source.recv(_BUFFER_BYTES):
                self._flowing.wait()
                if (passed := change(data)) is None:
                    break
                sink.sendall(passed)
        _end(source)
        _end(sink)
        with self._lock:
            self._sockets -= {source, sink}

    def _run(self, work: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=work, args=args, name="proxy", daemon=True)
        self._threads.append(thread)
        thread.start()


def _end(each: socket.socket) -> None:
    """Shut down first, which wakes the threads that wait for it."""
    with suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()
