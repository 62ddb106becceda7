"""Passwords that are not written down plainly: what a program prints, and what only the holder of a key can read.

`shardlib.dsn` asks here when a connection is opened. Nothing is imported before that.
"""
