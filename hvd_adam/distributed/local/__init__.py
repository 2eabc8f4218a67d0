"""`strategy="local"`: islands that update by themselves and average their progress once in a round."""
