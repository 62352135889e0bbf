"""Liger-Kernel in Triton's interpreter, which from Triton 3.6 to 3.9 lacks two things that its kernels ask for.

A kernel's float arguments are float32 scalars where it is compiled, and Python's floats in the interpreter. Functions
of libdevice have no body there. Products of two bfloat16 numbers are wrong there, which is SwiGLU's forward alone.
What a compiled kernel writes no dispatch mode sees, and so it is here: the interpreter's copies back are hidden.
"""

import numpy as np
import pytest
import triton.language as tl
from liger_kernel.ops import layer_norm, rms_norm
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    convert, launch = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

    def converted(argument):
        if isinstance(argument, float):
            return tl.tensor(
                interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32),
                tl.float32,
            )
        return convert(argument)

    def unseen(executor, *arguments, **options):
        with _disable_current_modes():
            return launch(executor, *arguments, **options)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", unseen)
    for module in (rms_norm, layer_norm):
        monkeypatch.setattr(module, "rsqrt", lambda x: tl.rsqrt(x))
