"""The settings of the servers: every option once, with its type, unit, bounds and default."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

__all__ = [
    "ALGORITHMS", "AuditSettings", "AuthSettings", "EndpointSettings", "GatewaySettings", "LimitSettings",
    "Network", "ServerSettings", "Settings", "TlsSettings", "loopback",
]  # fmt: skip

MIB: Final = 2**20
ALGORITHMS: Final = ("HS256", "RS256", "ES256", "EdDSA")
"""Every signature that a token may have. `none` is not one."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _listed(value: Any) -> Any:
    """`a, b` as it stands in a variable of the environment or a flag; a list stays what it is."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


Networks = Annotated[tuple[Network, ...], BeforeValidator(_listed)]
Words = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class Section(BaseModel):
    """A part of the settings: frozen, and without options that nobody knows."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class TlsSettings(Section):
    """TLS of a server. The files are read again when they change, without a restart.

    Attributes:
        cert_file: PEM of the certificate and those that lead to its authority.
        key_file: PEM of its key.
        client_ca_file: PEM of the authorities whose client certificates are asked for (mutual TLS); None asks for none.
        minimum: oldest version that is spoken.
    """

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None
    minimum: Literal["1.2", "1.3"] = "1.2"


class ServerSettings(Section):
    """Where one HTTP server listens, and whom it believes.

    Attributes:
        host: address to listen on.
        port: 0 takes a free one.
        metrics_port: where `/metrics` is served, on the same host; None serves none.
        tls: None speaks plain HTTP.
        trusted_proxies: networks of the proxies whose `X-Forwarded-For` is believed.
        dev: serve everybody as admin while no key is set. Only on loopback.
        docs: serve the OpenAPI document and its pages.
        shutdown_s: seconds that running requests get when the server is told to stop.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8081, ge=0, le=65535)
    metrics_port: int | None = Field(default=9091, ge=0, le=65535)
    tls: TlsSettings | None = None
    trusted_proxies: Networks = ()
    dev: bool = False
    docs: bool = False
    shutdown_s: int = Field(default=30, ge=0, le=3600)

    @model_validator(mode="after")
    def _dev_stays_at_home(self) -> Self:
        if self.dev and not loopback(self.host):
            raise ValueError(f"dev serves everybody as admin, so host must be a loopback address, not {self.host!r}")
        return self


class GatewaySettings(ServerSettings):
    """The gateway's server, and the bounds of one statement.

    Attributes:
        rows_max: most rows of one answer.
        bytes_max: most bytes of one answer.
        statement_timeout_s: PostgreSQL ends a statement that takes longer, in seconds.
        pool_size: idle connections that are kept to one server.
        max_overflow: connections to one server beyond them, while they are in use.
        max_connections: connections to all servers together.
        pgbouncer: the servers are PgBouncers in transaction mode.
        topology_file: keeps the last topology, to start from while the catalog is away. It holds DSNs.
    """

    port: int = Field(default=8080, ge=0, le=65535)
    metrics_port: int | None = Field(default=9090, ge=0, le=65535)
    rows_max: int = Field(default=10_000, ge=1, le=10_000_000)
    bytes_max: int = Field(default=16 * MIB, ge=1024, le=1024 * MIB)
    statement_timeout_s: float = Field(default=30.0, gt=0, le=3600)
    pool_size: int = Field(default=10, ge=1, le=10_000)
    max_overflow: int = Field(default=10, ge=0, le=10_000)
    max_connections: int = Field(default=200, ge=1, le=100_000)
    pgbouncer: bool = False
    topology_file: Path | None = None


class AuthSettings(Section):
    """Which tokens are believed. One of `secret`, `key_file` and `jwks_url` is needed.

    Attributes:
        issuer: `iss` that a token must have.
        audience: `aud` that a token must have or hold.
        secret: for HS256, at least 32 random bytes; or a reference, `file:/path` or `env:NAME`.
        previous_secret: is believed beside `secret` while tokens are renewed; nothing is signed with it.
        key_file: PEM keys, one after the other, all of them believed; or a JWKS document. A private key can also sign.
        jwks_url: where another issuer publishes its keys. https, or http on loopback.
        algorithms: narrows what the keys allow; empty: what each key is for.
        leeway_s: how far clocks may differ, in seconds.
        ttl_max_s: longest lifetime of a token, in seconds.
        cluster: name of this cluster. A token that names another one finds nothing here.
        jwks_stale_max_s: how long keys are believed after the last answer of `jwks_url`, in seconds.
        denied_refresh_s: how often the list of denied tokens is read, in seconds.
        denied_stale_max_s: how long the list counts while the catalog is away, in seconds; then nobody comes in.
    """

    issuer: str = Field(default="shardlib", min_length=1, max_length=200)
    audience: str = Field(default="shardlib", min_length=1, max_length=200)
    secret: SecretStr | None = None
    previous_secret: SecretStr | None = None
    key_file: Path | None = None
    jwks_url: str | None = None
    algorithms: Words = ()
    leeway_s: float = Field(default=10.0, ge=0, le=60)
    ttl_max_s: int = Field(default=86_400, ge=1, le=366 * 86_400)
    cluster: str | None = Field(default=None, min_length=1, max_length=200)
    jwks_stale_max_s: float = Field(default=3600.0, ge=0, le=7 * 86_400)
    denied_refresh_s: float = Field(default=2.0, gt=0, le=60)
    denied_stale_max_s: float = Field(default=3600.0, ge=1, le=7 * 86_400)

    @property
    def keyed(self) -> bool:
        """Whether there is any key to check a token with."""
        return self.secret is not None or self.key_file is not None or self.jwks_url is not None

    @field_validator("algorithms")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := sorted(set(value) - set(ALGORITHMS)):
            raise ValueError(f"{', '.join(unknown)} is not one of {', '.join(ALGORITHMS)}")
        return value

    @model_validator(mode="after")
    def _current_before_previous(self) -> Self:
        if self.previous_secret is not None and self.secret is None:
            raise ValueError("previous_secret is only of use beside secret, the one that is signed with")
        return self


class AuditSettings(Section):
    """Where the audit is written.

    Attributes:
        url: `catalog:`, `postgresql://...` or `file:/path`.
        key_file: its first line signs the heads that the manager logs; None logs none.
    """

    url: str = Field(default="catalog:", repr=False)
    key_file: Path | None = None

    @field_validator("url")
    @classmethod
    def _known(cls, value: str) -> str:
        if value.partition(":")[0] not in ("catalog", "postgresql", "postgres", "file"):
            raise ValueError("an audit is written to catalog:, postgresql://... or file:/path")
        return value


class LimitSettings(Section):
    """How much one request, caller or address may take.

    Attributes:
        body_bytes: most bytes of a request's body.
        json_depth: most levels of lists and objects in a body.
        page_max: most entries of one page.
        failed_auth_per_minute: refused logins, for each address and each subject.
        mutations_per_minute: changing calls, for each address and each subject.
        request_timeout_s: a request is answered with 504 after so many seconds.
        header_timeout_s: seconds for a client to send the head of a request.
        body_timeout_s: seconds for a client to send the body of one.
        write_timeout_s: seconds that a client may leave an answer unread.
        connections_max: open connections of one server; more are closed at once.
        requests_max: requests that run at one time; more are answered with 503.
    """

    body_bytes: int = Field(default=MIB, ge=1024, le=64 * MIB)
    json_depth: int = Field(default=32, ge=1, le=200)
    page_max: int = Field(default=1000, ge=1, le=10_000)
    failed_auth_per_minute: int = Field(default=30, ge=1, le=100_000)
    mutations_per_minute: int = Field(default=120, ge=1, le=1_000_000)
    request_timeout_s: float = Field(default=30.0, gt=0, le=3600)
    header_timeout_s: float = Field(default=10.0, gt=0, le=600)
    body_timeout_s: float = Field(default=15.0, gt=0, le=600)
    write_timeout_s: float = Field(default=30.0, gt=0, le=600)
    connections_max: int = Field(default=1000, ge=1, le=1_000_000)
    requests_max: int = Field(default=500, ge=1, le=1_000_000)


class EndpointSettings(Section):
    """Which addresses a caller may name: a shard's server, a JWKS document.

    Link-local addresses, those of the metadata services of clouds, multicast and the unspecified address are refused
    always, also when a name leads to them.

    Attributes:
        schemes: of URLs.
        networks: that an address must lie in; empty allows every other.
        loopback: whether this machine itself may be named.
        sockets: whether a folder of Unix sockets may be named.
        parameters: libpq parameters that a DSN may have. `passfile` and `service`, say, would read files of the server.
        references: how a password that is a reference must begin.
        plain_passwords: what becomes of a password in plain text: `allow` stores it, `encrypt` stores it encrypted
            under the first key of the manager, `refuse` does neither.
        sslmodes: one of which a DSN must have, unless it leads to this machine; empty allows any. While the manager
            itself speaks TLS, `load_settings` makes it `verify-full` if nothing is said.
    """

    schemes: Words = ("postgresql", "postgres", "https", "http")
    networks: Networks = ()
    loopback: bool = True
    sockets: bool = False
    parameters: Words = (
        "application_name", "channel_binding", "connect_timeout", "dbname", "host", "hostaddr", "keepalives",
        "keepalives_count", "keepalives_idle", "keepalives_interval", "password", "port", "require_auth",
        "ssl_min_protocol_version", "sslmode", "sslnegotiation", "sslrootcert", "target_session_attrs",
        "tcp_user_timeout", "user",
    )  # fmt: skip
    references: Words = ("env:SHARDLIB_SECRET_", "file:/run/secrets/")
    plain_passwords: Literal["allow", "encrypt", "refuse"] = "allow"
    sslmodes: Words = ()


class Settings(BaseSettings):
    """Every setting of the servers and of the commands that start them.

    Attributes:
        catalog: URL of the cluster's catalog; empty until it is needed.
    """

    model_config = SettingsConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    catalog: str = Field(default="", repr=False)
    manager: ServerSettings = ServerSettings()
    gateway: GatewaySettings = GatewaySettings()
    auth: AuthSettings = AuthSettings()
    audit: AuditSettings = AuditSettings()
    limits: LimitSettings = LimitSettings()
    endpoints: EndpointSettings = EndpointSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is given to the constructor: `load_settings` says where else to look."""
        return (init_settings,)


def loopback(host: str) -> bool:
    """Whether a host is this machine alone, by its text."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
