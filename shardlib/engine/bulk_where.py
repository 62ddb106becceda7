"""Which row of a load an error is about, said in the error's own message."""

from __future__ import annotations

from sqlalchemy.exc import StatementError

from shardlib.errors import InvalidArgument, InvalidShardKey

__all__ = ["locate"]


def locate(error: BaseException, where: str) -> None:
    """Add a place to the message of an error that is on its way.

    The error keeps its type and its attributes, so that who catches it by them still does. It becomes a note
    (`__notes__`) where there is no text to add it to: an error of another library that builds its message itself.

    Args:
        error: what a value, a type of SQLAlchemy or the server has raised.
        where: such as `row 7 of the load`.
    """
    if isinstance(error, StatementError):
        error.add_detail(where)
    elif isinstance(error, InvalidShardKey):
        error.reason = f"{error.reason} ({where})"
        error.args = (error.value, error.reason)
    elif isinstance(error, InvalidArgument):
        error.allowed = f"{error.allowed} ({where})"
        error.args = (error.name, error.value, error.allowed)
    elif isinstance(error, UnicodeError) and hasattr(error, "reason"):
        error.reason = f"{error.reason} ({where})"
    elif len(error.args) == 1 and str(error) == error.args[0]:
        error.args = (f"{error.args[0]} ({where})",)
    else:
        error.add_note(where)
