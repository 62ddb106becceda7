"""The bodies of the manager's calls. A body with a field that there is not is refused."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, SecretStr, Tag

from shardlib.dsn import Dsn
from shardlib.ring.build import VNODES_MAX
from shardlib_ops.manager.targets import Target

__all__ = [
    "CreateShardBody", "DrainBody", "ExistingTarget", "MergeBody", "MoveKeysBody", "NewTarget", "PromoteBody",
    "RebalanceBody", "ReshardBody", "SplitBody", "TargetShard",
]  # fmt: skip

REPLICAS_MAX: Final = 16
TARGETS_MAX: Final = 64
KEYS_MAX: Final = 1000
RETENTION_MAX_S: Final = 365 * 86_400
HOST_PORT: Final = re.compile(r"[^\s/=@]+:[0-9]+")
REFERENCE: Final = r"^[A-Za-z][A-Za-z0-9_.-]{0,62}$"
_ENDPOINT: Final = "postgresql://shop:file:%2Frun%2Fsecrets%2Fdb@db-4:5432/shop"


def _dsn(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if not text.isprintable():
        raise ValueError("a PostgreSQL DSN is of printable characters")
    Dsn(text)
    return value


def _replica(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if not text.isascii() or not text.isprintable():
        raise ValueError("host:port, or a DSN, of printable characters")
    if not HOST_PORT.fullmatch(text):
        Dsn(text)
    return value


def _reference(text: str) -> str:
    """What `pattern` says too; a `$` of a regular expression would let a line end through in some readers."""
    if not text.isascii() or not text.isprintable():
        raise ValueError("a shard's name or id")
    return text


Endpoint = Annotated[
    SecretStr,
    Field(
        min_length=1,
        max_length=2000,
        description="DSN of a PostgreSQL server. Its password may be a reference, `env:NAME` or `file:/path`; no "
        "answer ever shows it.",
        examples=[_ENDPOINT],
    ),
    AfterValidator(_dsn),
]
ShardRef = Annotated[
    str,
    Field(pattern=REFERENCE, description="name or id of a shard", examples=["shard-01"]),
    AfterValidator(_reference),
]
ShardName = Annotated[
    str,
    Field(
        pattern=REFERENCE,
        description="a name that no shard has: a letter, then letters, digits, `_`, `.` or `-`, 63 characters at "
        "most; not like `s1`, which is an id",
        examples=["shard-04"],
    ),
    AfterValidator(_reference),
]
Weight = Annotated[int, Field(ge=1, le=VNODES_MAX, description="virtual nodes: the weight when ranges are dealt")]


class Body(BaseModel):
    """What every body is: exact types, no unknown fields, and no value in the text of an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class _Server(Body):
    name: ShardName
    primary_endpoint: Endpoint
    replicas: list[Endpoint] = Field(default=[], max_length=REPLICAS_MAX, description="DSNs of its replicas")
    vnode_count: Weight = 256

    def endpoints(self) -> list[tuple[str, str]]:
        """Every endpoint that is named, with the place of its field."""
        found = [("primary_endpoint", self.primary_endpoint.get_secret_value())]
        found += [(f"replicas.{number}", each.get_secret_value()) for number, each in enumerate(self.replicas)]
        return found


class CreateShardBody(_Server):
    """A shard to be added."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"name": "shard-04", "primary_endpoint": _ENDPOINT, "replicas": [], "vnode_count": 256},
            ]
        }
    )


class NewTarget(_Server):
    """A shard that is made by the job."""

    def as_target(self) -> Target:
        """As the manager takes it."""
        return {
            "name": self.name,
            "primary_endpoint": self.primary_endpoint.get_secret_value(),
            "replicas": [each.get_secret_value() for each in self.replicas],
            "vnode_count": self.vnode_count,
        }


class ExistingTarget(Body):
    """A shard that there is."""

    shard_id: ShardRef

    def endpoints(self) -> list[tuple[str, str]]:
        """None is named."""
        return []

    def as_target(self) -> Target:
        """As the manager takes it."""
        return {"shard_id": self.shard_id}


def _kind_of_target(value: Any) -> str:
    given = value if isinstance(value, dict) else vars(value) if isinstance(value, Body) else {}
    return "existing" if "shard_id" in given else "new"


TargetShard = Annotated[
    Annotated[NewTarget, Tag("new")] | Annotated[ExistingTarget, Tag("existing")], Discriminator(_kind_of_target)
]


class PromoteBody(Body):
    """Which replica becomes the primary."""

    replica_endpoint: Annotated[SecretStr, Field(min_length=3, max_length=2000), AfterValidator(_replica)] | None = (
        Field(
            default=None,
            description="`host:port` of the replica, or its DSN; left out: the one that is the least behind",
            examples=["db-1b:5432"],
        )
    )
    budget_s: float = Field(
        default=5.0, ge=0.1, le=60, allow_inf_nan=False, description="seconds that the shard may be closed"
    )
    max_lag_bytes: int = Field(default=16 * 2**20, ge=0, le=2**50, description="WAL that it may be behind at first")


class ReshardBody(Body):
    """What every job takes."""

    retention_s: float | None = Field(
        default=None,
        ge=0,
        le=RETENTION_MAX_S,
        allow_inf_nan=False,
        description="seconds after the switch until the job completes by itself; null: when `complete` is called",
    )
    dry_run: bool = Field(default=False, description="only tell the plan (200), and what stands in its way")


class SplitBody(ReshardBody):
    """A shard gives a part of its ranges away."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "source_shard_id": "shard-01",
                    "target_shards": [{"name": "shard-04", "primary_endpoint": _ENDPOINT, "vnode_count": 256}],
                },
                {"source_shard_id": "shard-01", "target_shards": [{"shard_id": "shard-02"}], "dry_run": True},
            ]
        }
    )

    source_shard_id: ShardRef
    target_shards: list[TargetShard] = Field(min_length=1, max_length=TARGETS_MAX)
    keep: int | None = Field(
        default=None, ge=0, le=VNODES_MAX, description="weight of what stays; null: the source's own; 0: nothing stays"
    )


class MergeBody(ReshardBody):
    """Shards give all that they own to one."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"source_shard_ids": ["shard-02", "shard-03"], "target_shard": {"shard_id": "shard-01"}}]
        }
    )

    source_shard_ids: list[ShardRef] = Field(min_length=1, max_length=TARGETS_MAX)
    target_shard: TargetShard


class RebalanceBody(ReshardBody):
    """A shard that owns nothing gets its fair part of everything."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"target_shard": {"shard_id": "shard-04"}}]})

    target_shard: TargetShard


class DrainBody(ReshardBody):
    """A shard gives all that it owns to the others."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"source_shard_id": "shard-03"}]})

    source_shard_id: ShardRef


class MoveKeysBody(ReshardBody):
    """Some keys go to a shard."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"keys": ["tenant-42"], "target_shard": {"shard_id": "shard-02"}}]}
    )

    keys: list[Annotated[str, Field(min_length=1, max_length=1000)] | Annotated[int, Field(ge=-(2**63), lt=2**63)]] = (
        Field(min_length=1, max_length=KEYS_MAX, description="shard keys: texts or whole numbers")
    )
    target_shard: TargetShard


Steps = Literal["pause", "resume", "cancel", "rollback", "complete"]
