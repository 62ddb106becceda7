"""The place of a bad row is part of the message, whatever raised the error."""

from __future__ import annotations

import pickle

import pytest
from sqlalchemy.exc import DBAPIError

from shardlib.engine.bulk_where import locate
from shardlib.errors import InvalidArgument, InvalidShardKey


def undecodable() -> UnicodeEncodeError:
    try:
        "\ud800".encode()
    except UnicodeEncodeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    "error",
    [
        InvalidShardKey(5, "a column of texts"),
        InvalidArgument("a", "b\0c", "no zero character"),
        TypeError("Not a boolean value: 'yes'"),
        LookupError("'5' is not among the defined enum values"),
        undecodable(),
        DBAPIError.instance("COPY t FROM STDIN", None, ValueError("no such number"), ValueError),
        DBAPIError("COPY t FROM STDIN", None, ValueError("no such number")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_message_names_the_row_and_the_error_stays_what_it_is(error: Exception) -> None:
    before, kind = str(error), type(error)
    locate(error, "row 7 of the load")
    assert "row 7 of the load" in str(error)
    assert before[:20] in str(error)
    assert type(error) is kind


def test_attributes_and_pickles_agree_with_the_message() -> None:
    error = InvalidShardKey(5, "a column of texts")
    locate(error, "row 7")
    again = pickle.loads(pickle.dumps(error))
    assert (again.value, again.reason) == (5, "a column of texts (row 7)")


def test_what_has_no_text_of_its_own_gets_a_note() -> None:
    error = OSError(2, "no such file")
    locate(error, "row 7")
    assert error.__notes__ == ["row 7"]
    assert str(error) == "[Errno 2] no such file"
