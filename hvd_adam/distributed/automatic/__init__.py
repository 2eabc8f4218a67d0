"""`compression="auto"`: measures the compressions of gradients, and uses the fastest one that is allowed."""
