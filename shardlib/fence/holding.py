"""From a lock on a table to the transaction that holds it: the part of a query that is the same for all who ask."""

from __future__ import annotations

from typing import Final

__all__ = ["LOCK_HOLDERS"]

# A prepared transaction has no process. Its lock on a table leads to it by the lock on its own transaction id.
LOCK_HOLDERS: Final = """
      FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
      LEFT JOIN pg_stat_activity a ON a.pid = l.pid
      LEFT JOIN pg_locks x ON l.pid IS NULL AND x.virtualtransaction = l.virtualtransaction
            AND x.locktype = 'transactionid' AND x.granted AND x.pid IS NULL
      LEFT JOIN pg_prepared_xacts p ON p.transaction = x.transactionid
     WHERE l.locktype = 'relation' AND l.granted
       AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
"""FROM and WHERE of a query for granted locks `l` on tables `c` of this database, held by processes `a` or prepared
transactions `p`; to be continued by AND."""
