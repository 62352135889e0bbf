"""Hints for options of Megatron-LM and of transformers' Trainer, for error messages.

Flags with the same name and meaning here, such as --sequence-parallel, are not listed. A hint names
the flag to set, states that there is no equivalent, or explains why the flag can be left out.
"""

_FUSED = "set --fused-operations: the library for norms, RoPE, SwiGLU and cross entropy"
_ALWAYS_FP32 = "leave it out: softmax and log-sum-exp are float32 whatever --dtype is"
_OVERLAP = "leave it out: DeepSpeed overlaps what it can; its keys go under training.deepspeed"
_ANY_GRID = "leave it out: there is one checkpoint format, which loads on any grid"
_NO_DROPOUT = "no equivalent: there is no dropout; leave it out where it is 0"
_NO_EXPERTS = "no equivalent: there is no mixture of experts"
_NO_LATENT = "no equivalent: there is no multi-head latent attention"
_NO_FP8 = "no equivalent: compute types are those of --dtype (fp32, bf16, fp16)"
_NO_INTERLEAVING = "no equivalent: a --pipeline-model-parallel-size stage is one range of layers"
_LOSS_SCALE = "leave it out: with --dtype fp16 DeepSpeed scales the loss dynamically"
_ONE_CORPUS = "no equivalent: --split cuts validation and test from the stores of --data-path"
_ALWAYS = "leave it out: it always applies"
_LOGGED = "leave it out: --metrics-file and --tensorboard-dir record every metric"

MEGATRON = {
    # the model
    "swiglu": "set --activation swiglu, which is the default",
    "squared-relu": "no equivalent: --activation is swiglu or gelu",
    "quick-geglu": "no equivalent: --activation is swiglu or gelu",
    "openai-gelu": "set --activation gelu, which is the tanh form",
    "group-query-attention": "leave it out: --num-query-groups alone turns it on",
    "disable-bias-linear": "leave it out: there are no biases without --add-bias-linear",
    "layernorm-epsilon": "set --norm-epsilon",
    "apply-layernorm-1p": "no equivalent: norms multiply by their weight, not by 1 + weight",
    "use-rotary-position-embeddings": "set --position-embedding-type rope, which is the default",
    "no-position-embedding": "leave it out: --position-embedding-type is rope by default",
    "max-position-embeddings": "set --seq-length, which is also the number of learned positions",
    "encoder-seq-length": "set --seq-length",
    "encoder-num-layers": "set --num-layers",
    "rotary-percent": "no equivalent: RoPE rotates whole heads; leave it out where it is 1.0",
    "rotary-interleaved": "no equivalent: RoPE pairs the halves of a head",
    "rotary-seq-len-interpolation-factor": "set --rope-scaling linear and --rope-scaling-factor",
    "use-rope-scaling": "set --rope-scaling llama3 and --rope-scaling-factor",
    "rope-type": "set --rope-scaling yarn, or leave it out for plain RoPE",
    "no-rope-freq": "no equivalent: every layer has RoPE",
    "hidden-dropout": _NO_DROPOUT,
    "apply-query-key-layer-scaling": "no equivalent: every layer scales by 1 / sqrt(head size)",
    "no-query-key-layer-scaling": _ALWAYS,
    "attention-softmax-in-fp32": _ALWAYS_FP32,
    "fp32-residual-connection": "no equivalent: the residual stream has the type of --dtype",
    "make-vocab-size-divisible-by": "set --padded-vocab-size to the padded size itself",
    "vocab-size": "leave it out: the tokenizer sets it; set --padded-vocab-size for more rows",
    "init-method-xavier-uniform": "no equivalent: weights are normal; see --init-method-std",
    "use-cpu-initialization": "leave it out: initial weights depend on --seed alone",
    "mtp-num-layers": "no equivalent: only the next token is predicted",
    "multi-latent-attention": _NO_LATENT,
    "q-lora-rank": _NO_LATENT,
    "kv-lora-rank": _NO_LATENT,
    "num-experts": _NO_EXPERTS,
    "expert-model-parallel-size": _NO_EXPERTS,
    "expert-tensor-parallel-size": _NO_EXPERTS,
    "use-mcore-models": "leave it out: there is one model",
    "use-legacy-models": "leave it out: there is one model",
    "spec": "no equivalent: layers are chosen by options such as --normalization and --activation",
    # tokenizer and data
    "tokenizer-type": "leave it out: the file of --tokenizer-model determines it",
    "vocab-file": "set --tokenizer-model to a tokenizer.json, which has vocabulary and merges",
    "merge-file": "set --tokenizer-model to a tokenizer.json, which has vocabulary and merges",
    "data-impl": "leave it out: stores of --data-path are in Megatron's mmap format",
    "train-data-path": _ONE_CORPUS,
    "valid-data-path": _ONE_CORPUS,
    "test-data-path": _ONE_CORPUS,
    "data-args-path": "set --data-path, or the key data_path in the YAML file of --config",
    "per-split-data-args-path": _ONE_CORPUS,
    "data-cache-path": "leave it out: no index of samples is written",
    "mock-data": "leave it out: without --data-path there is a built-in corpus",
    "num-workers": "leave it out: each process reads its samples in one thread",
    "dataloader-type": "no equivalent: samples are reshuffled each epoch, by --seed",
    "no-create-attention-mask-in-dataloader": _ALWAYS,
    "mmap-warmup": "no equivalent: memory-mapped stores are not read in advance",
    "no-mmap-bin-files": "no equivalent: stores are always memory-mapped",
    # batch, optimizer and schedule
    "batch-size": "set --micro-batch-size",
    "rampup-batch-size": "no equivalent: --global-batch-size is the same in every step",
    "train-samples": "set --train-iters: samples / --global-batch-size",
    "lr-decay-samples": "set --lr-decay-iters: samples / --global-batch-size",
    "lr-warmup-samples": "set --lr-warmup-iters: samples / --global-batch-size",
    "lr-warmup-fraction": "set --lr-warmup-iters to that fraction of the schedule's steps",
    "lr-warmup-init": "no equivalent: the warm-up of --lr-warmup-iters begins at 0",
    "warmup": "set --lr-warmup-iters",
    "lr-wsd-decay-style": "no equivalent: --lr-decay-style is cosine, linear or constant",
    "lr-wsd-decay-iters": "no equivalent: --lr-decay-style is cosine, linear or constant",
    "decoupled-lr": "no equivalent: all parameters use --lr",
    "decoupled-min-lr": "no equivalent: all parameters use --min-lr",
    "optimizer": "leave it out: it is AdamW; there is no other",
    "sgd-momentum": "no equivalent: the optimizer is AdamW",
    "start-weight-decay": "set --weight-decay, which is the same in every step",
    "end-weight-decay": "set --weight-decay, which is the same in every step",
    "weight-decay-incr-style": "leave it out: --weight-decay is the same in every step",
    "calculate-per-token-loss": _ALWAYS,
    "skip-train": "no equivalent: a run always trains; --eval-interval sets how often it validates",
    # types
    "bf16": "set --dtype bf16",
    "fp16": "set --dtype fp16",
    "params-dtype": "set --dtype",
    "fp8-format": _NO_FP8,
    "fp8-recipe": _NO_FP8,
    "fp8-param-gather": _NO_FP8,
    "loss-scale": _LOSS_SCALE,
    "initial-loss-scale": _LOSS_SCALE,
    "min-loss-scale": _LOSS_SCALE,
    "loss-scale-window": _LOSS_SCALE,
    "hysteresis": _LOSS_SCALE,
    "accumulate-allreduce-grads-in-fp32": "leave it out: gradients are reduced in float32",
    "grad-reduce-in-bf16": "no equivalent: gradients are reduced in float32",
    "fp16-lm-cross-entropy": "no equivalent: the cross entropy is computed in float32",
    # kernels
    "use-flash-attn": "set --attention-kernel flash; auto, the default, selects the fastest",
    "attention-backend": "set --attention-kernel: flash, cudnn (fused), reference or auto",
    "transformer-impl": "no equivalent: set --attention-kernel and --fused-operations",
    "no-masked-softmax-fusion": "leave it out, or set --attention-kernel reference",
    "no-bias-gelu-fusion": _FUSED,
    "no-bias-swiglu-fusion": _FUSED,
    "no-bias-dropout-fusion": _FUSED,
    "no-rope-fusion": _FUSED,
    "no-persist-layer-norm": _FUSED,
    "cross-entropy-loss-fusion": "leave it out: --loss-chunk-size fuses head and loss",
    "cross-entropy-fusion-impl": "leave it out: --loss-chunk-size fuses head and loss",
    "no-gradient-accumulation-fusion": "no equivalent: DeepSpeed accumulates gradients",
    "deterministic-mode": "set --deterministic",
    "cuda-graph-impl": "no equivalent: there are no CUDA graphs",
    "enable-cuda-graph": "no equivalent: there are no CUDA graphs",
    # memory
    "recompute-activations": "set --recompute selective",
    "recompute-granularity": "set --recompute full or --recompute selective",
    "recompute-method": "leave it out: --recompute full covers every layer",
    "recompute-num-layers": "leave it out: --recompute full covers every layer",
    "recompute-modules": "no equivalent: --recompute selective is fixed",
    "checkpoint-activations": "set --recompute full",
    "distribute-saved-activations": "set --sequence-parallel, which also splits saved activations",
    "cpu-offloading": "set --offload-activations",
    "cpu-offloading-num-layers": "set --offload-activations, which covers every layer",
    "fine-grained-activation-offloading": "set --offload-activations, which covers every layer",
    "optimizer-cpu-offload": "set --offload-optimizer cpu",
    "optimizer-offload-fraction": "set --offload-optimizer cpu, which offloads all of it",
    # processes
    "model-parallel-size": "set --tensor-model-parallel-size",
    "cp-comm-type": (
        "set --ulysses-degree: 1 for p2p, --context-parallel-size for a2a, a degree between them "
        "for a2a+p2p"
    ),
    "hierarchical-context-parallel-sizes": "set --ulysses-degree to the first of them",
    "num-layers-per-virtual-pipeline-stage": _NO_INTERLEAVING,
    "num-virtual-stages-per-pipeline-rank": _NO_INTERLEAVING,
    "decoder-first-pipeline-num-layers": _NO_INTERLEAVING,
    "decoder-last-pipeline-num-layers": _NO_INTERLEAVING,
    "no-pipeline-parallel": "leave it out: --pipeline-model-parallel-size is 1 unless it is set",
    "use-distributed-optimizer": "set --zero-stage 1, which is the default",
    "data-parallel-sharding-strategy": "set --zero-stage 0, 1, 2 or 3, in the order of the values",
    "use-torch-fsdp2": "set --zero-stage 3",
    "use-megatron-fsdp": "set --zero-stage 3",
    "overlap-grad-reduce": _OVERLAP,
    "overlap-param-gather": _OVERLAP,
    "no-overlap-p2p-communication": _OVERLAP,
    "tp-comm-overlap": "no equivalent: tensor ranks do not overlap communication with matmuls",
    "no-async-tensor-model-parallel-allreduce": "leave it out: there is no such all-reduce",
    "ds-sequence-parallel-size": "set --context-parallel ring and --ulysses-degree to it",
    "distributed-backend": "leave it out: it is NCCL with CUDA and gloo without",
    "distributed-timeout-minutes": "set --ring-timeout, in seconds",
    # checkpoints
    "no-save-optim": "no equivalent: tools/consolidate_checkpoint.py writes weights alone",
    "no-save-rng": "leave it out: everything random follows from --seed",
    "no-load-rng": "leave it out: everything random follows from --seed",
    "no-load-optim": "set --finetune, which loads the weights alone",
    "ckpt-format": _ANY_GRID,
    "ckpt-fully-parallel-save": _ANY_GRID,
    "dist-ckpt-strictness": _ANY_GRID,
    "auto-detect-ckpt-format": _ANY_GRID,
    "use-dist-ckpt": _ANY_GRID,
    "use-checkpoint-args": "set --config to the checkpoint's config.yaml",
    "ckpt-step": "set --load to the folder of one checkpoint",
    "exit-on-missing-checkpoint": "leave it out: a --load that does not exist is an error",
    "override-opt-param-scheduler": "leave it out: --lr and the other schedule flags always apply",
    "use-checkpoint-opt-param-scheduler": "set --config to the checkpoint's config.yaml",
    "exit-signal-handler": "leave it out: SIGTERM and SIGUSR1 end a run with a checkpoint",
    "exit-interval": "no equivalent: set --train-iters",
    "exit-duration-in-mins": "no equivalent: send SIGUSR1, which ends with a checkpoint",
    # guards and logging
    "no-check-for-nan-in-loss-and-grad": "leave it out, or set --on-bad-step",
    "check-for-spiky-loss": "set --loss-spike-factor",
    "log-straggler": "set --straggler-threshold",
    "log-throughput": _LOGGED,
    "log-params-norm": "no equivalent; grad_norm is always logged",
    "log-num-zeros-in-grad": "no equivalent; grad_norm is always logged",
    "log-timers-to-tensorboard": _LOGGED,
    "log-memory-to-tensorboard": "no equivalent: --dry-run counts memory before a run",
    "log-validation-ppl-to-tensorboard": "leave it out: bits per byte are logged",
    "tensorboard-log-interval": "leave it out: every step is logged",
    "timing-log-level": "set --profile-ring",
    "profile": "set --profile-ring and --profile-ring-trace",
    "use-pytorch-profiler": "set --profile-ring and --profile-ring-trace",
    "wandb-exp-name": "set WANDB_NAME in the environment",
    "wandb-save-dir": "set WANDB_DIR in the environment",
    "yaml-cfg": "set --config",
    "deepspeed-config": "leave it out: its keys go under training.deepspeed in --config",
    "deepspeed-activation-checkpointing": "set --recompute full",
    "manual-gc": "no equivalent: garbage collection is automatic",
}
"""Flags of Megatron-LM, without leading dashes, and a few of Megatron-DeepSpeed."""

MEGATRON_PREFIXES = {
    "moe-": _NO_EXPERTS,
    "fp8-": _NO_FP8,
    "fp4-": _NO_FP8,
    "muon-": "no equivalent: the optimizer is AdamW",
    "retro-": "no equivalent: there is no retrieval",
    "tiktoken-": "set --tokenizer-model to a tokenizer.json",
    "ckpt-": _ANY_GRID,
    "inprocess-": "no equivalent: restart a run that ended with exit code 75 or 76",
}

TRAINER = {
    "learning-rate": "set --lr",
    "per-device-train-batch-size": "set --micro-batch-size",
    "gradient-accumulation-steps": "set --global-batch-size: this x micro-batch x data ranks",
    "gradient-checkpointing": "set --recompute full",
    "max-steps": "set --train-iters",
    "num-train-epochs": "set --train-iters",
    "warmup-steps": "set --lr-warmup-iters",
    "warmup-ratio": "set --lr-warmup-iters to that share of the schedule's steps",
    "lr-scheduler-type": "set --lr-decay-style",
    "adam-epsilon": "set --adam-eps",
    "max-grad-norm": "set --clip-grad",
    "output-dir": "set --save",
    "resume-from-checkpoint": "set --load",
    "save-steps": "set --save-interval",
    "save-total-limit": "set --keep-last",
    "eval-steps": "set --eval-interval",
    "logging-steps": "set --log-interval",
    "report-to": "set --wandb-project or --tensorboard-dir",
    "attn-implementation": "set --attention-kernel",
    "max-seq-length": "set --seq-length",
    "torch-dtype": "set --dtype",
}
"""Options of transformers' Trainer and of scripts built on it."""


PREPROCESS = {
    "json-keys": "set --json-key, which takes one key",
    "append-eod": "leave it out: every document ends with --eod-token, or the tokenizer's own",
    "tokenizer-type": MEGATRON["tokenizer-type"],
    "vocab-file": MEGATRON["vocab-file"],
    "merge-file": MEGATRON["merge-file"],
    "dataset-impl": "leave it out: stores are in Megatron's mmap format",
    "split-sentences": "no equivalent: a document is one text",
    "keep-newlines": "leave it out: texts are always kept unchanged",
    "partitions": "leave it out: the text is divided over --workers",
    "chunk-size": "leave it out: the text is divided over --workers",
    "log-interval": "leave it out: a progress bar is shown",
}
"""Flags of Megatron's tools/preprocess_data.py and their equivalents in tools/prepare_data.py."""


def hint(name: str) -> str:
    """Return one sentence with the equivalent of a Megatron or transformers option, "" for others.

    ``name`` is a flag with or without its dashes, or a YAML key.
    """
    option = name.partition("=")[0]
    key = option.removeprefix("--").replace("_", "-")
    by_prefix = (text for prefix, text in MEGATRON_PREFIXES.items() if key.startswith(prefix))
    if text := MEGATRON.get(key) or next(by_prefix, ""):
        return f"Megatron's {option}: {text}."
    if text := TRAINER.get(key):
        return f"transformers' {option}: {text}."
    return ""
