"""Why a connection did not open: said once, without secrets, and whether trying again makes sense."""

from __future__ import annotations

import pickle

import psycopg
import pytest

from shardlib.dsn import Dsn
from shardlib.errors import ShardUnavailable
from shardlib.route.retry import RetryPolicy, next_wait
from shardlib.shard.connect import explain, hopeless

SAID = 'connection failed: connection to server at "10.0.0.7", port 5432 failed: FATAL:  '


@pytest.mark.parametrize(
    "said",
    [
        'password authentication failed for user "app"',
        'role "app" does not exist',
        'database "shop" does not exist',
        'no pg_hba.conf entry for host "10.0.0.8", user "app", database "shop", no encryption',
        'role "app" is not permitted to log in',
        'permission denied for database "shop"',
        "SASL authentication failed",
        "no such user: app",
    ],
)
def test_a_refused_login_is_final(said: str) -> None:
    assert hopeless(psycopg.OperationalError(SAID + said))
    assert next_wait(ShardUnavailable("s", said, final=True), 1, RetryPolicy(), 1.0) is None


@pytest.mark.parametrize(
    "said",
    [
        "sorry, too many clients already",
        "remaining connection slots are reserved for roles with the SUPERUSER attribute",
        "the database system is starting up",
        "the database system is in recovery mode",
        "terminating connection due to administrator command",
    ],
)
def test_what_passes_is_tried_again(said: str) -> None:
    assert not hopeless(psycopg.OperationalError(SAID + said))
    assert next_wait(ShardUnavailable("s", said), 1, RetryPolicy(), 1.0) is not None


def test_an_answer_that_libpq_repeats_is_shown_once() -> None:
    error = psycopg.OperationalError(
        'connection failed: connection to server at "h", port 5432 failed: FATAL:  no entry\n'
        'connection to server at "h", port 5432 failed: FATAL:  no entry\n'
        'connection to server at "h", port 5432 failed: FATAL:  no entry, SSL off'
    )
    reason, down = explain(error, Dsn("postgresql://u:secret@h/d"))
    assert not down
    assert reason == (
        "postgresql://u@h/d refused the connection: connection failed: "
        'connection to server at "h", port 5432 failed: FATAL: no entry, '
        'connection to server at "h", port 5432 failed: FATAL: no entry, SSL off'
    )


def test_final_survives_a_pickle_and_says_what_to_correct() -> None:
    error = pickle.loads(pickle.dumps(ShardUnavailable("north", "wrong password", final=True)))
    assert error.final
    assert "correct its DSN in the catalog" in str(error)
    assert not ShardUnavailable("north", "no answer").final
