"""What the servers and commands are told: one typed model, read from a TOML file, the environment and flags."""

from shardlib_ops.settings.endpoints import AllowedEndpoint, allowed_endpoint, allowed_endpoint_async
from shardlib_ops.settings.load import load_settings, print_settings
from shardlib_ops.settings.model import (
    AuditSettings,
    AuthSettings,
    EndpointSettings,
    GatewaySettings,
    LimitSettings,
    ServerSettings,
    Settings,
    TlsSettings,
)

__all__ = [
    "AllowedEndpoint", "AuditSettings", "AuthSettings", "EndpointSettings", "GatewaySettings", "LimitSettings",
    "ServerSettings", "Settings", "TlsSettings", "allowed_endpoint", "allowed_endpoint_async", "load_settings",
    "print_settings",
]  # fmt: skip
