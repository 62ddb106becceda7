"""Random fault schedules of resharding on real servers: `python -m tests.support.schedules`."""
