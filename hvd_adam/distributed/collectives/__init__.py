"""Sums, means and lists over the ranks of numbers, tensors and nested containers of them."""
