"""Jobs in the catalog: `jobs/7`, the record, and `progress/7` are written by the job's runner, `wishes/7` by anybody.

The progress stands beside the record, not in it: it is written every second, by the way, and a record that is written
with its revision in hand must never be in the way of that, nor the other way round.
"""

from __future__ import annotations

from typing import Final

from shardlib.catalog import Catalog, Conflict, Document, Lease
from shardlib.errors import InvalidTopology
from shardlib_ops.reshard.job import Job, Wish, decode_job, encode_job
from shardlib_ops.reshard.progress.model import JobProgress, decode_progress, encode_progress

__all__ = ["JobStore"]

_TRIES: Final = 20


class JobStore:
    """The jobs of a cluster. Blocks; thread-safe as its catalog is.

    A runner's own record is written with the revision that this store has read or written last, so that another
    writer is noticed.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._revisions: dict[int, int] = {}
        self._progress_revisions: dict[int, int | None] = {}

    def load(self, job_id: int) -> Job:
        """A job.

        Raises:
            InvalidTopology: there is none with this id, or its record cannot be read.
            CatalogUnavailable: no answer.
        """
        found = self._catalog.read_document(_job(job_id))
        if found is None:
            raise InvalidTopology(f"there is no job {job_id}", "`list_jobs` shows those there are")
        self._revisions[job_id] = found.revision
        return decode_job(found.data)

    def all(self) -> list[Job]:
        """Every job, oldest first.

        Raises:
            InvalidTopology: a record cannot be read.
            CatalogUnavailable: no answer.
        """
        jobs = [decode_job(found.data) for found in self._catalog.list_documents("jobs/").values()]
        return sorted(jobs, key=lambda job: job.id)

    def open(self) -> list[int]:
        """The ids of the jobs that are not over, oldest first; those whose record cannot be read are among them.

        Raises:
            CatalogUnavailable: no answer.
        """
        found = self._catalog.list_documents("jobs/")
        return sorted(int(name.rpartition("/")[2]) for name, one in found.items() if _open(one.data))

    def create(self, job: Job) -> Job:
        """Store a new job under the next free id; its own `id` does not count.

        Raises:
            Conflict: others create jobs without end.
            CatalogUnavailable: no answer; it may be stored.
        """
        last: Conflict | None = None
        for _ in range(_TRIES):
            numbers = [int(name.rpartition("/")[2]) for name in self._catalog.list_documents("jobs/")]
            numbered = job.changed(id=max(numbers, default=0) + 1)
            try:
                revision = self._catalog.write_document(_job(numbered.id), encode_job(numbered), expected=None)
            except Conflict as conflict:
                last = conflict
                continue
            self._revisions[numbered.id] = revision
            return numbered
        raise last or Conflict(None, None)

    def save(self, job: Job, lease: Lease) -> None:
        """Store the record while the job's lease is held.

        Raises:
            Conflict: another wrote it since this store has read it, or the lease is lost.
            CatalogUnavailable: no answer; the next `save` finds out.
        """
        data = encode_job(job)
        try:
            revision = self._catalog.write_document(
                _job(job.id), data, expected=self._revisions.get(job.id), lease=lease
            )
        except Conflict:
            # An earlier save of this very runner may have arrived after all: only the lease's holder writes.
            found = self._catalog.read_document(_job(job.id))
            if found is None or not lease.alive():
                raise
            revision = self._catalog.write_document(_job(job.id), data, expected=found.revision, lease=lease)
        self._revisions[job.id] = revision

    def progress(self, job_id: int) -> JobProgress | None:
        """How far a job was when its runner wrote that down last; None if none has.

        Raises:
            InvalidTopology: it cannot be read.
            CatalogUnavailable: no answer.
        """
        found = self._catalog.read_document(_progress(job_id))
        return None if found is None else decode_progress(found.data)

    def save_progress(self, progress: JobProgress, lease: Lease) -> None:
        """Store how far a job is, while its lease is held. Tried once: the next one tells more.

        Raises:
            Conflict: the lease is lost.
            CatalogUnavailable: no answer.
        """
        name, data = _progress(progress.job), encode_progress(progress)
        if progress.job not in self._progress_revisions:
            found = self._catalog.read_document(name)
            self._progress_revisions[progress.job] = None if found is None else found.revision
        expected = self._progress_revisions.pop(progress.job)  # whatever fails now, it is read again
        revision = self._catalog.write_document(name, data, expected=expected, lease=lease)
        self._progress_revisions[progress.job] = revision

    def wish(self, job_id: int) -> Wish:
        """What was asked of a job last; `run` if nothing was.

        Raises:
            CatalogUnavailable: no answer.
        """
        found = self._catalog.read_document(_wish(job_id))
        return _wishes(found)[0]

    def ask(self, job_id: int, wish: Wish) -> None:
        """Ask something of a job. The last one asked counts; `run` after `pause` gives back what was asked before it.

        Raises:
            Conflict: others ask without end.
            CatalogUnavailable: no answer; it may have been stored.
        """
        last: Conflict | None = None
        for _ in range(_TRIES):
            found = self._catalog.read_document(_wish(job_id))
            try:
                self._catalog.write_document(
                    _wish(job_id), _after(found, wish), expected=None if found is None else found.revision
                )
            except Conflict as conflict:
                last = conflict
                continue
            return
        raise last or Conflict(None, None)


def _wishes(found: Document | None) -> tuple[Wish, Wish]:
    """What was asked last, and what is asked when a pause ends: `pause rollback` is stored as these two words."""
    if found is None:
        return Wish.RUN, Wish.RUN
    last, _, then = found.data.decode().partition(" ")
    return Wish(last), Wish(then) if then else Wish.RUN


def _after(found: Document | None, wish: Wish) -> bytes:
    last, then = _wishes(found)
    if last is Wish.PAUSE and wish is Wish.RUN:
        return then.value.encode()
    if wish is not Wish.PAUSE:
        return wish.value.encode()
    return f"{wish.value} {then.value if last is Wish.PAUSE else last.value}".encode()


def _open(record: bytes) -> bool:
    try:
        return not decode_job(record).status.over
    except InvalidTopology:
        return True


def _job(job_id: int) -> str:
    return f"jobs/{job_id:d}"


def _progress(job_id: int) -> str:
    return f"progress/{job_id:d}"


def _wish(job_id: int) -> str:
    return f"wishes/{job_id:d}"
