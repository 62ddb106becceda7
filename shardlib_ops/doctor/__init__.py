"""One look at everything that an operator would want looked at, with what to do about each finding."""

from shardlib_ops.doctor.doctor import Doctor
from shardlib_ops.doctor.finding import Finding, Limits, Report, Severity

__all__ = ["Doctor", "Finding", "Limits", "Report", "Severity"]
