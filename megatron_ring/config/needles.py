"""The options of ``tools/evaluate.py needles``, beside those of the model (inference.py)."""

from dataclasses import dataclass
from typing import Literal

from megatron_ring.config.checks import negative, unusable_values
from megatron_ring.errors import not_positive

NeedleTask = Literal["single", "keys", "values", "variables"]


@dataclass(frozen=True)
class NeedlesConfig:
    """Retrieval: the tasks, the lengths and depths, and what the needles are hidden in."""

    tasks: tuple[NeedleTask, ...] = ("single", "keys", "values", "variables")
    """What is asked for, one heatmap each. single: the value of a key; keys: the same among needles
    of other keys; values: all values of a key; variables: all keys that have a value, which each
    has from the one before it."""
    lengths: tuple[int, ...] = ()
    """Tokens of a prompt with its answer, one column each. Empty: the length that the model was
    trained on and halves of it, four in all."""
    depths: int = 11
    """Number of depths, one row each, evenly spaced from the beginning of the haystack, 0%, to its
    end, 100%."""
    samples: int = 5
    """Questions for each task, length and depth."""
    needles: int = 4
    """Number of keys, values or variables of the tasks that have several."""
    wording: Literal["sentence", "pair"] = "sentence"
    """sentence: "The code of the KEY is VALUE.", with values of six digits; pair: "KEY VALUE", two
    words, for small models trained on the documents of tools/make_retrieval_documents.py."""
    haystack: Literal["text", "needles"] = "text"
    """What surrounds the needles. text: the source code of Python's standard library, the default
    corpus; needles: those of other keys, which may be repeated."""
    seed: int = 1234
    """Random seed of questions and haystacks."""
    output: str = "needles.json"
    """File for the results. The picture is written beside it, with the suffix .png."""

    def problems(self) -> list[str]:
        """Return all problems that do not depend on the model."""
        if unusable := unusable_values(self):
            return unusable
        problems = not_positive(self, "samples", "needles") + negative(self, "seed")
        if self.depths < 2:
            problems.append(
                f"depths {self.depths} must be at least 2, the beginning and the end. Set --depths."
            )
        for length in self.lengths:
            if length < 1:
                problems.append(
                    f"lengths has {length}, and each must be at least 1. Set --lengths."
                )
        for name in ("lengths", "tasks"):
            values = getattr(self, name)
            if repeated := sorted({str(value) for value in values if values.count(value) > 1}):
                problems.append(
                    f"{name} has {', '.join(repeated)} more than once, which would be the same "
                    f"cells again. Set --{name}."
                )
        if not self.tasks:
            problems.append("tasks is empty, and there is nothing to ask without one. Set --tasks.")
        return problems
