"""Documents beside the topology, alike in memory, etcd and PostgreSQL: compare-and-swap, leases, lost replies."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from shardlib.catalog import Catalog, Conflict, open_catalog
from shardlib.catalog.stored import StoredCatalog
from shardlib.errors import CatalogUnavailable, InvalidArgument


@pytest.fixture(params=["memory", "etcd", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    found: str = request.getfixturevalue("etcd_url" if request.param == "etcd" else "database")
    return found


@pytest.fixture
def catalog(url: str) -> Iterator[StoredCatalog]:
    opened = open_catalog(url)
    assert isinstance(opened, StoredCatalog)
    yield opened
    opened.close()


@pytest.fixture
def other(url: str) -> Iterator[Catalog]:
    opened = open_catalog(url)
    yield opened
    opened.close()


def test_what_is_written_is_read_by_another(catalog: Catalog, other: Catalog) -> None:
    assert catalog.read_document("jobs/1") is None
    assert catalog.list_documents("jobs/") == {}
    first = catalog.write_document("jobs/1", b"one", expected=None)
    second = catalog.write_document("jobs/2", b"\0two", expected=None)
    catalog.write_document("wishes/1", b"x", expected=None)
    assert second > first
    assert other.read_document("jobs/1") == (b"one", first)
    assert other.list_documents("jobs/") == {"jobs/1": (b"one", first), "jobs/2": (b"\0two", second)}
    third = other.write_document("jobs/1", b"uno", expected=first)
    assert catalog.read_document("jobs/1") == (b"uno", third)


def test_many_documents_are_all_listed(catalog: Catalog) -> None:
    names = [f"jobs/{number}" for number in range(300)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: catalog.write_document(name, b"x" * 2000, expected=None), names))
    assert set(catalog.list_documents("jobs/")) == set(names)


@pytest.mark.parametrize("expected", [None, 1])
def test_another_revision_is_a_conflict(catalog: Catalog, other: Catalog, expected: int | None) -> None:
    stored = other.write_document("jobs/1", b"one", expected=None)
    with pytest.raises(Conflict) as raised:
        catalog.write_document("jobs/1", b"two", expected=expected if expected is None else stored + 7)
    assert raised.value.found == stored
    assert catalog.read_document("jobs/1") == (b"one", stored)


def test_replacing_what_is_not_there_is_a_conflict(catalog: Catalog) -> None:
    with pytest.raises(Conflict) as raised:
        catalog.write_document("jobs/1", b"two", expected=4)
    assert raised.value.found is None


def test_of_many_writers_one_wins(catalog: Catalog, other: Catalog) -> None:
    stored = catalog.write_document("jobs/1", b"", expected=None)

    def attempt(number: int) -> bool:
        try:
            (catalog, other)[number % 2].write_document("jobs/1", str(number).encode(), expected=stored)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(attempt, range(16))) == 1


def test_a_lost_lease_keeps_its_holder_from_writing(catalog: StoredCatalog, other: Catalog) -> None:
    lease = catalog.acquire("job-1", ttl_s=1, holder="a")
    assert lease is not None
    stored = catalog.write_document("jobs/1", b"a", expected=None, lease=lease)

    def stopped(*_: object) -> bool:
        raise CatalogUnavailable("test", "the holder is cut off")

    catalog._store.renew = stopped  # type: ignore[method-assign]
    successor = other.acquire("job-1", ttl_s=5, holder="b", wait_s=10)
    assert successor is not None
    lease.alive = lambda: True  # type: ignore[method-assign] # a holder whose clock stood still
    with pytest.raises(Conflict):
        catalog.write_document("jobs/1", b"late", expected=stored, lease=lease)
    with pytest.raises(Conflict):
        catalog.write_document("jobs/9", b"late", expected=None, lease=lease)
    other.write_document("jobs/1", b"b", expected=stored, lease=successor)
    assert catalog.read_document("jobs/1")[0] == b"b"  # type: ignore[index]
    successor.release()


def test_a_lost_reply_of_a_write_that_happened_is_settled(catalog: StoredCatalog, other: Catalog) -> None:
    store = catalog._store
    swap, sent = store.swap_document, []

    def lost(*arguments: object) -> int | None:
        sent.append(swap(*arguments))  # type: ignore[arg-type]
        raise CatalogUnavailable("test", "the reply is lost")

    store.swap_document = lost  # type: ignore[method-assign]
    revision = catalog.write_document("jobs/1", b"one", expected=None)
    assert sent == [revision], "sent once"
    assert other.read_document("jobs/1") == (b"one", revision)


def test_a_lost_request_that_another_overtook_is_a_conflict(catalog: StoredCatalog, other: Catalog) -> None:
    def lost(*_: object) -> int | None:
        other.write_document("jobs/1", b"one", expected=None)  # the same content, and yet not this write
        raise CatalogUnavailable("test", "the request is lost")

    catalog._store.swap_document = lost  # type: ignore[method-assign]
    with pytest.raises(Conflict):
        catalog.write_document("jobs/1", b"one", expected=None)


def test_what_cannot_be_settled_is_said(url: str) -> None:
    catalog = open_catalog(url, timeout_s=0.5)
    assert isinstance(catalog, StoredCatalog)
    sent: list[object] = []

    def lost(*arguments: object) -> int | None:
        sent.append(arguments)
        raise CatalogUnavailable("test", "the request is lost")

    catalog._store.swap_document = lost  # type: ignore[method-assign]
    with pytest.raises(CatalogUnavailable, match="writing document 'jobs/1' was not answered"):
        catalog.write_document("jobs/1", b"one", expected=None)
    assert len(sent) == 1
    catalog.close()


@pytest.mark.parametrize("name", ["", "x" * 201, "a b", "jobs/ü"])
def test_a_bad_name_is_refused(catalog: Catalog, name: str) -> None:
    with pytest.raises(InvalidArgument):
        catalog.write_document(name, b"", expected=None)


def test_a_huge_document_is_refused(catalog: Catalog) -> None:
    with pytest.raises(InvalidArgument, match="bytes"):
        catalog.write_document("jobs/1", b"x" * 1_000_001, expected=None)
