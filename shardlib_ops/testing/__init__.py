"""The pytest plugin for applications that use shardlib."""
