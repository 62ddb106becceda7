"""TLS of a server, with certificates that are read again when their files change.

A renewed certificate, key or list of client authorities counts from the next handshake on; connections that stand stay
as they are.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any, Final

from shardlib.errors import InvalidArgument
from shardlib_ops.settings import TlsSettings

__all__ = ["ServerTls"]

_LOG = logging.getLogger("shardlib.ops.serving")

_MINIMUM: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

# ECDHE and authenticated encryption only; TLS 1.3 has nothing else.
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20:!aNULL"


class ServerTls:
    """The TLS context of a listening socket.

    Args:
        settings: files and versions.

    Raises:
        InvalidArgument: a file that cannot be read, is no PEM, or a key that is not the certificate's.
    """

    def __init__(self, settings: TlsSettings) -> None:
        self._settings = settings
        self._stamp = self._failed = _stamp(settings)
        self._current = _context(settings)
        listening = _Listening(ssl.PROTOCOL_TLS_SERVER)
        listening.tls = self
        self.context: ssl.SSLContext = listening

    def refresh(self) -> bool:
        """Read the files again if they have changed; whether there is something new. What cannot be read is not."""
        stamp = _stamp(self._settings)
        if stamp in (self._stamp, self._failed):
            return False
        try:
            context = _context(self._settings)
        except InvalidArgument as error:
            # Half written, or a new certificate beside an old key: the next change is looked at again.
            self._failed = stamp
            _LOG.warning("the TLS files have changed and cannot be used; the old ones still count: %s", error)
            return False
        self._stamp, self._failed, self._current = stamp, stamp, context
        _LOG.info("the TLS files have changed and were read again")
        return True

    def next(self) -> ssl.SSLContext:
        """The context of one handshake.

        Where clients show certificates it is a new one. OpenSSL keeps the sessions of TLS 1.2 in the context, and to
        resume one would skip the look at the certificate, whatever its authority has said since.
        """
        self.refresh()
        if self._settings.client_ca_file is not None and self._failed == self._stamp:
            try:
                return _context(self._settings)
            except InvalidArgument as error:
                _LOG.warning("the TLS files are being changed; the old ones still count: %s", error)
        return self._current


class _Listening(ssl.SSLContext):
    """What a listening socket has: each handshake gets the context of its moment from it."""

    tls: ServerTls

    def wrap_bio(self, *given: Any, **named: Any) -> ssl.SSLObject:
        """Begin a handshake; event loops call it for each connection."""
        return self.tls.next().wrap_bio(*given, **named)


def _context(settings: TlsSettings) -> ssl.SSLContext:
    problem, where = "", settings.cert_file
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _MINIMUM[settings.minimum]
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    # Tickets resume a session without the context that it was made in.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without a passphrase given, OpenSSL would ask for one at the terminal.
        context.load_cert_chain(settings.cert_file, settings.key_file, password=lambda: b"")
        if settings.client_ca_file is not None:
            where = settings.client_ca_file
            context.load_verify_locations(settings.client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError as error:
        problem = f"no PEM, or a key that does not fit ({error.reason or 'unreadable'})"
    except OSError as error:
        problem = f"it cannot be read ({error.strerror or type(error).__name__})"
    if problem:
        raise InvalidArgument("tls", str(where), problem)
    return context


def _stamp(settings: TlsSettings) -> tuple[tuple[int, int, int] | None, ...]:
    files = (settings.cert_file, settings.key_file, settings.client_ca_file)
    return tuple(_state(file) if file is not None else None for file in files)


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
