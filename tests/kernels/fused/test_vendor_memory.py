"""The memory that other libraries' operations read: every argument of every call, as any view.

As tests/kernels/attention/test_vendor_memory.py. Liger runs in Triton's interpreter.
"""

from types import ModuleType

import pytest
import torch

from megatron_ring.kernels.cross_entropy import WHOLE
from megatron_ring.kernels.fused import liger
from megatron_ring.kernels.fused.libraries import LIBRARIES
from megatron_ring.kernels.rope import Rope
from tests.kernels.fused.interpreted import interpreted  # noqa: F401
from tests.kernels.fused.stand_ins import APEX, FLASH_ATTN, import_with_stand_ins
from tests.kernels.memory_forms import Call, misread_forms, recorded_calls, restricted, tensors

# The arguments that a kernel reads from their address.
RESTRICTED = {"liger": set(), "flash-attn": {"labels"}, "apex": {"cos_", "sin_"}}
each_library = pytest.mark.parametrize("library", RESTRICTED)


@pytest.fixture
def module(library, request, monkeypatch) -> ModuleType:
    if library == "liger":
        request.getfixturevalue("interpreted")
        return liger
    stand_ins = {"flash-attn": FLASH_ATTN, "apex": APEX}[library]
    return import_with_stand_ins(monkeypatch, stand_ins, LIBRARIES[library].module)


def calls_of(module: ModuleType) -> list[Call]:
    """Return a call of each of the library's operations, in float32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    targets_c1 = torch.randint(50, (7, 1), generator=generator)
    rotation = Rope(8, 10000.0).rotation(torch.arange(5))
    with recorded_calls() as calls:
        module.norm(normal(2, 5, 16), normal(16), None, 1e-5)
        module.norm(normal(2, 5, 16), normal(16), normal(16), 1e-5)
        module.rope(normal(2, 5, 4, 8), normal(2, 5, 2, 8), rotation)
        if hasattr(module, "swiglu"):
            module.swiglu(normal(2, 5, 24), normal(2, 5, 24))
        if hasattr(module, "cross_entropy"):
            module.cross_entropy(normal(7, 50), targets_c1, WHOLE, -100, False)
    return list(calls)


@each_library
def test_every_view_of_every_argument_gives_the_same(library, module):
    for call in calls_of(module):
        found = {parameter: misread_forms(call, parameter) for parameter in tensors(call)}
        assert found == {parameter: [] for parameter in found}, call[0].name


@each_library
def test_without_what_is_stated_about_an_argument_some_view_of_it_is_misread(library, module):
    seen = set()
    for call in calls_of(module):
        for parameter in restricted(call):
            assert misread_forms(call, parameter, unstated=True), (call[0].name, parameter)
            seen.add(parameter)
    assert seen == RESTRICTED[library]
