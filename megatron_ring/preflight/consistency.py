"""What every rank must have alike: options, code and data; whoever has something else is named before it can do harm.

Ranks with other options may build other process groups and wait for each other for ever, so options and code are
compared as soon as the processes have joined. Nothing is built on what has not been compared.
"""

from collections.abc import Callable

from megatron_ring.checkpoint.provenance import commit
from megatron_ring.config import Config, DataConfig
from megatron_ring.errors import ConfigError, flag
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.process_id import Process, in_words
from megatron_ring.preflight.fingerprints import Facts, code, data, options


def check_options_and_code(config: Config, consensus: Consensus) -> None:
    """Raises ConfigError on every rank where any has another option or other code than another. Blocks."""
    problems = differences(
        consensus, lambda: options(config), lambda name: f"Give every rank the same {flag(name)}."
    )
    if other_code := differences(consensus, code, lambda name: "Give every host the same."):
        # What git says is asked only now: it takes its time, and counts changes that compute nothing.
        other_code += differences(
            consensus, lambda: {"commit": commit() or "none"}, lambda name: "Check out one."
        )
    if problems or other_code:
        raise ConfigError(problems + other_code)


def check_data(config: DataConfig, consensus: Consensus) -> None:
    """Raises ConfigError on every rank where any reads other files than another. Blocks."""
    if problems := differences(
        consensus, lambda: data(config), lambda name: "Copy the store anew to where it differs."
    ):
        raise ConfigError(problems)


def differences(
    consensus: Consensus, facts: Callable[[], Facts], remedy: Callable[[str], str]
) -> list[str]:
    """What to say of each fact that is not the same on all ranks, the same on every rank: its values and who has them.

    A user's fault in finding out the facts is raised on all.
    """
    found = consensus.gather(lambda: (Process.here(consensus.rank), facts()))
    names = dict.fromkeys(name for _, facts_of_rank in found for name in facts_of_rank)
    values = {name: _holders(name, found) for name in names}
    return [
        f"{name} is not the same on all ranks: "
        f"{'; '.join(f'{value} on {in_words(holders)}' for value, holders in of_value.items())}. {remedy(name)}"
        for name, of_value in values.items()
        if len(of_value) > 1
    ]


def _holders(name: str, found: list[tuple[Process, Facts]]) -> dict[str, list[Process]]:
    holders: dict[str, list[Process]] = {}
    for process, facts in found:
        holders.setdefault(facts.get(name, "nothing"), []).append(process)
    return holders
