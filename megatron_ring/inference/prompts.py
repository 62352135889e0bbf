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
    for number, (text, extra) in enumerate(_texts(options)):
        tokens = encode(text)
        if not tokens:
            name = "the prompt" if not options.prompts_jsonl else f"prompt {number}"
            raise ConfigError(
                f"{name} is empty, and at least one token is needed to continue from. Set --prompt "
                "to a text, or leave that line out."
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
        if length < positions:
            remedies.append(f"--max-new-tokens to at most {positions - length}")
        remedies.append(f"a prompt of at most {max(positions - max_new_tokens, 0)} tokens")
        if extensible:
            remedies.append(
                f"--seq-length to at least {length + max_new_tokens}, beyond what the model was "
                "trained on"
            )
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


def _texts(options: GenerationConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    if options.prompt:
        yield options.prompt, {}
    elif options.prompt_file:
        yield _decoded(Path(options.prompt_file), "--prompt-file"), {}
    elif options.prompts_jsonl:
        yield from _lines(Path(options.prompts_jsonl))


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_decoded(path, "--prompts-jsonl").split("\n"), start=1):
        if not line.strip():
            continue
        with errors_as(DataError, f"{path}, line {number},", "Set --prompts-jsonl."):
            document = parse_json_object(line.encode())
            text = document.pop(_KEY, None)
            if not isinstance(text, str):
                raise UntrustedInputError(f'it has no text as "{_KEY}"')
        yield text, document


def _decoded(path: Path, flag: str) -> str:
    with errors_as(DataError, path, f"Set {flag}."):
        content = read_bytes(path, _MAX_BYTES)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start}. Set {flag}.") from error
