"""How fast, beside the peers and the hardware's limit: ``python -m hvd_adam.bench --help``."""
