"""Checks before training starts: all ranks agree, reach each other, and compute attention right."""
