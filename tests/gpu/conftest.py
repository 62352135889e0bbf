"""What ranks that share a GPU need in their environment, set before any process starts."""

import os

# NCCL 2.30 and newer read this one; older versions refuse such ranks.
os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
# Without it torch.cuda.is_available() initializes CUDA, and the processes that are forked from one
# that has called it cannot use the GPU.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
