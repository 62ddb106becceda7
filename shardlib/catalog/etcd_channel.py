"""gRPC channels to the members of an etcd cluster: which one is asked, with what credentials, and what follows.

One channel for each member, made when it is needed, so that names resolve on their own and a dead or hung
member is left for the next one at once. Everything that is not typed (gRPC and protobuf have no types) stays
behind the client.

What a fork needs is in `etcd_fork.py`. The child never touches what is left of the parent's channels, not even to free
it.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from shardlib.catalog.etcd_fork import close_before_forks, no_fork
from shardlib.catalog.etcd_proto import method_path, new, parser
from shardlib.catalog.store import Deadline
from shardlib.dsn import resolve_secret
from shardlib.errors import CatalogUnavailable, InvalidArgument
from shardlib.secrets.command import CommandFailed

# gRPC writes notes about each fork to stderr unless told otherwise before it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# Its own handlers for forks crash now and then, above all where a program is started as another user, which forks
# without Python's. What they are for is done here: no channel is open when the process forks.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
import grpc

__all__ = ["Channels", "EtcdTarget", "Refused", "RpcError", "reason_of"]

_log = logging.getLogger("shardlib.catalog")
RpcError: Final = grpc.RpcError
Metadata = tuple[tuple[str, str], ...]

_OPTIONS: Final = (
    # 6 s: etcd refuses clients that ping more often than every 5 s. The HTTP/2 ping timeout is the one that
    # cuts a connection to a stopped server; keepalive_timeout alone does not.
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Else a new client shares the connection, and the back-off, of others.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_retries", 0),  # a Txn must never be sent twice
)
_TOKEN_AGE_S: Final = 120.0
"""Tokens are renewed before etcd's default of 300 s is over, and whenever one is refused."""
_LEAST_TRY_S: Final = 0.5
_PAUSE_FIRST_S: Final = 0.02
_PAUSE_MAX_S: Final = 0.5
_inherited: list[object] = []
"""Channels of the parent process, kept so that a forked child never runs their destructors."""


class Refused(Exception):  # noqa: N818 - an answer of the server, mapped by the caller
    """The server answered, and said no: the request had no effect. `code` and `details` are gRPC's."""

    def __init__(self, code: str, details: str) -> None:
        super().__init__(code, details)
        self.code, self.details = code, details


class _HungUp(Exception):  # noqa: N818 - a reason to try again
    """The channel was closed for a fork before the request was sent."""


@dataclass(frozen=True, slots=True)
class EtcdTarget:
    """What an etcd URL says. `ca`, `cert` and `key` are paths of PEM files; the password may be a reference."""

    endpoints: tuple[str, ...]
    name: str
    user: str = ""
    password: str = field(default="", repr=False)
    tls: bool = False
    ca: str = ""
    cert: str = ""
    key: str = ""
    server_name: str = ""

    def safe(self) -> str:
        """The URL without the password."""
        login = f"{self.user}@" if self.user else ""
        return f"{'etcds' if self.tls else 'etcd'}://{login}{','.join(self.endpoints)}/{self.name}"

    def pem(self, option: str) -> bytes | None:
        """Content of the file that an option names, None if it names none.

        Raises:
            InvalidArgument: the file cannot be read.
        """
        path = getattr(self, option)
        if not path:
            return None
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise InvalidArgument(option, path, f"the file cannot be read ({error.strerror})") from None


class Channels:
    """Calls to whichever member answers."""

    def __init__(self, target: EtcdTarget) -> None:
        self.target = target
        self.safe_url = target.safe()
        for option in ("ca", "cert", "key"):
            target.pem(option)
        self._reset()
        close_before_forks(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._token_lock = threading.Lock()
        self._open: dict[int, Any] = {}
        self._at = random.randrange(len(self.target.endpoints))  # noqa: S311 - spreads clients over members
        self._token, self._token_at = "", 0.0
        self._closed = False
        self._calls = 0
        self._streams: list[Any] = []

    def call(self, method: str, request: Any, deadline: Deadline, *, again: bool = True) -> Any:
        """One unary call.

        Args:
            method: such as `Range`.
            request: its message.
            deadline: covers every try.
            again: whether it may be sent to another member when the outcome is unknown. False for what must
                not happen twice; what was refused for its token or never sent (a login that failed, a channel closed
                for a fork) is tried anew in either case, since it had no effect.

        Raises:
            CatalogUnavailable: no answer by the deadline; with `again=False` it may have happened.
            Refused: the server said no.
        """
        pause_s, failed, login_left = _PAUSE_FIRST_S, 0, 1
        reason = "no time left"
        while not deadline.passed():
            at = self._at
            timeout_s, sent = self._share(deadline, failed), False
            try:
                metadata = self._metadata(at, timeout_s)
                sent = True
                return self._once(method, request, at, timeout_s, metadata)
            except _HungUp as error:
                reason, sent = f"the process forked ({error})", False
                failed += 1
            except grpc.RpcError as error:
                code, details = error.code().name, str(error.details())
                if login_left and self.target.user and _token_refused(code, details):
                    login_left -= 1
                    self._forget_token()
                    continue
                if not _unknown(code, details):
                    raise Refused(code, details) from None
                reason = f"{self.target.endpoints[at]}: {code} {details}"
                self.leave(at)
                failed += 1
            if (sent and not again) or self._closed:
                break
            if failed % len(self.target.endpoints) == 0:
                time.sleep(deadline.left(pause_s * random.uniform(0.5, 1.0)))  # noqa: S311 - jitter
                pause_s = min(_PAUSE_MAX_S, pause_s * 2)
        raise CatalogUnavailable(self.safe_url, reason)

    def _share(self, deadline: Deadline, failed: int) -> float:
        """Seconds for one try: a hung member must leave time for the others."""
        left = len(self.target.endpoints) - failed % len(self.target.endpoints)
        return max(deadline.left() / left, deadline.left(_LEAST_TRY_S))

    def _once(self, method: str, request: Any, at: int, timeout_s: float, metadata: Metadata = ()) -> Any:
        try:
            stub = self._channel(at).unary_unary(
                method_path(method), request_serializer=_bytes, response_deserializer=parser(f"{method}Response")
            )
            with self._lock:
                self._calls += 1
            try:
                return stub(request, timeout=timeout_s, metadata=metadata)
            finally:
                with self._lock:
                    self._calls -= 1
        except ValueError as error:  # gRPC's answer to a call on a channel that another thread has closed
            if not self._closed:
                raise _HungUp(str(error)) from None
            raise CatalogUnavailable(self.safe_url, f"this catalog object was closed ({error})") from None

    def stream(
        self,
        method: str,
        requests: Iterator[Any],
        response: str,
        timeout_s: float,
        *,
        whole_s: float | None = None,
    ) -> tuple[Any, int]:
        """Open a two-way stream to the member in use.

        Args:
            method: such as `Watch`.
            requests: messages to send, drawn by a thread of gRPC.
            response: name of the messages that come back.
            timeout_s: time to log in.
            whole_s: time for the whole stream; None for no limit.

        Returns:
            An iterable call that can be cancelled, and the number of the member.

        Raises:
            CatalogUnavailable: it cannot log in.
        """
        at = self._at
        try:
            metadata = (*self._metadata(at, timeout_s), ("hasleader", "true"))
            stub = self._channel(at).stream_stream(
                method_path(method), request_serializer=_bytes, response_deserializer=parser(response)
            )
            call = stub(requests, timeout=whole_s, metadata=metadata)
            self._streams = [*(each for each in self._streams if not each.done()), call]
            return call, at
        except grpc.RpcError as error:
            self.leave(at)
            raise self.unavailable(error.code().name, str(error.details())) from None
        except (_HungUp, ValueError) as error:
            reason = "this catalog object was closed" if self._closed else "the process forked"
            raise CatalogUnavailable(self.safe_url, f"{reason} ({error})") from None

    def unavailable(self, code: str, details: str) -> CatalogUnavailable:
        """The error for a caller. One that a member would give again is final: a wrong password, a missing right."""
        user = self.target.user
        if "authentication failed" in details:
            return CatalogUnavailable(self.safe_url, f"no login for user {user!r} with this password: {details}", True)
        if code == "PERMISSION_DENIED" or "permission denied" in details:
            grant = f"etcdctl role grant-permission ROLE readwrite /shardlib/{self.target.name}/ --prefix=true"
            return CatalogUnavailable(
                self.safe_url, f"user {user!r} has no role for these keys: {details} (let it: {grant})", True
            )
        if not user and "user name is empty" in details:
            return CatalogUnavailable(self.safe_url, f"it asks for a user and a password: {details}", True)
        return CatalogUnavailable(self.safe_url, f"{code} {details}")

    def leave(self, at: int) -> None:
        """The member did not answer: ask the next one from now on."""
        with self._lock:
            if self._at == at:
                self._at = (at + 1) % len(self.target.endpoints)

    def refused_token(self, error: Any) -> bool:
        """Whether a stream ended because of its token, which is then forgotten."""
        refused = bool(self.target.user) and _token_refused(error.code().name, str(error.details()))
        if refused:
            self._forget_token()
        return refused

    def forget_token(self) -> None:
        """Log in again before the next call."""
        self._forget_token()

    def _metadata(self, at: int, timeout_s: float) -> Metadata:
        if not self.target.user:
            return ()
        with self._token_lock:
            if not self._token or time.monotonic() - self._token_at > _TOKEN_AGE_S:
                self._token, self._token_at = self._log_in(at, timeout_s), time.monotonic()
            return (("token", self._token),) if self._token else ()

    def _log_in(self, at: int, timeout_s: float) -> str:
        try:
            password = resolve_secret(self.target.password)
        except InvalidArgument as error:
            raise self._leads_nowhere(error) from None
        request = new("AuthenticateRequest", name=self.target.user, password=password)
        try:
            return str(self._once("Authenticate", request, at, timeout_s).token)
        except grpc.RpcError as error:
            if "authentication is not enabled" in str(error.details()):
                _log.warning("%s asks for no password, the URL gives one", self.safe_url)
                return ""
            raise

    def _leads_nowhere(self, error: InvalidArgument) -> CatalogUnavailable:
        """For a file or variable that the URL refers to: it may be there again when it is looked at anew."""
        passing = isinstance(error, CommandFailed)
        return CatalogUnavailable(self.safe_url, f"{error.name} {error.value}: {error.allowed}", not passing)

    def _forget_token(self) -> None:
        with self._token_lock:
            self._token = ""

    def _channel(self, at: int) -> Any:
        with no_fork, self._lock:
            if self._closed:
                raise CatalogUnavailable(self.safe_url, "this catalog object was closed")
            if at not in self._open:
                try:
                    self._open[at] = self._connect(self.target.endpoints[at])
                except InvalidArgument as error:
                    raise self._leads_nowhere(error) from None
            return self._open[at]

    def _connect(self, endpoint: str) -> Any:
        target = self.target
        if not target.tls:
            return grpc.insecure_channel(endpoint, options=_OPTIONS)
        credentials = grpc.ssl_channel_credentials(
            root_certificates=target.pem("ca"),
            private_key=target.pem("key"),
            certificate_chain=target.pem("cert"),
        )
        named = (("grpc.ssl_target_name_override", target.server_name),) if target.server_name else ()
        return grpc.secure_channel(endpoint, credentials, options=(*_OPTIONS, *named))

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        self._streams = [call for call in self._streams if not call.done()]
        return bool(self._streams) or self._calls > 0

    def hang_up(self) -> bool:
        """Close every channel, if there is one; the next call opens a new one."""
        with self._lock:
            channels, self._open = self._open, {}
        for channel in channels.values():
            channel.close()
        return bool(channels)

    def after_fork(self) -> None:
        """In a forked child: put the parent's channels aside, untouched."""
        _inherited.append(self._open)
        self._reset()

    def close(self) -> None:
        """Close every channel; calls under way end. Idempotent."""
        self._closed = True
        self.hang_up()


def reason_of(error: Any) -> str:
    """Code and text of a gRPC error, for a message."""
    return f"{error.code().name} {error.details()}"


def _bytes(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def _unknown(code: str, details: str) -> bool:
    """Whether the request may or may not have been done, and another member may be asked."""
    if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL", "ABORTED"):
        return True
    return code == "UNKNOWN" and not details.startswith("etcdserver:")


def _token_refused(code: str, details: str) -> bool:
    refused = ("invalid auth token", "user name is empty", "revision in header is old", "auth revision")
    return code == "UNAUTHENTICATED" or any(text in details for text in refused)
