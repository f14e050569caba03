"""Removing decoder layers and inserting repairs."""
