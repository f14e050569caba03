"""Models: opened, described, run a decoder layer at a time."""
