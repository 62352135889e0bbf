"""The split of a step's time by kind of work, from handmade traces and names seen on GPUs."""

import pytest

from benchmarks.step_profile import CATEGORIES, OPTIMIZER_STEP, category, split_trace

NAMES = {
    "attention": (
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel",
        "forward_hop",
        "backward_hop_queries",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "matrix products": (
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT",
        "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n",
        "aten::mm",
    ),
    "element-wise": (
        "void at::native::vectorized_elementwise_kernel<8, at::native::bfloat16>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized",
        "Memcpy DtoD (Device -> Device)",
        "_rms_norm_forward_kernel",
        "aten::mul",
    ),
    "communication": ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "c10d::allreduce_"),
    "optimizer": ("aten::_fused_adamw_", "multi_tensor_apply_kernel<FusedAdamMathFunctor>"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_kernels_and_operators_have_a_category(kind):
    assert {category(name) for name in NAMES[kind]} == {kind}


def event(kind: str, name: str, begin: float, end: float) -> dict:
    return {"cat": kind, "name": name, "ts": begin, "dur": end - begin}


def test_a_trace_is_split_by_category_and_idle_time():
    split = split_trace(
        [
            event("kernel", "forward_hop", 0, 4000),
            event("kernel", "nvjet_sm90", 4000, 6000),
            event("kernel", "ncclDevKernel", 5000, 7000),  # a second stream: counts, is not idle
            event("gpu_memcpy", "Memcpy DtoD", 8000, 8500),
            event("gpu_user_annotation", OPTIMIZER_STEP, 9000, 9900),
            event("kernel", "vectorized_elementwise_kernel", 9000, 9300),
            event("kernel", "ncclDevKernel", 9300, 9400),
            event("gpu_user_annotation", "Optimizer.step#AdamW.step", 9800, 9900),
            event("kernel", "FusedAdam", 9800, 9900),
            event("cpu_op", "aten::mm", 0, 100_000),
            event("user_annotation", OPTIMIZER_STEP, 0, 100_000),
        ],
        step_ms=10.0,
    )
    assert split == pytest.approx(
        {
            "attention": 4.0,
            "matrix products": 2.0,
            "element-wise": 0.5,
            "communication": 2.1,
            "optimizer": 0.4,
            "idle": 10.0 - 8.0,
        }
    )
    assert tuple(split) == CATEGORIES


def test_idle_is_not_negative():
    assert split_trace([event("kernel", "forward_hop", 0, 4000)], step_ms=3.0)["idle"] == 0
