"""Make Triton's interpreter faster in the tests, at the same results.

A kernel's operations are replaced by interpreted ones at its launch and again at each call of a
function in it, although nothing is left to replace: for that the interpreter searches all members
of the language, a third of its time. It also checks the sum, difference and product of all 32-bit
integers for overflow in a second, 64-bit computation, which compiled kernels do not either.
"""

import dataclasses

import triton.language as tl
from triton.runtime import interpreter

_BUILTINS = {
    place: [
        (name, getattr(place, name))
        for name in dir(place)
        if tl.core.is_builtin(getattr(place, name, None))
    ]
    for place in (tl, tl.core, tl.core.tensor, tl.math, tl.core.tensor_descriptor_base)
}


def install() -> None:
    """Change the interpreter of this process."""
    interpreter._patch_builtin = _patch_builtin
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options


def _patch_builtin(place, builder, *scope) -> None:
    """Replace the operations of ``place``, all of them or, if that has been done, none."""
    name, original = _BUILTINS[place][0]
    if getattr(place, name) is original:
        for name, original in _BUILTINS[place]:
            interpreter._patch_attr(place, name, original, builder, *scope)
