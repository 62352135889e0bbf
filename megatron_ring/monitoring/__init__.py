"""Monitoring of a run: watchdog, ring profiling, straggler detection, metrics and plots."""
