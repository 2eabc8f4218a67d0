"""Hosts made of network namespaces, and Slurm on them."""
