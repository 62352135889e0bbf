"""Resolved settings: what a run derives from its config before it starts, and the rules for it."""
