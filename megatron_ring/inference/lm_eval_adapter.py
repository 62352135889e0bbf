"""A model of EleutherAI's lm-evaluation-harness (lm-eval) that computes over a ring of ranks.

Rank 0 alone runs lm-eval: tasks, data sets, metrics and files. The other ranks follow its commands
(rank_commands.py), which carry token ids. So everything that lm-eval does is done once, as in its
runs on one device: no rank can build other requests than another one, from a cache of its own or a
data set that has changed meanwhile, and wait for them forever. The alternative, lm-eval on every
rank with the same seeds, would have to be right about all of that.

Requests are tokenized as by lm-eval's ``hf`` model on the exported checkpoint, and scored without
truncation up to the positions of the model.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megatron_ring.config import InferenceConfig
from megatron_ring.errors import ConfigError
from megatron_ring.inference.loading import Loaded
from megatron_ring.inference.rank_commands import Generate, Load, Ranks, Score
from megatron_ring.inference.sampling import Sampler
from megatron_ring.inference.scoring import Scores, check_sequences
from megatron_ring.untrusted import UntrustedInputError, validate

MODEL_NAME = "megatron_ring"
"""The name for lm-eval's --model."""

_MAX_NEW_TOKENS = 256  # lm-eval's defaults
_DEFAULT_DEVICE = "cuda:0"
_SAMPLING_KEYS = {"do_sample", "temperature", "top_k", "top_p", "seed"}


_ranks: Ranks | None = None


def use_ranks(ranks: Ranks | None) -> None:
    """Set the ranks that models created from now on compute on, in this process."""
    global _ranks
    _ranks = ranks


@register_model(MODEL_NAME)
class MegatronRingLM(TemplateLM):
    """The model for lm-eval on rank 0.

    Args:
        batch_size: prompts that are continued at a time, or "auto": as many as have no more tokens,
            new ones included, than the model has positions. Log-likelihoods are packed by that
            number of tokens in any case.
        options: those of InferenceConfig by their names, as in --model_args load=runs/mine.

    Raises ConfigError for options that are unknown or not possible.
    """

    def __init__(
        self,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ):
        super().__init__()
        if _ranks is None:
            raise ConfigError(
                f"--model {MODEL_NAME} computes on ranks that have joined, and this process has "
                "not. Start lm-eval with tools/run_lm_eval.py."
            )
        self._ranks = _ranks
        self._batch_size = _parse_batch_size(batch_size)
        if max_batch_size is not None:
            raise ConfigError(
                f"max_batch_size {max_batch_size} has no effect on {MODEL_NAME}. Leave "
                "--max_batch_size out; --batch_size auto is bounded by the model's positions."
            )
        self._loaded: Loaded = self._ranks.run(Load(_config(options)))
        # lm-eval passes its default where --device is left out.
        is_given = device not in (None, _DEFAULT_DEVICE)
        if is_given and device.split(":")[0] != self._loaded.device.type:
            raise ConfigError(
                f"device {device} is not possible: the ranks compute on "
                f"{self._loaded.device.type}. Leave --device out; CUDA_VISIBLE_DEVICES selects "
                "devices."
            )
        self._text = self._loaded.text
        self._own_tokenizer = self._text.required()

    @property
    def eot_token_id(self) -> int:
        """The id that ends documents."""
        return self._text.ends[0]

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without context: that which begins documents, or ends them."""
        return self._text.begin[0] if self._text.begin else self.eot_token_id

    @property
    def max_length(self) -> int:
        """The model's positions."""
        return self._loaded.seq_length

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text, after those that begin one unless these are excluded."""
        begin = () if add_special_tokens is False else self._text.begin
        return [*begin, *self._own_tokenizer.encode(string)]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        if (longest := max((len(each[2]) for each in requests), default=0)) > self.max_length:
            raise ConfigError(
                f"a continuation has {longest} tokens, and the model has {self.max_length} "
                "positions. Use a task with shorter ones, or set seq_length in --model_args, which "
                "a model with RoPE can extend."
            )
        results = []
        sequences = [
            # From a context that is too long the beginning is dropped, as by the hf model.
            (context + continuation)[-(self.max_length + 1) :]
            for _, context, continuation in requests
        ]
        for (text, _, continuation), scores in zip(
            requests, self._score(sequences, disable_tqdm), strict=True
        ):
            of_continuation = slice(len(scores.log_likelihood) - len(continuation), None)
            result = (
                scores.log_likelihood[of_continuation].double().sum().item(),
                bool(scores.is_greedy[of_continuation].all()),
            )
            results.append(result)
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, result)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each whole text; one that is too long in windows.

        The windows are lm-eval's, which do not overlap.
        """
        windows = []
        for number, (text,) in enumerate(request.args for request in requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(number, None, *make_disjoint_window(pair)) for pair in pairs]
        results = self._loglikelihood_tokens([window[1:] for window in windows], disable_tqdm)
        sums = [0.0] * len(requests)
        for (number, *_), (log_likelihood, _) in zip(windows, results, strict=True):
            sums[number] += log_likelihood
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that continues each context, up to its stop texts."""
        asked = [_Continuation.of(number, request, self) for number, request in enumerate(requests)]
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as progress:
            for batch in self._batches(asked):
                settings = batch[0].settings
                command = Generate(
                    [each.prompt for each in batch], [each.number for each in batch], *settings
                )
                for each, text in zip(batch, self._ranks.run(command), strict=True):
                    until = settings[2]
                    texts[each.number] = postprocess_generated_text(text, until, None)
                    context, options = requests[each.number].args
                    self.cache_hook.add_partial(
                        "generate_until", (context, options), texts[each.number]
                    )
                progress.update(len(batch))
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval adds to the config in its results."""
        grid = self._loaded.grid
        return {
            "model_source": str(self._loaded.source),
            "model_dtype": str(self._loaded.dtype),
            "ring_size": grid.ring,
            "tensor_model_parallel_size": grid.tensor,
        }

    def _score(self, sequences: list[list[int]], disable_tqdm: bool) -> list[Scores]:
        if not sequences:
            return []
        check_sequences(self._loaded, sequences)
        with tqdm(total=len(sequences), desc="loglikelihood", disable=disable_tqdm) as progress:
            return self._ranks.run(Score(sequences), progress.update)

    def _batches(self, asked: "Sequence[_Continuation]") -> "list[list[_Continuation]]":
        """Return batches of requests with the same settings, longest first."""
        batches: list[list[_Continuation]] = []
        ordered = sorted(asked, key=lambda each: (str(each.settings), -each.tokens))
        for each in ordered:
            last = batches[-1] if batches else []
            fits = len(last) < (self._batch_size or len(asked))
            if self._batch_size is None:
                fits = sum(other.tokens for other in last) + each.tokens <= self.max_length
            if last and fits and last[0].settings == each.settings:
                last.append(each)
            else:
                batches.append([each])
        return batches


@dataclass(frozen=True)
class _Continuation:
    """A request of ``generate_until``; ``settings`` are the last three fields of ``Generate``."""

    number: int
    prompt: list[int]
    settings: tuple[int, Sampler, list[str]]

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and its continuation."""
        return len(self.prompt) + self.settings[0]

    @staticmethod
    def of(number: int, request: Instance, model: MegatronRingLM) -> "_Continuation":
        context, given = request.args
        options = normalize_gen_kwargs(given, _MAX_NEW_TOKENS)
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        new = options.pop("max_gen_toks")
        if unknown := sorted(options.keys() - _SAMPLING_KEYS):
            known = ", ".join(sorted({"until", "max_gen_toks", *_SAMPLING_KEYS}))
            raise ConfigError(
                f"generation option {unknown[0]} of the task is not supported. Known: {known}. Set "
                "--gen_kwargs, or leave it out of the task's generation_kwargs."
            )
        if not 0 < new < model.max_length:
            raise ConfigError(
                f"max_gen_toks {new} must be at least 1 and below the model's {model.max_length} "
                "positions. Set --gen_kwargs max_gen_toks=N, or seq_length in --model_args, which "
                "a model with RoPE can extend."
            )
        samples = options.get("do_sample", False)
        sampler = Sampler(
            temperature=float(options.get("temperature", 1.0)) if samples else 0.0,
            top_k=int(options.get("top_k", 0)),
            top_p=float(options.get("top_p", 1.0)),
            seed=int(options.get("seed", 0)),
        )
        prompt = model.tok_encode(context)[-(model.max_length - new) :]
        return _Continuation(number, prompt or [model.prefix_token_id], (new, sampler, until))


def _parse_batch_size(given: int | str) -> int | None:
    """Return the prompts of a batch, None for "auto"."""
    if str(given) == "auto":
        return None
    if not str(given).isdecimal() or int(given) < 1:
        raise ConfigError(
            f"batch_size {given} must be a whole number of at least 1, or auto. Set --batch_size."
        )
    return int(given)


def _config(options: dict[str, Any]) -> InferenceConfig:
    """Return the options of --model_args, of which lm-eval parses numbers and booleans."""
    known = {field.name: field.type for field in fields(InferenceConfig)}
    known.pop("dry_run")
    known.pop("world_size")
    problems = [
        f"--model_args has {name}, which is no option. Known: {', '.join(known)}."
        for name in options.keys() - known.keys()
    ]
    for name, hint in known.items():
        if name in options:
            value = str(options[name]) if hint is str else options[name]
            try:
                options[name] = validate(value, hint)
            except UntrustedInputError:
                problems.append(
                    f"--model_args has {name}={options[name]}, and expected is "
                    f"{inspect.formatannotation(hint)}."
                )
    if problems:
        raise ConfigError(problems)
    return InferenceConfig(**options)
