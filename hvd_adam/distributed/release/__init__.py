"""Gradients whose memory is given back while backward is running: `distribute(…, release_gradients=True)`."""
