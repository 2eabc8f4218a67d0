"""Samplers and streams for training loops of one's own."""
