"""Requests made from the gateway's OpenAPI document, right and wrong ones: it answers as the document says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import positive_data_acceptance

from shardlib import ShardedEngine
from shardlib_ops import LocalCluster
from shardlib_ops.gateway import create_gateway
from tests.integration.test_gateway_execute import metadata
from tests.support.gateways import gateway_settings
from tests.support.in_thread import served_in_thread
from tests.support.managers import token

EXAMPLES = 25

schema = schemathesis.openapi.from_dict(
    create_gateway(gateway_settings("memory://document")).openapi(), config=SchemathesisConfig()
)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of a gateway with a shard."""
    with LocalCluster(shards=1) as cluster:
        with ShardedEngine(cluster.url) as engine:
            engine.create_all(metadata)
        settled = gateway_settings(cluster.url, metrics_port=None)
        with served_in_thread(lambda: create_gateway(settled), settled.gateway, settled) as found:
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
    answer = case.call(base_url=url, headers={"Authorization": f"Bearer {token('admin')}"}, timeout=60)
    # What SQL is cannot be said in a schema, so that a body may be right by it and refused.
    case.validate_response(answer, excluded_checks=[positive_data_acceptance, not_a_server_error])
    if answer.status_code >= 500:  # a `timeout_s` of a hundredth of a second may be too little
        assert answer.json()["type"] == "urn:shardlib:problem:statement-timeout"
    assert "Traceback" not in answer.text
