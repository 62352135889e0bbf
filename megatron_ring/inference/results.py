"""The files of an evaluation: its results as JSON, and their picture beside it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ring.errors import ConfigError
from megatron_ring.monitoring.outputs import PNG, describe_error, output_problem
from megatron_ring.untrusted import replace_file


@dataclass(frozen=True)
class ResultFiles:
    """``output`` is the JSON file. ``evaluation`` names what it holds, and is its first key."""

    output: Path
    evaluation: str

    @property
    def picture(self) -> Path:
        """The picture beside the JSON file."""
        return self.output.with_suffix(".png")

    def check(self) -> None:
        """Raise ConfigError if a file cannot be written or would replace one of another kind.

        Writes nothing.
        """
        if self.output.suffix != ".json":
            raise ConfigError(
                f"output {self.output} must end in .json; the picture beside it ends in .png. Set "
                f"--output {self.output.with_suffix('.json') if self.output.name else 'X.json'}."
            )
        beginning = self._text({})[:-3].encode()  # up to the first result
        problems = [
            (
                self.output,
                output_problem(self.output, (beginning,), f"results of {self.evaluation}"),
            ),
            (self.picture, output_problem(self.picture, (PNG,), "a picture")),
        ]
        if found := [f"output {path} {problem}" for path, problem in problems if problem]:
            raise ConfigError(f"{problem}. Set --output to another file." for problem in found)

    def write(self, results: dict[str, Any], draw: Callable[[Path], object]) -> None:
        """Write the results, and the picture with ``draw``. Raises ConfigError if that fails.

        Each file is replaced as a whole.
        """
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.output, self._text(results).encode())
            unfinished = self.picture.with_suffix(".unfinished.png")
            try:
                draw(unfinished)
                unfinished.replace(self.picture)
            finally:
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"output {self.output} cannot be written: {describe_error(error)}. Set --output."
            ) from error

    def _text(self, results: dict[str, Any]) -> str:
        return json.dumps({"evaluation": self.evaluation} | results, indent=2) + "\n"
