"""The compiled updates over a table of addresses: C++ with OpenMP for CPUs, Triton for GPUs."""
