"""--dtype auto is bf16 where the device multiplies it and fp32 elsewhere; a CPU has no fp16."""

import pytest
import torch

from megatron_ring.errors import ConfigError
from megatron_ring.settings.precision import precision


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")],
)
def test_auto_follows_the_instructions_of_the_cpu(monkeypatch, avx512, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert precision("auto", "cpu").name == expected


def test_a_requested_dtype_is_used():
    assert precision("bf16", "cpu").dtype == torch.bfloat16
    assert "--dtype" in precision("bf16", "cpu").reason


def test_fp16_on_a_cpu_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match="dtype fp16 .* --dtype auto, fp32 or bf16"):
        precision("fp16", "cpu")
