"""The tables of the demo: two sharded by the tail number of a plane, two that every shard has whole."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

__all__ = ["Airline", "Airport", "Base", "Flight", "Plane"]


_REFERENCE: Final = {"info": {"reference": True}}


class Base(DeclarativeBase):
    """Of all tables of the demo."""


class Airline(Base):
    """A reference table: small, seldom changed, and joined on every shard."""

    __tablename__ = "airlines"
    __table_args__ = _REFERENCE

    carrier: Mapped[str] = mapped_column(String(2), primary_key=True)
    name: Mapped[str]


class Airport(Base):
    """A reference table."""

    __tablename__ = "airports"
    __table_args__ = _REFERENCE

    faa: Mapped[str] = mapped_column(String(3), primary_key=True)
    name: Mapped[str]


class Plane(Base):
    """Sharded by its tail number."""

    __tablename__ = "planes"

    tailnum: Mapped[str] = mapped_column(
        primary_key=True,
        info={"shard_key": True},  # all that shardlib asks for
    )
    manufacturer: Mapped[str | None]
    model: Mapped[str | None]
    seats: Mapped[int]
    inspections: Mapped[int] = mapped_column(default=0)
    flights: Mapped[list[Flight]] = relationship(order_by="Flight.departs")


class Flight(Base):
    """Sharded by the tail number too: a plane and all its flights are on one shard, held together by a foreign key.

    The shard key is part of the primary key, as in every sharded table: each shard can then see by itself that no row
    is there twice.
    """

    __tablename__ = "flights"

    tailnum: Mapped[str] = mapped_column(ForeignKey(Plane.tailnum), primary_key=True, info={"shard_key": True})
    departs: Mapped[datetime] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    carrier: Mapped[str] = mapped_column(ForeignKey(Airline.carrier))
    origin: Mapped[str] = mapped_column(String(3))
    dest: Mapped[str] = mapped_column(String(3))
    delay: Mapped[int | None]
    distance: Mapped[int]
    airline: Mapped[Airline] = relationship()
