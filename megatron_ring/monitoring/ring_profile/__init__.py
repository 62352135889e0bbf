"""Ring profiling: the cost of each hop on every rank, stragglers, and a trace of a few steps."""
