"""A stand-in for Consensus in tests that run one process without torch.distributed."""


class SingleProcessConsensus:
    """The consensus of a single process."""

    rank = 0

    def gather(self, act):
        """Return the result of ``act`` as that of all ranks."""
        return [act()]

    def run_on_rank_zero(self, act):
        """Return the result of ``act``."""
        return act()
