"""Benchmarks against other implementations and the hardware's limit: ``python -m hvd_adam.bench --help``."""
