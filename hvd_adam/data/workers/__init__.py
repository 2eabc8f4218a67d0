"""What a `WorkerLoader` is made of: worker processes, what they do, and what they may not disturb."""
