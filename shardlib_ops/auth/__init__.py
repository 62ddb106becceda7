"""Who calls, and what they may do: signed tokens, roles, keys, and the list of tokens that count no more."""

from shardlib_ops.auth.denied import Denied, DeniedEntry, allow, denied_entries, deny
from shardlib_ops.auth.issue import issue_token
from shardlib_ops.auth.model import Identity, Role, Unauthenticated
from shardlib_ops.auth.verifier import Everybody, TokenVerifier, Verifier, verifier_for

__all__ = [
    "Denied",
    "DeniedEntry",
    "Everybody",
    "Identity",
    "Role",
    "TokenVerifier",
    "Unauthenticated",
    "Verifier",
    "allow",
    "denied_entries",
    "deny",
    "issue_token",
    "verifier_for",
]  # fmt: skip
