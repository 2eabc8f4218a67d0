"""`--tune`: measures before the first update which options train fastest, and uses them."""
