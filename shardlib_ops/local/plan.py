"""What a local cluster is made of: the options, checked once, and the servers they ask for."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from shardlib.errors import InvalidArgument, InvalidTopology
from shardlib_ops.local.etcd import EtcdSpec
from shardlib_ops.local.ports import HOST
from shardlib_ops.local.postgres import ServerSpec

__all__ = ["STATE", "Options", "Plan", "differing", "load", "make", "save", "server_spec"]

STATE: Final = "cluster.json"
_FORMAT: Final = 1
_SHARDS_MAX: Final = 64
_REPLICAS_MAX: Final = 8


@dataclass(frozen=True, slots=True)
class Options:
    """What a caller may ask of a local cluster; `LocalCluster` tells what each means.

    Raises:
        InvalidArgument: a value that is not allowed.
    """

    shards: int = 2
    replicas: int = 0
    synchronous: bool = False
    etcd_members: int = 1
    hash_function: str = "murmur3"
    vnode_count: int = 256
    catalog_name: str = "local"
    durable: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _whole("shards", self.shards, 1, _SHARDS_MAX)
        _whole("replicas", self.replicas, 0, _REPLICAS_MAX)
        if self.etcd_members not in (1, 3):
            raise InvalidArgument("etcd_members", self.etcd_members, "1, or 3 to survive the loss of one")
        if self.synchronous and not self.replicas:
            raise InvalidArgument("synchronous", True, "needs at least one replica that can confirm: replicas=1")
        name = self.catalog_name
        if not name or not all(part.isascii() and (part.isalnum() or part in "-_.") for part in name):
            raise InvalidArgument("catalog_name", name, "letters, digits, - _ .")


def differing(there: Options, asked: Options) -> str:
    """What is asked for other than it is there, as `shards=2 (not 3)`; empty if nothing."""
    return ", ".join(
        f"{one.name}={getattr(there, one.name)!r} (not {getattr(asked, one.name)!r})"
        for one in fields(Options)
        if getattr(there, one.name) != getattr(asked, one.name)
    )


def _whole(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidArgument(name, value, f"a whole number from {least} to {most}")


@dataclass(frozen=True, slots=True)
class Plan:
    """The servers of a cluster, ports and passwords included: enough to start them again.

    Attributes:
        options: what was asked for.
        postgres: version of the programs that made the data folders.
        servers: those of the shards, each primary before its replicas.
        etcd: the members of the catalog.
        spares: servers that were empty when they were made, and the replicas of shards made of them.
        ready: whether the first topology was published.
    """

    options: Options
    postgres: str
    servers: tuple[ServerSpec, ...]
    etcd: tuple[EtcdSpec, ...]
    spares: tuple[ServerSpec, ...] = ()
    ready: bool = False

    @property
    def all_servers(self) -> tuple[ServerSpec, ...]:
        """Those of the shards, then the spares."""
        return (*self.servers, *self.spares)

    def changed(self, spec: ServerSpec) -> Plan:
        """The plan with another state of one of its servers."""
        servers, spares = (
            tuple(spec if one.name == spec.name else one for one in some) for some in (self.servers, self.spares)
        )
        return replace(self, servers=servers, spares=spares)

    @property
    def url(self) -> str:
        """URL of the catalog."""
        members = ",".join(f"{HOST}:{member.port}" for member in self.etcd)
        return f"etcd://{members}/{self.options.catalog_name}"


def make(options: Options, postgres: str, take_port: Callable[[], int]) -> Plan:
    """A plan for a new cluster: shards `shard-01`, ...; servers `shard-01-a`, `shard-01-b`, ..."""
    servers: list[ServerSpec] = []
    for number in range(1, options.shards + 1):
        servers += _of_shard(f"shard-{number:02d}", options, take_port)
    members = tuple(
        EtcdSpec(f"etcd-{number}", take_port(), take_port()) for number in range(1, options.etcd_members + 1)
    )
    return Plan(options, postgres, tuple(servers), members)


def _of_shard(shard: str, options: Options, take_port: Callable[[], int]) -> Sequence[ServerSpec]:
    # Names do not tell roles, which change at a promotion.
    primary, *replicas = (f"{shard}-{chr(ord('a') + index)}" for index in range(options.replicas + 1))
    settings = dict(options.settings)
    if options.synchronous:
        names = ", ".join(f'"{name}"' for name in replicas)
        settings["synchronous_standby_names"] = f"ANY 1 ({names})"
    first = server_spec(primary, shard, take_port(), options, settings=settings)
    return [
        first,
        *(
            # A replica has the primary's roles, hence its password.
            server_spec(name, shard, take_port(), options, password=first.password, upstream=first.port)
            for name in replicas
        ),
    ]


def server_spec(
    name: str,
    shard: str | None,
    port: int,
    options: Options,
    *,
    password: str | None = None,
    upstream: int | None = None,
    settings: Mapping[str, str] | None = None,
) -> ServerSpec:
    """One server of a cluster with these options; the password is a new one unless given."""
    values = dict(options.settings if settings is None else settings)
    if not options.durable:
        # A killed process loses nothing that the kernel has; only a crash of the machine would.
        values = {"fsync": "off", "full_page_writes": "off", **values}
    return ServerSpec(name, shard, port, password or secrets.token_urlsafe(18), upstream, values)


def save(plan: Plan, directory: Path) -> None:
    """Write a plan into the cluster's folder, readable by its owner alone."""
    unfinished = directory / f"{STATE}.new"
    handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        json.dump({"format": _FORMAT, **asdict(plan)}, file, indent=1)
    unfinished.replace(directory / STATE)


def load(directory: Path) -> Plan | None:
    """The plan of a folder, None if it holds no cluster.

    Raises:
        InvalidTopology: the file cannot be read, or another version of shardlib wrote it.
    """
    path = directory / STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text())
        if state.pop("format") != _FORMAT:
            raise ValueError("it has another format")
        return Plan(
            Options(**state.pop("options")),
            state["postgres"],
            tuple(ServerSpec(**one) for one in state["servers"]),
            tuple(EtcdSpec(**one) for one in state["etcd"]),
            tuple(ServerSpec(**one) for one in state["spares"]),
            state["ready"],
        )
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidTopology(f"{path} is not the state of a local cluster: {error}", "remove the folder") from error
