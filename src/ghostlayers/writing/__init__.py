"""Training text that the dense model writes itself."""
