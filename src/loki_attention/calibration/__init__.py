"""Text to windows, windows to moments, moments to a basis chosen on held-out windows."""
