"""A dead primary is replaced by one of its replicas, and nothing acknowledged is lost."""
