"""What is saved: written, proved, described, read back and sent."""
