"""Stand-ins for flash-attn 2.8.3 and for the operators of flash-attn 3, as they were read in their sources."""

import torch

from tests.kernels.attention.stand_ins import packed_backward, packed_forward

# What the last gradient was asked for, with ``deterministic`` or without.
DETERMINISTIC: list[bool] = []


def _flash_attn_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes=None,
    return_softmax: bool = False,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
    zero_tensors: bool = False,
):
    assert (dropout_p, window_size_left, window_size_right, softcap, return_softmax) == (
        0.0,
        -1,
        -1,
        0.0,
        False,
    )
    if max_seqlen_q == 1 and q.shape[1] > k.shape[1]:
        assert len(q) == len(cu_seqlens_q) - 1, (
            "it lays the heads of a group out as queries, one for each sequence"
        )
    shape = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    out, lse = packed_forward(q, k, v, *shape, causal, softmax_scale, blind=torch.inf)
    return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)


def _flash_attn_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes,
    deterministic: bool,
    rng_state=None,
    zero_tensors: bool = False,
):
    assert (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0)
    DETERMINISTIC.append(deterministic)
    shape = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    packed_backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), *shape, causal, softmax_scale)
    return torch.empty(0)


FWD_3 = """fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None,
Tensor? q_v = None, Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None,
Tensor? cu_seqlens_k_new = None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None,
int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None, Tensor? leftpad_k = None,
Tensor? rotary_cos = None, Tensor? rotary_sin = None, Tensor? seqlens_rotary = None, Tensor? q_descale = None,
Tensor? k_descale = None, Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False,
int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0,
bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None, int num_splits = 0,
bool? pack_gqa = None, int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)"""
BWD_3 = """bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq = None,
Tensor(dk!)? dk = None, Tensor(dv!)? dv = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None,
Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None,
float? softmax_scale = None, bool is_causal = False, int window_size_left = -1, int window_size_right = -1,
float softcap = 0.0, bool deterministic = False, int sm_margin = 0) -> (Tensor(dq!), Tensor(dk!), Tensor(dv!),
Tensor, Tensor, Tensor, Tensor, Tensor)"""


def register_3(library: torch.library.Library) -> None:
    """Define and implement flash-attn 3's operators in ``library``, of the namespace flash_attn_3."""
    for schema, implementation in ((FWD_3, _fwd_3), (BWD_3, _bwd_3)):
        library.define(" ".join(schema.split("\n")))
        library.impl(schema.partition("(")[0], implementation, "CPU")


def _fwd_3(q, k, v, *options, **named):
    given = _arguments(FWD_3, (q, k, v, *options), named)
    assert given["num_splits"] == 1, "else it splits as its heuristic likes"
    out, lse = packed_forward(q, k, v, *_shape(given), blind=-torch.inf)
    return out, lse, torch.empty(0), torch.empty(0)


def _bwd_3(*options, **named):
    given = _arguments(BWD_3, options, named)
    DETERMINISTIC.append(given["deterministic"])
    dout, q, k, v, out, lse, *gradients = list(given.values())[:9]
    assert q.shape[2] <= 192 or not given["deterministic"], (
        "Deterministic backward not supported for hdim 256."
    )
    packed_backward(dout, q, k, v, out, lse, gradients, *_shape(given))
    return *gradients, *(torch.empty(0) for _ in range(5))


def _arguments(schema: str, given: tuple, named: dict) -> dict:
    """What was given and the schema's defaults, by name."""
    arguments = torch._C.parse_schema(schema.replace("\n", " ")).arguments
    return {
        one.name: named.get(one.name, given[place] if place < len(given) else one.default_value)
        for place, one in enumerate(arguments)
    }


def _shape(given: dict) -> tuple:
    bounds, longest = ("cu_seqlens_q", "cu_seqlens_k"), ("max_seqlen_q", "max_seqlen_k")
    return (
        *(given[name] for name in (*bounds, *longest)),
        given["is_causal"],
        given["softmax_scale"],
    )
