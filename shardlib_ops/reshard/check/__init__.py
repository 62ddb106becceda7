"""What stands in a job's way is found before the job does anything: all of it at once, each with its way out."""

from shardlib_ops.reshard.check.fault import Fault
from shardlib_ops.reshard.check.job import check_job
from shardlib_ops.reshard.check.shard import check_shard

__all__ = ["Fault", "check_job", "check_shard"]
