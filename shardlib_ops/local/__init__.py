"""Real PostgreSQL and etcd servers from wheels, started on this machine."""
