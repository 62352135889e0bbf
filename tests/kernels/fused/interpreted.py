"""Run Liger-Kernel in Triton's interpreter.

From Triton 3.6 to 3.9 the interpreter lacks two things that its kernels need:

- Float arguments of a kernel are float32 scalars when compiled, but Python floats in the
  interpreter.
- Functions of libdevice have no implementation there.

Products of two bfloat16 numbers are wrong in the interpreter, which affects only SwiGLU's forward.
A dispatch mode does not see what a compiled kernel writes; so that it does not here either, the
interpreter's copies back are hidden.
"""

import numpy as np
import pytest
import triton.language as tl
from liger_kernel.ops import layer_norm, rms_norm
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch the interpreter for Liger-Kernel."""
    convert = interpreter._implicit_cvt
    launch = interpreter.GridExecutor.__call__

    def convert_float_to_float32(argument):
        if not isinstance(argument, float):
            return convert(argument)
        value = np.array([argument], dtype=np.float32)
        return tl.tensor(interpreter.TensorHandle(value, tl.float32), tl.float32)

    def launch_outside_dispatch_modes(executor, *arguments, **options):
        with _disable_current_modes():
            return launch(executor, *arguments, **options)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_float_to_float32)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_outside_dispatch_modes)
    for module in (rms_norm, layer_norm):
        monkeypatch.setattr(module, "rsqrt", lambda x: tl.rsqrt(x))
