"""Passes of the calibration windows through a model: scores, fits, losses."""
