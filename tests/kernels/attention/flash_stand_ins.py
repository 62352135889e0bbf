"""Stand-ins for flash-attn 2.8.3 and the operators of flash-attn 3, with their parameters."""

import torch

from tests.kernels.attention.float64_attention import varlen_backward, varlen_forward

# The ``deterministic`` arguments of the backward calls.
DETERMINISTIC: list[bool] = []


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes=None, return_softmax: bool = False, block_table=None,
    leftpad_k=None, seqused_k=None, zero_tensors: bool = False,
):  # fmt: skip
    assert (dropout_p, softcap, return_softmax) == (0.0, 0.0, False)
    assert (window_size_left, window_size_right) == (-1, -1)
    if max_seqlen_q == 1 and q.shape[1] > k.shape[1]:
        assert len(q) == len(cu_seqlens_q) - 1, (
            "it lays out the heads of a group as queries, one query per sequence"
        )
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    out, lse = varlen_forward(q, k, v, *lengths, causal, softmax_scale, masked_lse=torch.inf)
    return out, lse, torch.empty(0), torch.zeros(2, dtype=torch.int64)


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes, deterministic: bool, rng_state=None,
    zero_tensors: bool = False,
):  # fmt: skip
    assert (dropout_p, softcap) == (0.0, 0.0)
    assert (window_size_left, window_size_right) == (-1, -1)
    DETERMINISTIC.append(deterministic)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    gradients = (dq, dk, dv)
    varlen_backward(dout, q, k, v, out, softmax_lse, gradients, *lengths, causal, softmax_scale)
    return torch.empty(0)


FWD_3 = """fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None,
Tensor(v_new!)? v_new = None, Tensor? q_v = None, Tensor(out!)? out = None,
Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, Tensor? cu_seqlens_k_new = None,
Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None,
int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None,
Tensor? leftpad_k = None, Tensor? rotary_cos = None, Tensor? rotary_sin = None,
Tensor? seqlens_rotary = None, Tensor? q_descale = None, Tensor? k_descale = None,
Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False,
int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0,
float softcap = 0.0, bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None,
int num_splits = 0, bool? pack_gqa = None, int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor,
Tensor)"""
BWD_3 = """bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
Tensor(dq!)? dq = None, Tensor(dk!)? dk = None, Tensor(dv!)? dv = None,
Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, Tensor? seqused_q = None,
Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None,
float? softmax_scale = None, bool is_causal = False, int window_size_left = -1,
int window_size_right = -1, float softcap = 0.0, bool deterministic = False,
int sm_margin = 0) -> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor,
Tensor)"""


def register_version_3(library: torch.library.Library) -> None:
    """Define and implement flash-attn 3's operators in ``library``, namespace flash_attn_3."""
    for schema, implementation in ((FWD_3, _fwd_3), (BWD_3, _bwd_3)):
        library.define(" ".join(schema.split("\n")))
        library.impl(schema.partition("(")[0], implementation, "CPU")


def _fwd_3(q, k, v, *positional, **named):
    arguments = _arguments(FWD_3, (q, k, v, *positional), named)
    assert arguments["num_splits"] == 1, "otherwise its heuristic may split"
    out, lse = varlen_forward(q, k, v, *_lengths_mask_and_scale(arguments), masked_lse=-torch.inf)
    return out, lse, torch.empty(0), torch.empty(0)


def _bwd_3(*positional, **named):
    arguments = _arguments(BWD_3, positional, named)
    DETERMINISTIC.append(arguments["deterministic"])
    dout, q, k, v, out, lse, *gradients = list(arguments.values())[:9]
    assert q.shape[2] <= 192 or not arguments["deterministic"], (
        "Deterministic backward not supported for hdim 256."
    )
    varlen_backward(dout, q, k, v, out, lse, gradients, *_lengths_mask_and_scale(arguments))
    return *gradients, *(torch.empty(0) for _ in range(5))


def _arguments(schema: str, positional: tuple, named: dict) -> dict:
    """Return the arguments of a call by name, with the schema's defaults."""
    arguments = {}
    parameters = torch._C.parse_schema(schema.replace("\n", " ")).arguments
    for index, parameter in enumerate(parameters):
        default = positional[index] if index < len(positional) else parameter.default_value
        arguments[parameter.name] = named.get(parameter.name, default)
    return arguments


def _lengths_mask_and_scale(arguments: dict) -> tuple:
    names = (
        "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "is_causal",
        "softmax_scale",
    )  # fmt: skip
    return tuple(arguments[name] for name in names)
