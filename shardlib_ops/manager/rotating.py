"""Every encrypted password of a cluster under another key, in one change of the topology."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import getpid
from typing import Final
from uuid import uuid4

from shardlib.catalog import Catalog, Lease, publish_change
from shardlib.dsn import Dsn, resolve_secret
from shardlib.errors import InvalidTopology
from shardlib.secrets.keys import SecretKey, read_keys
from shardlib.secrets.sealed import key_id_of
from shardlib.topology import Shard, Topology
from shardlib_ops.manager.base import refuse_promoting
from shardlib_ops.manager.passwords import sealed
from shardlib_ops.manager.promote.record import Promotion, PromotionStore

__all__ = ["Rotated", "rotate_passwords"]

_LEASE_S: Final = 30.0
_LEASE_WAIT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Rotated:
    """What a rotation has come to.

    Attributes:
        topology: the one that is stored now.
        key_id: of the key that everything encrypted is encrypted under now.
        changed: DSNs that were encrypted anew, or for the first time.
        plain: DSNs that hold a plain password still.
    """

    topology: Topology
    key_id: str
    changed: int
    plain: int


def rotate_passwords(catalog: Catalog, *, plain: bool = False) -> Rotated:
    """Encrypt every encrypted password of the topology under the first key of this process. Blocking.

    One compare-and-swap for all of them: no client sees one half. Clients need the new key beforehand, and open new
    connections afterwards. The records of promotions that are over lose the passwords that they hold.

    Args:
        catalog: of the cluster.
        plain: encrypt plain ones as well.

    Raises:
        InvalidArgument: this process has no key, or not the one that a password is encrypted under; nothing is changed.
        InvalidTopology: a promotion is under way: it would not know its servers any more.
        CatalogUnavailable: no answer; the change may be published. The same again completes it.
    """
    keys = read_keys()
    promotions = PromotionStore(catalog)
    with ExitStack() as held:
        leases = {shard.id: _leased(catalog, shard, held) for shard in catalog.load().shards}
        count = 0

        def change(now: Topology) -> Topology:
            nonlocal count
            refuse_promoting(promotions.open(), now.shards)
            _refuse_unheld(now, leases)
            count, shards = 0, []
            for shard in now.shards:
                servers = [_rotated(dsn, keys, plain=plain) for dsn in (shard.primary, *shard.replicas)]
                count += sum(one != other for one, other in zip(servers, (shard.primary, *shard.replicas), strict=True))
                shards.append(replace(shard, primary=servers[0], replicas=tuple(servers[1:])))
            return now.evolve(shards=tuple(shards), nonce=uuid4().hex) if count else now

        topology = publish_change(catalog, change)
        for shard_id, lease in leases.items():
            record = promotions.load(shard_id)
            if record is not None and (bare := _bare(record)) != record:
                promotions.save(bare, lease)
    left = sum(dsn.plain_password for shard in topology.shards for dsn in (shard.primary, *shard.replicas))
    return Rotated(topology, keys[0].id, count, left)


def _rotated(dsn: Dsn, keys: tuple[SecretKey, ...], *, plain: bool) -> Dsn:
    if dsn.plain_password:
        return sealed(dsn, dsn.secret(), keys[0]) if plain else dsn
    if not dsn.encrypted_password or key_id_of(dsn.secret()) == keys[0].id:
        return dsn
    return sealed(dsn, resolve_secret(dsn.secret(), dsn.bound()), keys[0])


def _leased(catalog: Catalog, shard: Shard, held: ExitStack) -> Lease:
    """No promotion of the shard begins while it is held."""
    holder = f"{socket.gethostname()}/{getpid()}"
    lease = catalog.acquire(f"promote-{shard.id}", ttl_s=_LEASE_S, holder=holder, wait_s=_LEASE_WAIT_S)
    if lease is None:
        raise InvalidTopology(
            f"another manager is at work on the servers of shard {shard.name!r}",
            f"wait for it; if it has died, its lease ends within {_LEASE_S:g} s",
        )
    held.callback(lease.release)
    return lease


def _refuse_unheld(now: Topology, leases: dict[str, Lease]) -> None:
    for shard in now.shards:
        if shard.id not in leases or not leases[shard.id].alive():
            raise InvalidTopology(f"shard {shard.name!r} was made or taken up meanwhile", "run it again")


def _bare(record: Promotion) -> Promotion:
    """A record that is over, without passwords: nobody connects by it any more."""
    return record.changed(
        old=_without(record.old),
        new=_without(record.new),
        others=tuple(map(_without, record.others)),
        upstreams=tuple(map(_without, record.upstreams)),
    )


def _without(dsn: Dsn) -> Dsn:
    return dsn.with_password(None) if dsn.secret() else dsn
