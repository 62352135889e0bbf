"""The prompts of a generation: read from an option, a file or JSON lines, encoded and checked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ring.config import GenerationConfig
from megatron_ring.errors import ConfigError, DataError
from megatron_ring.inference.model_tokenizer import ModelTokenizer
from megatron_ring.untrusted import UntrustedInputError, errors_as, parse_json_object, read_bytes

_MAX_BYTES = 1 << 30
_KEY = "prompt"
RESULT_KEYS = ("text", "token_ids", "prompt_tokens", "new_tokens", "stop_reason")
"""The keys that a result adds to those of its prompt's line of JSON."""

_MAX_SHOWN = 20


@dataclass(frozen=True)
class Prompt:
    """A text to continue.

    number: counted from 0 in the input; the noise of sampling depends on it. extra: other keys of
    its line of JSON.
    """

    number: int
    text: str
    tokens: list[int]
    extra: dict[str, Any] = field(default_factory=dict)


def read_prompts(options: GenerationConfig, tokenizer: ModelTokenizer) -> list[Prompt]:
    """Read and encode the prompts.

    Raises ConfigError if there are none, if one is empty or if the tokenizer is missing, DataError
    for a file that cannot be read.
    """
    encode = tokenizer.required().encode
    prompts = []
    for number, (source, text, extra) in enumerate(_texts(options)):
        tokens = encode(text)
        if not tokens:
            raise ConfigError(
                f"the prompt of {source} is empty, and at least one token is needed to continue "
                "from. Set --prompt to a text, or leave that line out."
            )
        prompts.append(Prompt(number, text, [*tokenizer.begin, *tokens], extra))
    if not prompts:
        raise ConfigError(
            "there is no prompt: prompt, prompt_file and prompts_jsonl are empty. Set --prompt to "
            "a text, or --prompt-file or --prompts-jsonl to a file."
        )
    return prompts


def check_lengths(
    prompts: Sequence[Prompt], max_new_tokens: int, positions: int, extensible: bool
) -> None:
    """Raise ConfigError if a prompt and its continuation have more tokens than ``positions``.

    ``extensible``: more positions are possible with --seq-length.
    """
    problems = []
    for prompt in prompts:
        length = len(prompt.tokens)
        if length + max_new_tokens <= positions:
            continue
        remedies = []
        longest = positions - max_new_tokens
        if length < positions:
            remedies.append(f"--max-new-tokens to at most {positions - length}")
        if longest > 0:
            remedies.append(f"a prompt of at most {longest} tokens")
        elif length >= positions:
            remedies.append(f"a shorter prompt, and --max-new-tokens to less than {positions}")
        if extensible:
            remedies.append(f"--seq-length to at least {length + max_new_tokens}")
        problems.append(
            f"prompt {prompt.number} has {length} tokens, and with max_new_tokens {max_new_tokens} "
            f"that is {length + max_new_tokens}, more than the model's {positions} positions. Set "
            f"{', or '.join(remedies)}."
        )
    if len(problems) > _MAX_SHOWN:
        more = len(problems) - _MAX_SHOWN
        problems = [*problems[:_MAX_SHOWN], f"and {more} more prompts that are too long."]
    if problems:
        raise ConfigError(problems)


def _texts(options: GenerationConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield where each prompt is from, its text, and the other keys of its line of JSON."""
    if options.prompt:
        yield "--prompt", options.prompt, {}
    elif options.prompt_file:
        yield options.prompt_file, _decoded(Path(options.prompt_file), "--prompt-file"), {}
    elif options.prompts_jsonl:
        yield from _lines(Path(options.prompts_jsonl))


def _lines(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for number, line in enumerate(_decoded(path, "--prompts-jsonl").split("\n"), start=1):
        if not line.strip():
            continue
        source = f"{path}, line {number},"
        with errors_as(DataError, source, "Set --prompts-jsonl."):
            document = parse_json_object(line.encode())
            text = document.pop(_KEY, None)
            if not isinstance(text, str):
                raise UntrustedInputError(f'it has no text as "{_KEY}"')
            if replaced := [key for key in RESULT_KEYS if key in document]:
                raise UntrustedInputError(
                    f"its {' and '.join(map(repr, replaced))} would be replaced by the result of "
                    "that name; rename it"
                )
        yield source, text, document


def _decoded(path: Path, flag: str) -> str:
    with errors_as(DataError, path, f"Set {flag}."):
        content = read_bytes(path, _MAX_BYTES)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start}. Set {flag}.") from error
