"""The start-up self-test: before the first step, ranks prove that they run the same, sit right and compute right."""
