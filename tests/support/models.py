"""A small shop, sharded by tenant: what the session tests map."""

from __future__ import annotations

from typing import ClassVar

from sqlalchemy import Column, ForeignKey, ForeignKeyConstraint, Integer, String, Table, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, deferred, mapped_column, relationship


class Base(DeclarativeBase):
    pass


KEY = {"shard_key": True}

order_tag = Table(
    "order_tag",
    Base.metadata,
    Column("tenant_id", String, primary_key=True, info=KEY),
    Column("order_id", Integer, primary_key=True),
    Column("tag_id", Integer, primary_key=True),
    ForeignKeyConstraint(["tenant_id", "order_id"], ["orders.tenant_id", "orders.id"]),
    ForeignKeyConstraint(["tenant_id", "tag_id"], ["tag.tenant_id", "tag.id"]),
)


class Currency(Base):
    __tablename__ = "currency"
    __table_args__: ClassVar = {"info": {"reference": True}}
    code: Mapped[str] = mapped_column(String(3), primary_key=True)
    name: Mapped[str]


class Customer(Base):
    __tablename__ = "customer"
    tenant_id: Mapped[str] = mapped_column(primary_key=True, info=KEY)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]
    notes: Mapped[str | None] = deferred(Column(Text))
    orders: Mapped[list[Order]] = relationship(back_populates="customer", order_by="Order.id")


class Order(Base):
    __tablename__ = "orders"
    __table_args__ = (ForeignKeyConstraint(["tenant_id", "customer_id"], ["customer.tenant_id", "customer.id"]),)
    tenant_id: Mapped[str] = mapped_column(primary_key=True, info=KEY)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    customer_id: Mapped[int | None]
    total: Mapped[int] = mapped_column(default=0)
    currency: Mapped[str | None] = mapped_column(ForeignKey("currency.code"))
    customer: Mapped[Customer | None] = relationship(back_populates="orders")
    tags: Mapped[list[Tag]] = relationship(
        secondary=order_tag,
        primaryjoin="and_(Order.tenant_id == order_tag.c.tenant_id, Order.id == order_tag.c.order_id)",
        secondaryjoin="and_(Tag.tenant_id == order_tag.c.tenant_id, Tag.id == order_tag.c.tag_id)",
        overlaps="customer,orders",
    )


class Tag(Base):
    __tablename__ = "tag"
    tenant_id: Mapped[str] = mapped_column(primary_key=True, info=KEY)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    label: Mapped[str]


class Payment(Base):
    __tablename__ = "payment"
    tenant_id: Mapped[str] = mapped_column(primary_key=True, info=KEY)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str]
    __mapper_args__: ClassVar = {"polymorphic_on": "kind", "polymorphic_identity": "payment"}


class CardPayment(Payment):
    __tablename__ = "card_payment"
    __table_args__ = (ForeignKeyConstraint(["tenant_id", "id"], ["payment.tenant_id", "payment.id"]),)
    tenant_id: Mapped[str] = mapped_column(primary_key=True, info=KEY)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    card: Mapped[str]
    __mapper_args__: ClassVar = {"polymorphic_identity": "card"}
