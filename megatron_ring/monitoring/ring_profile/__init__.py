"""Eyes on the ring: what each hop costs every rank, who holds the others up, and a trace of a few steps."""
