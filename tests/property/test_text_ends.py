"""Text that ends a transaction is found as PostgreSQL finds it: tried on a server, with texts made of its quirks."""

from __future__ import annotations

import random

import psycopg
import pytest
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGconn

from shardlib.fence.control import ending_statement
from shardlib_ops.local import LocalServer

TEXTS = 4000
PIECES = (
    "'", "'", "''", "E'", "e'", "B'", "N'", "U&'", '"', '"', "\\", "\\'", "$$", "$a$", "$\u20ac$", "a$b$", "$1", "$",
    "\n", "\r", " ", " ", "\t", "-- ", "/*", "*/", ";", "1", "e", "a", "\u00e9", "1e", ",", "||", "(", ")", " AS a$b$",
    "END", "begin atomic", "/", "-", ".",
)  # fmt: skip
BEFORE = (
    "SELECT ", "SELECT 1 ", "/* ", "-- x", "", "SET x.y TO ", "SELECT 1 AS ", "SELECT E'a' ", "SELECT 'a' ",
    "CREATE OR REPLACE FUNCTION pg_temp.f() RETURNS int ",
    "CREATE OR REPLACE FUNCTION pg_temp.f() RETURNS int SET search_path TO ",
    "CREATE OR REPLACE FUNCTION pg_temp.f() RETURNS int BEGIN ATOMIC SELECT 1; END",
    "CREATE OR REPLACE FUNCTION pg_temp.f() RETURNS int BEGIN ATOMIC SELECT CASE WHEN true THEN 1 END; END",
    "CREATE OR REPLACE FUNCTION pg_temp.f(begin text) RETURNS int LANGUAGE sql AS 'SELECT 1'",
)  # fmt: skip
ENDS = ("; COMMIT AND CHAIN", ";END AND CHAIN", "\n;\rROLLBACK AND CHAIN", "; ABORT /**/ AND CHAIN")


def noise(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(6)))


def make_text(rng: random.Random) -> str:
    literal = noise(rng)
    return (
        rng.choice(BEFORE)
        + literal
        + noise(rng)
        + rng.choice(ENDS)
        + rng.choice(("", "; SELECT "))
        + rng.choice((literal, noise(rng), "", "; -- ", "; -- '", "; /* */"))
    )


def tags_of(pgconn: PGconn, text: str) -> tuple[set[bytes | None], bool]:
    """The command tags of the statements that the server has run, and whether it has run them all."""
    pgconn.send_query(text.encode())
    results = list(iter(pgconn.get_result, None))
    return {result.command_status for result in results}, results[-1].status != ExecStatus.FATAL_ERROR


@pytest.mark.parametrize("escapes", [False, True], ids=["standard strings", "escapes"])
def test_no_text_ends_a_transaction_unseen(server: LocalServer, rng: random.Random, escapes: bool) -> None:
    ended = kept = 0
    with psycopg.connect(server.dsn, client_encoding="utf8") as conn:
        send = conn.pgconn.exec_
        send(b"SET client_min_messages TO error; SET escape_string_warning TO off")
        send(f"SET standard_conforming_strings TO {'off' if escapes else 'on'}".encode())
        for _ in range(TEXTS):
            text = make_text(rng)
            send(b"BEGIN")
            tags, kept_all = tags_of(conn.pgconn, text)
            send(b"ROLLBACK")
            if tags & {b"COMMIT", b"ROLLBACK"}:
                ended += 1
                assert ending_statement(text, escapes=escapes) is not None, text
            elif kept_all:
                kept += ending_statement(text, escapes=escapes) is None
    assert ended > TEXTS / 50, "texts that end one"
    assert kept > TEXTS / 50, "texts that end none, and are let through"


BODY = "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT CASE WHEN true THEN 1 END; END"


@pytest.mark.parametrize(
    "text",
    [
        "-- a comment\rCOMMIT AND CHAIN",
        "SELECT 1; -- x\r COMMIT AND CHAIN",
        "SELECT 1 AS a$b$; COMMIT AND CHAIN; SELECT 1 AS a$b$",
        "SELECT $\u20ac$'$\u20ac$; COMMIT AND CHAIN; SELECT $\u20ac$'$\u20ac$",
        "SELECT $\U0001f600$'$\U0001f600$; COMMIT AND CHAIN; SELECT $\U0001f600$'$\U0001f600$",
        "SELECT E'a'\n'\\' ; '; COMMIT AND CHAIN; SELECT '1'",
        "SELECT x.begin atomic FROM (SELECT 1 AS begin) x; END AND CHAIN",
        f"{BODY}; END AND CHAIN",
        "CREATE FUNCTION f(begin atomic) RETURNS int LANGUAGE sql AS 'SELECT 1'; END AND CHAIN",
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql SET x.y TO begin, atomic AS 'SELECT 1'; END AND CHAIN",
    ],
)
def test_what_only_looks_like_a_literal_or_a_body_hides_no_end(text: str) -> None:
    assert ending_statement(text) in ("COMMIT", "END")


@pytest.mark.parametrize(
    "text",
    [
        BODY,
        f"{BODY};",
        f"SELECT 1; {BODY}; SELECT 1",
        "CREATE OR REPLACE PROCEDURE p() BEGIN ATOMIC END; SELECT 1",
        "SELECT 'COMMIT; ROLLBACK'; SELECT $x$; COMMIT; $x$, $$; END$$",
        "SELECT 'a\\'; SELECT 'COMMIT'; -- '; COMMIT",
        "SAVEPOINT s; ROLLBACK TO s; ROLLBACK WORK /* */ TO SAVEPOINT s",
    ],
)
def test_what_ends_nothing_is_let_through(text: str) -> None:
    assert ending_statement(text) is None


def test_a_backslash_escapes_where_the_server_says_so() -> None:
    text = "SELECT 'a\\'; -- '; COMMIT AND CHAIN; --'"
    assert (ending_statement(text), ending_statement(text, escapes=True)) == (None, "COMMIT")
