"""How commands talk to the process that holds a cluster: one line of JSON each way, over a Unix socket.

The socket lies in the folder of the servers' sockets, which nobody else can enter.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from shardlib.errors import ShardlibError, UnsupportedOperation

__all__ = ["answer", "ask", "failure", "raised"]

_log: Final = logging.getLogger("shardlib.local")
_NAME: Final = "keeper"
_LINE_S: Final = 10.0
_LINE_MAX: Final = 1 << 16


def ask(sockets: Path, request: Mapping[str, Any], within_s: float) -> Any:
    """Send a request to the keeper of a cluster, and give its answer.

    Args:
        sockets: folder of the cluster's sockets.
        request: what is wanted; `answer` says who understands it.
        within_s: limit in seconds.

    Raises:
        UnsupportedOperation: no keeper listens there, or it did not answer in time.
        ShardlibError: what the keeper met.
    """
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(within_s)
        try:
            line.connect(str(sockets / _NAME))
            line.sendall(json.dumps(request).encode() + b"\n")
            said = _read(line)
        except TimeoutError:
            raise UnsupportedOperation(
                f"the process that holds the cluster did not answer within {within_s:g} s", "look at the servers' logs"
            ) from None
        except OSError as error:
            raise UnsupportedOperation(
                f"the process that holds the cluster does not listen ({error.strerror or error})",
                "stop the cluster with `local down --keep` and start it again with `local up`",
            ) from None
    if not said:
        raise UnsupportedOperation(
            "the process that holds the cluster ended while it was at work", "`local status` shows what is left"
        )
    found = json.loads(said)
    if "error" in found:
        raise raised(found)
    return found["answer"]


def answer(sockets: Path, handle: Callable[[Mapping[str, Any]], object]) -> None:
    """Answer requests, one after the other, until an exception that is no `Exception` ends it, as SIGTERM does.

    Args:
        sockets: folder of the cluster's sockets.
        handle: called with each request; what it returns or raises is the answer.
    """
    path = sockets / _NAME
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        path.chmod(0o600)
        door.listen()
        while True:
            line, _ = door.accept()
            # Who asked may be gone: what was asked for is done all the same, and its state is on disk.
            with line, contextlib.suppress(OSError):
                _serve(line, handle)


def _serve(line: socket.socket, handle: Callable[[Mapping[str, Any]], object]) -> None:
    line.settimeout(_LINE_S)
    request = _read(line)
    if not request:
        return
    try:
        said: Mapping[str, Any] = {"answer": handle(json.loads(request))}
    except ShardlibError as error:
        said = failure(error)
    except Exception as error:  # noqa: BLE001 - told to who asked; the cluster goes on
        _log.exception("a request to the keeper of a local cluster failed")
        said = failure(UnsupportedOperation(f"{type(error).__name__}: {error}", "look at the servers' logs"))
    line.sendall(json.dumps(said, default=str).encode() + b"\n")


def _read(line: socket.socket) -> bytes:
    found = b""
    while not found.endswith(b"\n") and len(found) < _LINE_MAX:
        if not (part := line.recv(4096)):
            return b""
        found += part
    return found


def failure(error: ShardlibError) -> dict[str, Any]:
    """An error as it is sent."""
    return {"error": str(error), "kind": type(error).__name__, "arguments": error.args}


def raised(said: Mapping[str, Any]) -> ShardlibError:
    """The error that was sent, as it was there."""
    from shardlib import errors

    made = getattr(errors, said["kind"])(*said["arguments"])
    if not isinstance(made, ShardlibError):
        raise TypeError(f"{said['kind']} is no error of shardlib")
    return made
