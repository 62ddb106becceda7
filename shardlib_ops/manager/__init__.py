"""Changes of the topology while applications run."""
