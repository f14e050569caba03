"""The demonstration: a real model and real text, both at hand wherever Python is."""
