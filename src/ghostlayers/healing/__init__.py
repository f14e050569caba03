"""Training after a cut: only what pays, from the closed form on, against the dense model."""
