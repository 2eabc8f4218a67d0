"""From the backward hook to the averaged gradient: buckets, reductions, messages between ranks, loss scaling."""
