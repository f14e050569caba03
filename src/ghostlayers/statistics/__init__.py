"""Sums and tests that know no models: moments, losses, the bootstrap, the race."""
