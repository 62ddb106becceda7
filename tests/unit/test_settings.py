"""Settings: where they come from, which one counts, what is refused, and what is never shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from shardlib.errors import InvalidArgument
from shardlib_ops.settings import AuthSettings, Settings, TlsSettings, load_settings, print_settings

SECRET = "canary-3f9c0d7e51b24a86"


def config(folder: Path, text: str) -> Path:
    path = folder / "shardlib.toml"
    path.write_text(text)
    return path


def test_later_places_count_more(tmp_path: Path) -> None:
    path = config(tmp_path, '[manager]\nport = 1\nhost = "127.0.0.2"\nmetrics_port = 4\n[gateway]\nrows_max = 7\n')
    environ = {"SHARDLIB_MANAGER__PORT": "2", "SHARDLIB_MANAGER__HOST": "127.0.0.3", "SHARDLIB_CONFIG": str(path)}
    settings = load_settings(None, {"manager": {"port": 3, "host": None}}, environ=environ)
    assert (settings.manager.port, settings.manager.host, settings.manager.metrics_port) == (3, "127.0.0.3", 4)
    assert settings.gateway.rows_max == 7
    assert settings.gateway.port == 8080


def test_the_short_names_of_the_environment() -> None:
    environ = {
        "SHARDLIB_CATALOG": "etcd://h:1/shop",
        "SHARDLIB_JWT_SECRET": SECRET,
        "SHARDLIB_JWT_KEY_FILE": "/keys.pem",
        "SHARDLIB_JWKS_URL": "https://issuer/jwks",
        "SHARDLIB_AUTH__ALGORITHMS": "RS256, ES256",
        "SHARDLIB_MANAGER__TRUSTED_PROXIES": "10.0.0.0/8,192.168.1.1",
        "SHARDLIB_TEST_SEED": "1",
    }
    settings = load_settings(environ=environ)
    assert settings.catalog == "etcd://h:1/shop"
    assert settings.auth.secret == SecretStr(SECRET)
    assert settings.auth.key_file == Path("/keys.pem")
    assert settings.auth.jwks_url == "https://issuer/jwks"
    assert settings.auth.algorithms == ("RS256", "ES256")
    assert [str(each) for each in settings.manager.trusted_proxies] == ["10.0.0.0/8", "192.168.1.1/32"]


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"SHARDLIB_MANAGER__PROT": "1"}, "manager.prot"),
        ({"SHARDLIB_MANAGER__PORT": "70000"}, "manager.port"),
        ({"SHARDLIB_MANAGER__PORT": "tcp://10.0.0.1:80"}, "manager.port"),
        ({"SHARDLIB_MANAGER__TLS__CERT_FILE": "/c"}, "manager.tls.key_file"),
        ({"SHARDLIB_MANAGER__TLS__MINIMUM": "1.1"}, "manager.tls.cert_file"),
        ({"SHARDLIB_AUTH__LEEWAY_S": "61"}, "auth.leeway_s"),
        ({"SHARDLIB_AUTH__ALGORITHMS": "none"}, "auth.algorithms"),
        ({"SHARDLIB_AUTH__PREVIOUS_SECRET": SECRET}, "auth"),
        ({"SHARDLIB_AUDIT": "s3://bucket"}, "audit.url"),
        ({"SHARDLIB_LIMITS__BODY_BYTES": "0"}, "limits.body_bytes"),
        ({"SHARDLIB_MANAGER__TRUSTED_PROXIES": "10.0.0.1/8"}, "manager.trusted_proxies.0"),
        ({"SHARDLIB_MANAGER__DEV": "true", "SHARDLIB_MANAGER__HOST": "0.0.0.0"}, "manager"),
        ({"SHARDLIB_GATEWAY__DEV": "true", "SHARDLIB_GATEWAY__HOST": "db.example"}, "gateway"),
        ({"SHARDLIB_CONFIG": "/no/such/file"}, "config"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(environ: dict[str, str], name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load_settings(environ=environ)
    assert caught.value.name == name


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_dev_on_loopback(host: str) -> None:
    assert load_settings(None, {"manager": {"dev": True, "host": host}}, environ={}).manager.dev


@pytest.mark.parametrize("text", ["manager = 3", "[manager", "[nothing]\nx = 1", "\x00"])
def test_a_wrong_file_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument):
        load_settings(config(tmp_path, text), environ={})


def test_what_is_shown_is_toml_that_gives_the_settings_back(tmp_path: Path) -> None:
    given = Settings(catalog="etcd://h:1/shop", auth=AuthSettings(issuer='a "b" \\ c\n', algorithms=("ES256",)))
    given = given.model_copy(
        update={"manager": given.manager.model_copy(update={"tls": TlsSettings(cert_file=Path("/c"), key_file="/k")})}
    )
    assert load_settings(config(tmp_path, print_settings(given)), environ={}) == given


def test_s07_18_a_manager_with_tls_wants_verified_shards_unless_told_otherwise() -> None:
    tls = {"SHARDLIB_MANAGER__TLS__CERT_FILE": "/c", "SHARDLIB_MANAGER__TLS__KEY_FILE": "/k"}
    assert load_settings(environ={}).endpoints.sslmodes == ()
    assert load_settings(environ=tls).endpoints.sslmodes == ("verify-full",)
    assert load_settings(environ={**tls, "SHARDLIB_ENDPOINTS__SSLMODES": ""}).endpoints.sslmodes == ()
    chosen = load_settings(environ={**tls, "SHARDLIB_ENDPOINTS__SSLMODES": "verify-ca, verify-full"})
    assert chosen.endpoints.sslmodes == ("verify-ca", "verify-full")


def test_s07_16_no_setting_shows_a_secret(tmp_path: Path) -> None:
    """Neither printed nor in a `repr`, nor in the error of a value that is wrong."""
    dsn = f"postgresql://u:{SECRET}@h/db"
    settings = load_settings(
        environ={
            "SHARDLIB_CATALOG": f"{dsn}?catalog=x",
            "SHARDLIB_JWT_SECRET": SECRET,
            "SHARDLIB_AUTH__PREVIOUS_SECRET": SECRET,
            "SHARDLIB_AUDIT": dsn,
        }
    )
    assert settings.audit.url == dsn
    shown = [print_settings(settings), repr(settings), str(settings), repr(settings.auth), repr(settings.audit)]
    wrong: list[dict[str, str]] = [
        {"SHARDLIB_AUDIT": f"mysql://u:{SECRET}@h/db"},
        {"SHARDLIB_AUTH__PREVIOUS_SECRET": SECRET},
        {"SHARDLIB_JWT_SECRET": SECRET, "SHARDLIB_AUTH__SECRETS": SECRET},
        {"SHARDLIB_AUTH__SECRET__X": SECRET},
    ]
    for environ in wrong:
        with pytest.raises(InvalidArgument) as caught:
            load_settings(environ=environ)
        error: BaseException | None = caught.value
        while error is not None:
            shown += [str(error), repr(error), repr(error.args)]
            error = error.__context__
    assert not [text for text in shown if SECRET in text]
