"""What both HTTP servers share: problems, limits, identities, TLS, metrics. It knows nothing of shards."""
