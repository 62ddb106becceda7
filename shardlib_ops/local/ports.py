"""Free TCP ports of the loopback address, kept for one owner until it lets go of them."""

from __future__ import annotations

import random
import socket
import sys
from pathlib import Path
from typing import Final

from shardlib.errors import UnsupportedOperation

__all__ = ["HOST", "PortKeeper"]

HOST: Final = "127.0.0.1"
_FIRST: Final = 15_000
_LAST: Final = 32_000
_TRIES: Final = 2_000
_EPHEMERAL: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")


def _range() -> tuple[int, int]:
    """Ports below those the kernel gives to outgoing connections, so that none takes a stopped server's."""
    try:
        lowest = int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _FIRST, _LAST
    return (_FIRST, min(_LAST, lowest - 1)) if lowest > _FIRST + 1_000 else (1_024, max(lowest - 1, 2_048))


class PortKeeper:
    """Chooses free ports and keeps them from other clusters, also while a server is down.

    On Linux each port stays bound, without listening, by a socket with SO_REUSEADDR: a server (which sets
    that option too) can listen on it, while a keeper in another process, which asks without the option, sees
    it taken. The kernel lets go of it when this process ends. Elsewhere the port is only known to be free
    when chosen.
    """

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    def take(self) -> int:
        """A port that nobody uses.

        Raises:
            UnsupportedOperation: none was found.
        """
        first, last = _range()
        chooser = random.SystemRandom()
        for _ in range(_TRIES):
            port = chooser.randint(first, last)
            if self._free(port) and self.keep(port):
                return port
        raise UnsupportedOperation(
            f"no free port on {HOST} between {first} and {last} in {_TRIES} tries",
            "stop other servers of this machine",
        )

    @staticmethod
    def _free(port: int) -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                return False
        return True

    def keep(self, port: int) -> bool:
        """Keep a port that is known already, as at a restart; False if somebody listens on it."""
        if not sys.platform.startswith("linux"):
            return self._free(port)
        held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((HOST, port))
        except OSError:
            held.close()
            return False
        self._held.append(held)
        return True

    def close(self) -> None:
        """Let go of all ports; idempotent."""
        while self._held:
            self._held.pop().close()
