"""Rows move between live shards without one being lost: plan, copy, stream, validate, cutover, cleanup."""
