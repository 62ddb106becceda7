"""The chain of the audit log: whatever is done to it behind its back is found, and nothing else is."""

from __future__ import annotations

import hashlib
import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlib_ops.audit import Actor, Damaged, Entry, Head, sign_head, verify
from shardlib_ops.audit.entry import GENESIS, decode, draft, encode, hash_of, seal
from tests.support.audits import chain, some_draft

KEY = b"k" * 32
texts = st.text(max_size=30)


def kinds(entries: list[Entry | Damaged] | list[Entry], heads: list[str] | None = None) -> set[str]:
    return {one.kind for one in verify(entries, heads or [], KEY)}


def resealed(entry: Entry, **changes: object) -> Entry:
    changed = msgspec.structs.replace(entry, **changes)
    return msgspec.structs.replace(changed, hash=hash_of(changed))


@given(st.integers(0, 40))
def test_a_log_as_it_was_written_is_whole(count: int) -> None:
    entries = chain(count)
    heads = [sign_head(KEY, entry.head) for entry in entries]
    assert verify(entries, heads, KEY) == []


@given(actor=st.builds(Actor, texts, st.none() | texts, st.none() | texts, st.none() | texts),
       action=texts, target=texts, details=st.dictionaries(texts, texts, max_size=4), result=texts)  # fmt: skip
def test_an_entry_is_stored_and_read_as_it_is(
    actor: Actor, action: str, target: str, details: dict[str, str], result: str
) -> None:
    new = draft(
        id="1", at="2026", kind="refused", actor=actor, action=action, target=target, details=details, result=result
    )
    entry = seal(new, Head(6, "a" * 64))
    line = encode(entry)
    assert decode(line, 7) == entry
    assert line.decode().isprintable(), "one line, whatever was in it"
    # As the documentation tells others to compute it.
    plain = json.loads(line) | {"hash": ""}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == entry.hash


@given(st.data())
def test_s07_24_removed_entries_are_found(data: st.DataObject) -> None:
    entries = chain(data.draw(st.integers(2, 20)))
    first = data.draw(st.integers(0, len(entries) - 2))
    last = data.draw(st.integers(first, len(entries) - 2))
    found = verify(entries[:first] + entries[last + 1 :])
    assert [(one.kind, one.seq) for one in found] == [("removed", 1 if first == 0 else first + 1)]


@given(st.data())
def test_s07_24_a_changed_entry_is_found(data: st.DataObject) -> None:
    entries = chain(data.draw(st.integers(1, 20)))
    at = data.draw(st.integers(0, len(entries) - 1))
    name = data.draw(st.sampled_from(["subject", "target", "action", "at", "result", "id", "role", "address"]))
    changed = msgspec.structs.replace(entries[at], **{name: "mallory"})
    assert [(one.kind, one.seq) for one in verify([*entries[:at], changed, *entries[at + 1 :]])] == [
        ("changed", at + 1)
    ]


@given(st.data())
def test_s07_24_a_changed_entry_that_was_hashed_anew_is_found_by_the_next_or_by_a_head(data: st.DataObject) -> None:
    entries = chain(data.draw(st.integers(1, 20)))
    at = data.draw(st.integers(0, len(entries) - 1))
    changed = resealed(entries[at], target="mallory")
    found = verify([*entries[:at], changed, *entries[at + 1 :]], [sign_head(KEY, entries[-1].head)], KEY)
    assert [(one.kind, one.seq) for one in found] == [("forked", min(at + 2, len(entries)))]


@given(st.data())
def test_s07_24_what_is_no_entry_is_found(data: st.DataObject) -> None:
    entries = chain(data.draw(st.integers(1, 20)))
    at = data.draw(st.integers(0, len(entries) - 1))
    torn = encode(entries[at])[: data.draw(st.integers(1, 200))]
    found = verify([*entries[:at], decode(torn, at + 1), *entries[at + 1 :]])
    assert [(one.kind, one.seq) for one in found] == [("changed", at + 1)]


@given(st.data())
def test_s07_24_swapped_entries_are_found(data: st.DataObject) -> None:
    entries = chain(data.draw(st.integers(2, 20)))
    one, other = sorted(data.draw(st.lists(st.integers(0, len(entries) - 1), min_size=2, max_size=2, unique=True)))
    entries[one], entries[other] = entries[other], entries[one]
    assert kinds(entries) == {"swapped"}


@given(st.data())
def test_s07_24_a_duplicated_entry_is_found(data: st.DataObject) -> None:
    entries = chain(data.draw(st.integers(1, 20)))
    copied = data.draw(st.integers(0, len(entries) - 1))
    entries.insert(data.draw(st.integers(copied, len(entries))), entries[copied])
    assert [(one.kind, one.seq) for one in verify(entries)] == [("duplicated", copied + 1)]


@given(st.data())
def test_s07_24_a_truncated_tail_is_found_by_a_signed_head(data: st.DataObject) -> None:
    entries = chain(data.draw(st.integers(1, 20)))
    head = f"INFO {sign_head(KEY, entries[-1].head)}\n"
    kept = entries[: data.draw(st.integers(0, len(entries) - 1))]
    assert verify(kept) == [], "the chain alone cannot tell"
    assert [(one.kind, one.seq) for one in verify(kept, [head], KEY)] == [("truncated", len(kept) + 1)]
    # Entries that somebody wrote in the place of those that were cut do not hide it.
    while len(kept) < len(entries):
        kept.append(seal(some_draft("mallory"), kept[-1].head if kept else GENESIS))
    assert kinds(kept, [head]) == {"forked"}


@given(st.data())
def test_s07_24_a_forked_chain_is_found(data: st.DataObject) -> None:
    entries = chain(data.draw(st.integers(2, 20)))
    at = data.draw(st.integers(1, len(entries) - 1))
    fork = seal(some_draft("mallory"), entries[at - 1].head)
    assert kinds([*entries[: at + 1], fork, *entries[at + 1 :]]) == {"forked"}


@given(st.data())
def test_any_change_of_the_order_is_found(data: st.DataObject) -> None:
    entries = chain(data.draw(st.integers(2, 8)))
    head = sign_head(KEY, entries[-1].head)
    chosen = data.draw(st.lists(st.sampled_from(entries), max_size=10))
    assert bool(verify(chosen, [head], KEY)) == (chosen != entries)


@settings(max_examples=30)
@given(st.integers(1, 10), st.integers(0, 3))
def test_a_head_that_another_key_signed_is_told(count: int, behind: int) -> None:
    entries = chain(count)
    forged = sign_head(b"m" * 32, Head(count + behind, "f" * 64))
    assert kinds(entries, [forged]) == {"signature"}
    assert kinds(entries, [sign_head(KEY, entries[-1].head)[:-1]]) == set(), "what is cut off is no head"


def test_entries_that_were_cut_need_an_entry_that_says_so() -> None:
    entries = chain(6)
    end = entries[3].head

    def with_checkpoint(**details: object) -> list[Entry]:
        new = draft(id="x", at="2026", kind="intent", actor=Actor("ops"), action="audit.archive", target="/archive",
                    details=details)  # fmt: skip
        return [*entries[4:], seal(new, entries[-1].head)]

    signed = sign_head(KEY, end)
    right = with_checkpoint(through=4, hash=end.hash, head=signed)
    assert verify(right, [signed], KEY) == verify(right) == []
    assert verify(right[1:])[0].text.endswith("no entry says that they were archived"), "more than it says"
    half = [*entries[2:4], *right]
    assert verify(half, [], KEY) == [], "an archive that was interrupted"
    assert [one.kind for one in verify(with_checkpoint(through=4, hash=end.hash), [], KEY)] == ["removed"]
    assert [one.kind for one in verify(with_checkpoint(through=4, hash="f" * 64))] == ["removed"]
    assert [one.kind for one in verify(with_checkpoint(through="4x", hash=end.hash))] == ["removed"]


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b"[1]", b'{"seq": 1'])
def test_what_cannot_be_read_is_damage_and_no_fault_of_the_reader(data: bytes) -> None:
    assert isinstance(decode(data, 1), Damaged)
