"""What watches a run and reports on it: watchdog, ring profile, stragglers, metrics and plots."""
