"""A campaign of faults: made by a seed, run through the command line, judged, and counted."""
