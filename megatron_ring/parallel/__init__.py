"""The process grid, its process groups, and communication along its axes."""
