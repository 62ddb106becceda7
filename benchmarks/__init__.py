"""Figures beside a baseline measured in the same run: `python -m benchmarks [sections] [--scale 0.1] [--json FILE]`."""
