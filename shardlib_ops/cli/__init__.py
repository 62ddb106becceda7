"""The command line over the operators' coroutines."""
