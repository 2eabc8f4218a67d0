"""Everything that uses Horovod: start-up, agreement between ranks, reductions, and the distributed optimizer.

Imports neither PyTorch nor Horovod.
"""
