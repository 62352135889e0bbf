"""Attention of one token over a shard of the cache, alone."""

import pytest
import torch

from megatron_ring.inference import decode_attention
from megatron_ring.inference.decode_attention import attend_to_all
from tests import oracle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keys", [1, 7, 8, 29])
def test_one_query_attends_to_all_keys_in_any_number_of_parts(keys, dtype, monkeypatch):
    monkeypatch.setattr(decode_attention, "CONVERTED_KEYS", 7)
    q, k, v, dout = oracle.random_inputs(1, keys, heads=4, groups=2, dtype=dtype)
    last = slice(keys - 1, keys)
    expected = oracle.attention(
        q[:, last], k, v, dout[:, last], torch.ones(1, keys, dtype=torch.bool)
    )
    partial = attend_to_all(q[0, -1], k[0].transpose(0, 1), v[0].transpose(0, 1))
    out_HD = partial.out_BHD / partial.sum_BH.unsqueeze(-1)
    assert partial.out_BHD.dtype == torch.float32
    torch.testing.assert_close(out_HD, expected.out[0, 0].float(), rtol=1e-5, atol=1e-5)
    lse_H = partial.max_BH + partial.sum_BH.log()
    torch.testing.assert_close(lse_H, expected.lse[0, :, 0].float(), rtol=1e-5, atol=1e-5)


def test_half_precision_converts_no_more_keys_at_once_than_stated(monkeypatch):
    monkeypatch.setattr(decode_attention, "CONVERTED_KEYS", 8)
    converted = []
    attend = decode_attention._attend

    def recording(q_HD, k_GMD, v_GMD):
        converted.append(k_GMD.shape[1])
        return attend(q_HD, k_GMD, v_GMD)

    monkeypatch.setattr(decode_attention, "_attend", recording)
    q, k, v, _ = oracle.random_inputs(1, 20, heads=2, groups=1, dtype=torch.bfloat16)
    attend_to_all(q[0, -1], k[0].transpose(0, 1), v[0].transpose(0, 1))
    assert converted == [8, 8, 4]
