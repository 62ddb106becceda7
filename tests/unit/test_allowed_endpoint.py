"""Which servers a caller may name (line 13 of the security list), with the names resolved."""

from __future__ import annotations

import pytest

from shardlib.errors import InvalidArgument
from shardlib_ops.settings import EndpointSettings, allowed_endpoint

NAMES = {
    "db1": ["10.0.0.5"],
    "both": ["10.0.0.5", "169.254.169.254"],
    "meta": ["169.254.169.254"],
    "six": ["fd00:ec2::254"],
    "mapped": ["::ffff:169.254.169.254"],
    "scoped": ["fe80::1%eth0"],
    "home": ["127.0.0.1", "::1"],
}
STANDARD = EndpointSettings()


def resolve(host: str) -> list[str]:
    if host not in NAMES:
        raise OSError("no such name")
    return NAMES[host]


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("postgresql://u:p@db1:5432/x", ("10.0.0.5",)),
        ("postgres://u@db1/x?sslmode=verify-full", ("10.0.0.5",)),
        ("host=db1 user=u password=p", ("10.0.0.5",)),
        ("postgresql://u@db1,home/x", ("10.0.0.5", "127.0.0.1", "::1")),
        ("postgresql://u:env%3ASHARDLIB_SECRET_DB1@10.1.1.1/x", ("10.1.1.1",)),
        ("postgresql://u:file%3A%2Frun%2Fsecrets%2Fdb1@10.1.1.1/x", ("10.1.1.1",)),
        ("https://[2001:db8::1]:8443/jwks", ("2001:db8::1",)),
    ],
)
def test_what_is_allowed(text: str, addresses: tuple[str, ...]) -> None:
    assert allowed_endpoint(text, STANDARD, resolve=resolve).addresses == addresses


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://u@169.254.169.254/x",
        "postgresql://u@meta/x",
        "postgresql://u@both/x",
        "postgresql://u@six/x",
        "postgresql://u@mapped/x",
        "postgresql://u@scoped/x",
        "postgresql://u@db1,meta/x",
        "host=db1 hostaddr=169.254.169.254",
        "postgresql://u@db1/x?hostaddr=169.254.169.254",
        "postgresql://u@0.0.0.0/x",
        "postgresql://u@[::]/x",
        "postgresql://u@224.0.0.1/x",
        "postgresql://u@[64:ff9b::a9fe:a9fe]/x",
        "postgresql://u@[2002:a9fe:a9fe::]/x",
        "postgresql://u@168.63.129.16/x",
        "http://100.100.100.200/latest",
        "https://meta/jwks",
    ],
)
def test_s07_13_link_local_and_metadata_addresses_are_refused_also_behind_names(text: str) -> None:
    with pytest.raises(InvalidArgument, match="not allowed"):
        allowed_endpoint(text, STANDARD, resolve=resolve)


@pytest.mark.parametrize("written", ["2852039166", "0xa9fea9fe", "169.16689662"])
def test_s07_13_an_address_in_another_notation_is_the_same_address(written: str) -> None:
    with pytest.raises(InvalidArgument):
        allowed_endpoint(f"postgresql://u@{written}/x", STANDARD)


@pytest.mark.parametrize(
    "text",
    [
        "ftp://db1/x",
        "file:///etc/passwd",
        "gopher://db1/",
        "https:///x",
        "https://[::1",
        "",
        "postgresql://",
        "nowhere",
        "postgresql://u@nowhere/x",
        "service=shop",
        "postgresql:///x?service=shop",
        "postgresql://u@db1/x?passfile=/etc/passwd",
        "postgresql://u@db1/x?options=-cstatement_timeout%3D0",
        "postgresql://u@db1/x?sslkey=/root/.key",
        "host=/var/run/postgresql",
        "host=@abstract",
        "postgresql://u:file%3A%2Fetc%2Fshadow@db1/x",
        "postgresql://u:file%3A%2Frun%2Fsecrets%2F..%2F..%2Fetc%2Fshadow@db1/x",
        "postgresql://u:env%3ASHARDLIB_JWT_SECRET@db1/x",
    ],
)
def test_s07_13_other_schemes_parameters_and_references_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        allowed_endpoint(text, STANDARD, resolve=resolve)


def test_networks_narrow_what_is_allowed() -> None:
    narrow = EndpointSettings(networks="10.0.0.0/24, 2001:db8::/32", loopback=False, schemes="postgresql")
    assert allowed_endpoint("postgresql://u@db1/x", narrow, resolve=resolve).hosts == ("db1",)
    for text in ("postgresql://u@10.0.1.1/x", "postgresql://u@home/x", "https://db1/x"):
        with pytest.raises(InvalidArgument):
            allowed_endpoint(text, narrow, resolve=resolve)


def test_the_refusal_holds_no_password() -> None:
    with pytest.raises(InvalidArgument) as caught:
        allowed_endpoint("postgresql://u:canary-1@meta/x?passfile=canary-1", STANDARD, resolve=resolve)
    assert "canary-1" not in repr(caught.value) + str(caught.value)


def test_s07_18_the_way_to_a_shard_is_verified_where_that_is_asked_for() -> None:
    strict = EndpointSettings(sslmodes="verify-full")
    for dsn in ("postgresql://u@db1/x?sslmode=verify-full", "host=db1 sslmode=verify-full", "postgresql://u@home/x"):
        assert allowed_endpoint(dsn, strict, resolve=resolve).addresses
    for dsn in ("postgresql://u@db1/x", "postgresql://u@db1/x?sslmode=require", "postgresql://u@home,db1/x"):
        with pytest.raises(InvalidArgument, match="verify-full"):
            allowed_endpoint(dsn, strict, resolve=resolve)
