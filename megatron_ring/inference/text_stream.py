"""Text of tokens that arrive one after another, complete characters only."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes bytes to that are not UTF-8, or not yet."""

# How many tokens of the prompt the first ones are decoded with. Tokenizers decode a token
# differently at the beginning of a text: they may drop a space there.
_CONTEXT_TOKENS = 4


class TextStream:
    """Decodes tokens incrementally; the pieces add up to the text that continues the prompt.

    A token may end within a character of several bytes. Such a character is returned with the token
    that completes it. ``decode`` returns the text of tokens, with ``REPLACEMENT`` for bytes that
    are not UTF-8.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()):
        self._decode = decode
        # The tokens that the next one is decoded with, and their text. A character is complete
        # after them.
        self._context = list(prompt[-_CONTEXT_TOKENS:])
        self._pending: list[int] = []
        self._returned = len(decode(self._context))

    def add(self, token: int) -> str:
        """Return the text that ``token`` adds, "" while a character is incomplete."""
        self._pending.append(token)
        text = self._decode([*self._context, *self._pending])
        complete = text.rstrip(REPLACEMENT)
        piece = complete[self._returned :]
        self._returned = max(self._returned, len(complete))
        if len(complete) == len(text) and piece:
            self._context = self._pending
            self._pending = []
            self._returned = len(self._decode(self._context))
        return piece

    def finish(self) -> str:
        """Return the rest: bytes that no token has completed, as ``REPLACEMENT``."""
        text = self._decode([*self._context, *self._pending])
        piece = text[self._returned :]
        self._returned = len(text)
        return piece
