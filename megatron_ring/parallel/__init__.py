"""The grid of processes and the groups that talk along its axes."""
