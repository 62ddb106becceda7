"""A SELECT of several shards is either refused or answered as one database would."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from sqlalchemy import Integer, bindparam, distinct, func, insert, literal_column, select, text, update
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import ColumnElement

from shardlib import errors
from tests.support.models import Customer, Order


class CountAll(ColumnElement[int]):
    """An element of an application, which may render anything."""

    inherit_cache = True
    type = Integer()


@compiles(CountAll)
def _count_all(element: Any, compiler: Any, **kw: Any) -> str:
    return "count(*)"


@pytest.fixture
def filled(facade: Any, keys: list[str]) -> list[str]:
    def body(s: Any) -> None:
        s.execute(insert(Customer), [{"tenant_id": key, "id": n, "name": "same"} for key in keys for n in (1, 2)])
        s.execute(insert(Order), [{"tenant_id": key, "id": 1} for key in keys])
        s.commit()

    facade.session(body, twophase=True)
    return keys


@pytest.mark.filterwarnings("ignore:Column-expression-level unary")
@pytest.mark.parametrize(
    ("statement", "why"),
    [
        (select(distinct(Customer.name)), "DISTINCT"),
        (select(Customer.name.distinct().label("one")), "DISTINCT"),
        (select(func.distinct(Customer.name)), "DISTINCT"),
        (select(Customer.name).prefix_with("DISTINCT"), "a text fragment with DISTINCT"),
        (select(text("DISTINCT name")).select_from(Customer), "a text fragment with DISTINCT"),
        (select(literal_column("DISTINCT name")).select_from(Customer), "a text fragment with DISTINCT"),
        (select(Customer.name).suffix_with("LIMIT 1"), "a text fragment with LIMIT"),
        (select(Customer.name).suffix_with("ORDER BY name LIMIT 1"), "a text fragment with ORDER"),
        (select(Customer.name).with_statement_hint("LIMIT 1"), "a text fragment with LIMIT"),
        (select(Customer.name).where(text("id > 0 LIMIT 1")), "a text fragment with LIMIT"),
        (select(Customer.name).group_by(Customer.tenant_id, text("name HAVING true")), "a text fragment with HAVING"),
        (select(CountAll()).select_from(Customer), "the element CountAll"),
    ],
)
def test_what_cuts_rows_unseen_is_refused_over_shards(facade: Any, filled: list[str], statement: Any, why: str) -> None:
    with pytest.raises(errors.UnsupportedCrossShardQuery, match=f"^{why}"):
        facade.session(lambda s: s.execute(statement).all())
    keyed = statement.where(Customer.tenant_id == filled[0])
    if "LIMIT" not in why:
        assert facade.session(lambda s: s.execute(keyed).all()), "one shard answers for itself"


def test_text_of_an_on_clause_adds_no_clause(facade: Any, filled: list[str]) -> None:
    statement = select(Customer.name).join(Order, text("true LIMIT 1"))
    with pytest.raises(errors.UnsupportedOperation, match="'LIMIT'"):
        facade.session(lambda s: s.execute(statement).all())


@pytest.fixture
def functions(shop: Any) -> None:
    for server in shop.servers:
        with psycopg.connect(server.dsn) as conn:
            conn.execute(
                "CREATE OR REPLACE FUNCTION total_orders() RETURNS bigint LANGUAGE sql STABLE "
                "AS 'SELECT count(*) FROM orders'"
            )
            conn.execute(
                "CREATE OR REPLACE FUNCTION slug(value text) RETURNS text LANGUAGE sql IMMUTABLE "
                "AS 'SELECT lower(value)'"
            )


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize("form", ["where", "where of one key", "column of one key", "text", "update"])
def test_a_function_that_may_read_other_rows_is_refused(facade: Any, filled: list[str], form: str) -> None:
    one = Customer.tenant_id == filled[0]
    statement = {
        "where": select(Customer.tenant_id).where(func.total_orders() == len(filled)),
        "where of one key": select(Customer.tenant_id).where(one, func.total_orders() == len(filled)),
        "column of one key": select(func.total_orders()).select_from(Customer).where(one),
        "text": select(Customer.tenant_id).where(one, text("total_orders() = 1")),
        "update": update(Customer).where(one).values(id=func.total_orders()),
    }[form]
    with pytest.raises(errors.UnsupportedCrossShardQuery, match=r"the function total_orders\(\)"):
        facade.session(lambda s: s.execute(statement))


@pytest.mark.usefixtures("functions")
def test_a_function_of_its_row_is_let_through_when_said_so(facade: Any, filled: list[str]) -> None:
    statement = select(func.slug(Customer.name)).where(func.slug(Customer.tenant_id) == filled[0])
    with pytest.raises(errors.UnsupportedCrossShardQuery, match=r"row_functions=\('slug',\)"):
        facade.session(lambda s: s.scalars(statement).all())
    options = {"row_functions": ("slug",)}
    assert facade.session(lambda s: s.scalars(statement, execution_options=options).all()) == ["same", "same"]
    assert facade.session(lambda s: s.scalars(statement.execution_options(**options)).all()) == ["same", "same"]
    assert facade.session(lambda s: s.scalars(statement).all(), filled[0]) == ["same", "same"]


def test_an_iterator_as_a_list_of_keys_is_refused(facade: Any, filled: list[str]) -> None:
    statement = select(Order.id).where(Order.tenant_id.in_(bindparam("keys", expanding=True)))
    with pytest.raises(errors.UnsupportedOperation, match="give a list"):
        facade.session(lambda s: s.execute(statement, {"keys": iter(filled)}).all())
    assert len(facade.session(lambda s: s.execute(statement, {"keys": filled}).all())) == len(filled)
