"""The heart: where tokens live (layout), who sees whom (mask), how keys travel (ring), what the model calls."""
