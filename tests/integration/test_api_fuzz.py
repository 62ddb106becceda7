"""Requests made from the OpenAPI document, right and wrong ones, at a real server: it answers as the document says."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import positive_data_acceptance

from shardlib_ops.api import create_app
from shardlib_ops.settings import ServerSettings
from tests.support.in_thread import served_in_thread
from tests.support.managers import fill, fill_job, manager_settings, token
from tests.support.topologies import PASSWORD

EXAMPLES = 12
"""For each call, beside those that cover each part of its schema once."""

CATALOG = f"memory://fuzz-{uuid.uuid4().hex}"
SETTINGS = manager_settings(CATALOG, manager=ServerSettings(port=0, metrics_port=None, docs=True))

schema = schemathesis.openapi.from_dict(create_app(SETTINGS).openapi(), config=SchemathesisConfig())


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of a manager whose cluster has shards and a job, but no servers."""
    fill(CATALOG)
    fill_job(CATALOG)
    with served_in_thread(lambda: create_app(SETTINGS), SETTINGS.manager, SETTINGS) as found:
        yield found


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_s07_15_every_answer_is_one_of_the_document_and_none_is_an_error_of_the_server(
    case: schemathesis.Case, url: str
) -> None:
    headers = {"Authorization": f"Bearer {token('admin')}"}
    answer = case.call(base_url=url, headers=headers)
    # What a DSN is cannot be said in a schema, so that a body may be right by it and refused.
    case.validate_response(answer, excluded_checks=[positive_data_acceptance])
    assert PASSWORD not in answer.text
    assert "Traceback" not in answer.text
