"""The audit log in etcd, in PostgreSQL, in a catalog of PostgreSQL and in a file: one suite for all."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from shardlib.catalog import Catalog, open_catalog
from shardlib.catalog.stored import StoredCatalog
from shardlib.errors import CatalogUnavailable
from shardlib_ops.audit import GENESIS, AuditStore, AuditUnavailable, Damaged, Entry, open_audit, verify, walk
from shardlib_ops.audit.in_catalog import CatalogAudit
from shardlib_ops.audit.in_postgres import PostgresAudit
from tests.support.audits import append_from_threads, some_draft

ROOT = Path(__file__).parent.parent.parent
Open = Callable[[], AuditStore]


@pytest.fixture(params=["etcd", "catalog in PostgreSQL", "PostgreSQL", "file"])
def urls(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """URL of the log and of the catalog, which is empty where none is needed."""
    if request.param == "etcd":
        return "catalog:", request.getfixturevalue("etcd_url")
    if request.param == "catalog in PostgreSQL":
        return "catalog:", f"{request.getfixturevalue('database')}?catalog=audited"
    if request.param == "PostgreSQL":
        return f"{request.getfixturevalue('database')}?log=one", ""
    return f"file:{tmp_path / 'audit.jsonl'}", ""


@pytest.fixture
def opened(urls: tuple[str, str]) -> Iterator[Open]:
    """Opens the log anew, as another process would."""
    stores: list[AuditStore] = []
    catalogs: list[Catalog] = []

    def open_() -> AuditStore:
        if urls[1]:
            catalogs.append(open_catalog(urls[1]))
        stores.append(open_audit(urls[0], catalogs[-1] if urls[1] else None))
        return stores[-1]

    yield open_
    for one in (*stores, *catalogs):
        one.close()


@pytest.fixture
def store(opened: Open) -> AuditStore:
    return opened()


def numbers(store: AuditStore) -> list[int]:
    return [item.seq for item in walk(store) if isinstance(item, Entry)]


def test_an_empty_log_is_read_and_verified(store: AuditStore) -> None:
    assert store.head() == GENESIS
    assert store.read() == ((), 0, False)
    assert store.last(10).items == ()
    assert store.cut(0) == 0


def test_entries_are_chained_and_read_by_another(store: AuditStore, opened: Open) -> None:
    written = [store.append(some_draft(f"shard-{number}")) for number in range(5)]
    assert [entry.seq for entry in written] == [1, 2, 3, 4, 5]
    other = opened()
    assert other.head() == written[-1].head
    assert list(walk(other)) == written
    assert verify(walk(other)) == []
    sixth = other.append(some_draft("other"))
    seventh = store.append(some_draft("one that did not see it"))
    assert (sixth.seq, seventh.seq, seventh.prev) == (6, 7, sixth.hash)


def test_pages_go_on_where_the_last_one_ended(store: AuditStore) -> None:
    for _ in range(7):
        store.append(some_draft())
    after, seen = 0, []
    while True:
        page = store.read(after, 3)
        seen += [item.seq for item in page.items if isinstance(item, Entry)]
        after = page.after
        if not page.more:
            break
    assert seen == [1, 2, 3, 4, 5, 6, 7]
    assert store.read(after).items == ()
    eighth = store.append(some_draft())
    assert store.read(after).items == (eighth,)
    assert [item.seq for item in store.last(3).items if isinstance(item, Entry)] == [6, 7, 8]


def test_a_log_of_several_pages_is_read_whole_and_its_end_is_found_at_once(
    store: AuditStore, opened: Open, urls: tuple[str, str]
) -> None:
    count = 230
    for _ in range(count):
        newest = store.append(some_draft())
    assert numbers(store) == list(range(1, count + 1))
    late = opened()
    if isinstance(late, CatalogAudit):
        calls = counted(late)
        assert late.append(some_draft()).prev == newest.hash
        assert len(calls) <= 6, f"what an append costs does not grow with the log: {calls}"
        del calls[:]
        late.append(some_draft())
        assert calls == ["write_document"]
    else:
        assert late.append(some_draft()).prev == newest.hash
    end = late.head().seq
    assert [item.seq for item in late.last(120).items if isinstance(item, Entry)] == list(range(end - 119, end + 1))
    assert verify(walk(late)) == []


def counted(store: CatalogAudit) -> list[str]:
    """The names of the calls of the catalog from here on."""
    calls: list[str] = []
    catalog = store._catalog

    class Counting:
        safe_url = catalog.safe_url

        def __getattr__(self, name: str) -> object:
            calls.append(name)
            return getattr(catalog, name)

    store._catalog = Counting()  # type: ignore[assignment]
    return calls


@pytest.mark.timeout(240)
def test_s07_24_two_processes_of_eight_threads_lose_nothing_and_fork_nothing(
    urls: tuple[str, str], opened: Open
) -> None:
    command = [sys.executable, "-m", "tests.support.audits", *urls]
    running = [
        subprocess.Popen([*command, name, "8", "8"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    told: dict[int, str] = {}
    for process in running:
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0
        for line in out.splitlines():
            seq, target = line.split()
            assert int(seq) not in told, "one place was given to two"
            told[int(seq)] = target
    store = opened()
    stored = {item.seq: item.target for item in walk(store) if isinstance(item, Entry)}
    assert stored == told
    assert sorted(stored) == list(range(1, 129))
    assert verify(walk(store)) == []


def test_threads_of_one_process_take_their_turns(store: AuditStore) -> None:
    told = append_from_threads(store, "t", 8, 5)
    assert sorted(seq for seq, _ in told) == list(range(1, 41))
    assert verify(walk(store)) == []


def test_a_writer_that_slept_does_not_write_where_entries_were_archived(store: AuditStore, opened: Open) -> None:
    sleeper = opened()
    sleeper.append(some_draft("before it slept"))
    for _ in range(4):
        store.append(some_draft())
    assert store.cut(3) == 3
    late = sleeper.append(some_draft("after it woke up"))
    assert late.seq == 6
    assert numbers(store) == [4, 5, 6]
    assert opened().append(some_draft()).prev == late.hash


def test_what_was_cut_is_gone_and_the_rest_stays(store: AuditStore, opened: Open) -> None:
    entries = [store.append(some_draft(f"target-{number}")) for number in range(130)]
    assert store.cut(110) == 110
    assert store.cut(110) == 0, "the same again changes nothing"
    assert list(walk(opened())) == entries[110:]
    assert opened().read(0, 5).items[0] == entries[110]
    assert opened().head() == entries[-1].head


def test_what_comes_while_old_entries_are_cut_is_kept(store: AuditStore, opened: Open) -> None:
    for _ in range(40):
        store.append(some_draft())
    cutter, writers = opened(), [opened() for _ in range(3)]
    with ThreadPoolExecutor(4) as threads:
        told = [
            threads.submit(append_from_threads, writer, str(number), 1, 12) for number, writer in enumerate(writers)
        ]
        for through in range(1, 37, 5):
            cutter.cut(through)
        acknowledged = {one for part in told for one in part.result(60)}
    left = {(item.seq, item.target) for item in walk(opened()) if isinstance(item, Entry)}
    assert acknowledged <= left
    assert sorted(seq for seq, _ in left) == list(range(37, 77))
    # No checkpoint says so here: that is the one thing to be found.
    assert [(one.kind, one.seq) for one in verify(walk(opened()))] == [("removed", 1)]


def test_a_log_that_was_cut_behind_its_back_goes_on_and_the_hole_stays(
    store: AuditStore, urls: tuple[str, str], opened: Open
) -> None:
    """A writer that runs knows how far it was: what is missing is found, not written over."""
    for _ in range(6):
        store.append(some_draft())
    remove(urls, 5, 6)
    assert store.append(some_draft()).seq == (5 if urls[0].startswith("file:") else 7)
    found = verify(walk(opened()))
    if not urls[0].startswith("file:"):  # that needs a signed head
        assert [(one.kind, one.seq) for one in found] == [("removed", 5)]


def remove(urls: tuple[str, str], first: int, last: int) -> None:
    """As somebody would who may write the store."""
    if urls[0].startswith("file:"):
        path = Path(urls[0].removeprefix("file:"))
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[: first - 1] + lines[last:]))
        return
    if urls[1].startswith("etcd:"):
        with closing(open_catalog(urls[1])) as catalog:
            store = catalog._store  # type: ignore[attr-defined]
            from shardlib.catalog.store import Deadline

            names = [store._documents + f"audit/{seq:012d}".encode() for seq in range(first, last + 1)]
            store._client.delete_many(names, Deadline(5))
        return
    dsn = (urls[1] or urls[0]).partition("?")[0]
    with psycopg.connect(dsn, autocommit=True) as connection:
        if urls[1]:
            connection.execute(
                "DELETE FROM shardlib_catalog.document WHERE name BETWEEN %s AND %s",
                (f"audit/{first:012d}", f"audit/{last:012d}"),
            )
        else:
            connection.execute("ALTER TABLE shardlib_audit.entry DISABLE TRIGGER ALL")
            connection.execute("DELETE FROM shardlib_audit.entry WHERE seq BETWEEN %s AND %s", (first, last))


def test_an_entry_that_cannot_be_read_is_shown_as_such_and_the_log_goes_on(
    store: AuditStore, urls: tuple[str, str], opened: Open
) -> None:
    for _ in range(3):
        store.append(some_draft())
    damage(urls, 3)
    late = opened()
    assert late.append(some_draft()).seq == 4
    items = list(walk(late))
    assert [isinstance(item, Damaged) for item in items] == [False, False, True, False]
    assert [(one.kind, one.seq) for one in verify(items)] == [("changed", 3)]


def damage(urls: tuple[str, str], seq: int) -> None:
    if urls[0].startswith("file:"):
        path = Path(urls[0].removeprefix("file:"))
        lines = path.read_bytes().splitlines(keepends=True)
        lines[seq - 1] = b'{"seq": 3}\n'
        path.write_bytes(b"".join(lines))
    elif urls[1]:
        with closing(open_catalog(urls[1])) as catalog:
            document = catalog.read_document(f"audit/{seq:012d}")
            assert document is not None
            catalog.write_document(f"audit/{seq:012d}", b'{"seq": 3}', expected=document.revision)
    else:
        with psycopg.connect(urls[0].partition("?")[0], autocommit=True) as connection:
            connection.execute("ALTER TABLE shardlib_audit.entry DISABLE TRIGGER ALL")
            connection.execute("UPDATE shardlib_audit.entry SET body = '{\"seq\": 3}' WHERE seq = %s", (seq,))


@pytest.mark.parametrize("urls", ["etcd", "catalog in PostgreSQL"], indirect=True)
def test_a_lost_reply_of_the_catalog_is_settled_by_reading_back(store: AuditStore, opened: Open) -> None:
    assert isinstance(store, CatalogAudit)
    store.append(some_draft("first"))
    catalog = store._catalog
    assert isinstance(catalog, StoredCatalog)
    swap, sent = catalog._store.swap_document, []

    def lost(*arguments: object) -> int | None:
        sent.append(swap(*arguments))  # type: ignore[arg-type]
        raise CatalogUnavailable("test", "the reply is lost")

    catalog._store.swap_document = lost  # type: ignore[method-assign]
    entry = store.append(some_draft("second"))
    assert len(sent) == 1, "sent once"
    del catalog._store.swap_document
    assert list(walk(opened()))[1:] == [entry]
    assert store.append(some_draft("third")).prev == entry.hash


@pytest.mark.parametrize("urls", ["etcd", "catalog in PostgreSQL"], indirect=True)
@pytest.mark.parametrize("happened", [True, False])
def test_a_write_whose_outcome_is_unknown_is_made_again_and_happens_once(
    store: AuditStore, opened: Open, happened: bool
) -> None:
    """The catalog gave up on it, as while its members choose a leader."""
    assert isinstance(store, CatalogAudit)
    store.append(some_draft("first"))
    write, sent = store._catalog.write_document, []

    def unknown(name: str, data: bytes, *, expected: int | None) -> int:
        sent.append((name, data))
        if len(sent) < 3:
            if happened and len(sent) == 1:
                write(name, data, expected=expected)
            raise CatalogUnavailable("test", "no answer")
        return write(name, data, expected=expected)

    store._catalog.write_document = unknown  # type: ignore[method-assign, assignment]
    entry = store.append(some_draft("second"))
    assert sent == [sent[0]] * 3, "the same in the same place"
    assert list(walk(opened()))[1:] == [entry]
    # And where another took the place meanwhile, it gets the next one.
    del sent[:]
    late = opened().append(some_draft("of another"))
    entry = store.append(some_draft("third"))
    assert (entry.seq, entry.prev) == (late.seq + 1, late.hash)
    assert verify(walk(opened())) == []


@pytest.mark.parametrize("urls", ["etcd"], indirect=True)
@pytest.mark.parametrize("mark", [None, b"{", b'{"seq": 40, "hash": "ff"}'])
def test_the_end_is_found_without_the_mark(store: AuditStore, opened: Open, mark: bytes | None) -> None:
    """The mark saves a search; a wrong one shows as a hole, and not as another beginning."""
    assert isinstance(store, CatalogAudit)
    last = [store.append(some_draft()) for _ in range(40)][-1]
    if mark is None:
        catalog = store._catalog._store  # type: ignore[attr-defined]
        from shardlib.catalog.store import Deadline

        catalog._client.delete_many([catalog._documents + b"audit-head"], Deadline(5))
    else:
        document = store._catalog.read_document("audit-head")
        assert document is not None
        store._catalog.write_document("audit-head", mark, expected=document.revision)
    late = opened()
    assert late.append(some_draft()).head == late.head() == store.head()
    assert (late.head().seq, verify(walk(late))) == (last.seq + 1, [])


@pytest.mark.parametrize("urls", ["PostgreSQL"], indirect=True)
def test_rows_are_not_changed_in_postgresql(store: AuditStore, urls: tuple[str, str]) -> None:
    store.append(some_draft())
    with psycopg.connect(urls[0].partition("?")[0], autocommit=True) as connection:
        for statement in ("UPDATE shardlib_audit.entry SET body = ''", "DELETE FROM shardlib_audit.entry",
                          "TRUNCATE shardlib_audit.entry"):  # fmt: skip
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)
    assert numbers(store) == [1]


@pytest.mark.parametrize("urls", ["PostgreSQL"], indirect=True)
def test_a_role_that_may_insert_and_read_is_enough(store: AuditStore, urls: tuple[str, str]) -> None:
    dsn = urls[0].partition("?")[0]
    role = f"writer_{uuid.uuid4().hex[:8]}"
    parts = psycopg.conninfo.conninfo_to_dict(dsn)
    theirs = f"postgresql://{role}:pw@{parts['host']}:{parts['port']}/{parts['dbname']}?log=one"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'pw'")
        try:
            with closing(open_audit(theirs)) as before, pytest.raises(AuditUnavailable, match="CREATE ON DATABASE"):
                before.append(some_draft())
            store.append(some_draft())
            with closing(open_audit(theirs)) as refused, pytest.raises(AuditUnavailable, match="shardlib_audit"):
                refused.append(some_draft())
            connection.execute(f"GRANT USAGE ON SCHEMA shardlib_audit TO {role}")
            connection.execute(f"GRANT SELECT, INSERT ON shardlib_audit.entry TO {role}")
            with closing(open_audit(theirs)) as writer:
                assert writer.append(some_draft()).seq == 2
                with pytest.raises(AuditUnavailable, match="permission denied"):
                    writer.cut(1)
        finally:
            connection.execute(f"DROP OWNED BY {role}")
            connection.execute(f"DROP ROLE {role}")
    assert numbers(store) == [1, 2]


@pytest.mark.parametrize("urls", ["PostgreSQL"], indirect=True)
def test_a_lost_reply_of_postgresql_is_settled_by_reading_back(store: AuditStore, opened: Open) -> None:
    assert isinstance(store, PostgresAudit)
    store.append(some_draft())
    run, sent = store._door.run, []

    def lost(statement: str, *rest: object, **options: object) -> object:
        found = run(statement, *rest, **options)  # type: ignore[arg-type]
        if statement.lstrip().startswith("INSERT"):
            sent.append(found)
            raise CatalogUnavailable("test", "the reply is lost")
        return found

    store._door.run = lost  # type: ignore[method-assign, assignment]
    entry = store.append(some_draft("second"))
    assert len(sent) == 1
    assert list(walk(opened()))[1:] == [entry]


@pytest.mark.parametrize("urls", ["PostgreSQL"], indirect=True)
def test_an_entry_is_on_disk_also_where_the_server_does_not_wait_for_it(
    store: AuditStore, urls: tuple[str, str]
) -> None:
    dsn = urls[0].partition("?")[0]
    name = dsn.rpartition("/")[2]
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
        store.append(some_draft())
        written, inserted = "SELECT pg_current_wal_flush_lsn()", "SELECT pg_current_wal_insert_lsn()"
        before = connection.execute(inserted).fetchone()
        store.append(some_draft())
        assert connection.execute(f"SELECT ({written}) > %s::pg_lsn", before).fetchone() == (True,)
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SHOW synchronous_commit").fetchone() == ("off",)


@pytest.mark.parametrize("urls", ["file"], indirect=True)
class TestFile:
    def test_only_its_owner_may_read_it(self, store: AuditStore, urls: tuple[str, str]) -> None:
        store.append(some_draft())
        assert Path(urls[0].removeprefix("file:")).stat().st_mode & 0o777 == 0o600

    def test_a_line_that_was_never_written_whole_is_taken_away(
        self, store: AuditStore, urls: tuple[str, str], opened: Open, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = store.append(some_draft())
        with Path(urls[0].removeprefix("file:")).open("ab") as file:
            file.write(b'{"seq":2,"half')
        late = opened()
        assert late.head() == first.head
        assert list(walk(late)) == [first]
        second = late.append(some_draft())
        assert "no whole line" in caplog.text
        assert list(walk(store)) == [first, second]

    def test_a_file_that_another_holds_is_waited_for_and_given_up(self, urls: tuple[str, str]) -> None:
        import fcntl

        store = open_audit(urls[0], timeout_s=0.3)
        store.append(some_draft())
        with Path(urls[0].removeprefix("file:")).open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with pytest.raises(AuditUnavailable, match="another process held the file"):
                store.append(some_draft())
            threading.Timer(0.1, fcntl.flock, (held, fcntl.LOCK_UN)).start()
            assert open_audit(urls[0], timeout_s=20).append(some_draft()).seq == 2

    def test_lines_longer_than_a_block_are_read_from_the_end(self, store: AuditStore, opened: Open) -> None:
        big = {f"name-{number}": "x" * 900 for number in range(60)}
        entries = [store.append(some_draft(details=big)) for _ in range(4)]
        assert opened().head() == entries[-1].head
        assert list(opened().last(3).items) == entries[1:]
        assert list(opened().last(9).items) == entries

    def test_a_link_in_its_place_is_not_followed(self, urls: tuple[str, str], tmp_path: Path) -> None:
        (tmp_path / "elsewhere").write_bytes(b"")
        Path(urls[0].removeprefix("file:")).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(AuditUnavailable):
            open_audit(urls[0]).append(some_draft())

    def test_a_folder_that_is_not_there_is_said(self, tmp_path: Path, urls: tuple[str, str]) -> None:
        with pytest.raises(AuditUnavailable, match="No such file"):
            open_audit(f"file:{tmp_path / 'none' / 'audit'}").append(some_draft())
