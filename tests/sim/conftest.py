"""The scripts of the facts are no test modules, and their assertions are to tell what they saw all the same."""

import pytest

for _name in ("facts_catalog", "facts_shard", "facts_stream", "scripts"):
    pytest.register_assert_rewrite(f"tests.sim.{_name}")
