"""Reductions with few bits per gradient: codes, error feedback, and the exchange of the codes."""
