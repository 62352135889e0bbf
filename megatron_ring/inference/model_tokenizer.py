"""The tokenizer of a trained model, and the ids that begin and end its texts.

A checkpoint does not hold its tokenizer unless it was imported. The tokenizer is --tokenizer-model,
that of the Hugging Face folder, or that of the token store which the run has read.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ring.checkpoint.hugging_face.folder import CARRIED
from megatron_ring.checkpoint.hugging_face.special_tokens import SpecialTokens
from megatron_ring.config import Config, InferenceConfig
from megatron_ring.data.dataset import DEFAULT_FOLDER
from megatron_ring.data.manifest import read_manifest, tokenizer_path
from megatron_ring.data.prepare import python_library_prefix
from megatron_ring.data.store_fingerprint import Fingerprint, manifest_sha256
from megatron_ring.data.tokenizer import FILE_NAMES, Tokenizer
from megatron_ring.errors import ConfigError, DataError


@dataclass(frozen=True)
class ModelTokenizer:
    """The tokenizer of a model.

    tokenizer: None if no file was found. searched: the files looked for. begin: ids before a text.
    ends: ids of which each ends a text; empty if they are not known either.
    """

    tokenizer: Tokenizer | None
    searched: tuple[Path, ...]
    begin: tuple[int, ...]
    ends: tuple[int, ...]

    def required(self) -> Tokenizer:
        """Return the tokenizer; raise ConfigError if there is none."""
        if self.tokenizer is None:
            places = " or ".join(map(str, self.searched)) or "the model's folder"
            raise ConfigError(
                f"the model's tokenizer is not found: there is no {places}. Set --tokenizer-model "
                "to its tokenizer.json or sentencepiece model."
            )
        return self.tokenizer

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of ``tokens``; a model may have rows that are no token's.

        Bytes that are not UTF-8 become U+FFFD.
        """
        tokenizer = self.required()
        return tokenizer.decode(token for token in tokens if token < tokenizer.vocab_size)


@dataclass(frozen=True)
class TokenizerSources:
    """Where a model may have its tokenizer.

    hugging_face: a folder written by transformers, or the copy of one in an imported checkpoint.
    run: the config of the run that wrote a checkpoint of ours. trained_end: the id that ended
    documents in training.
    """

    hugging_face: Path | None = None
    run: Config | None = None
    trained_end: int | None = None

    @staticmethod
    def of_checkpoint(path: Path, run: Config, trained_end: int | None) -> "TokenizerSources":
        """Return the sources of the checkpoint at ``path``."""
        carried = path / CARRIED
        return TokenizerSources(carried if carried.is_dir() else None, run, trained_end)

    def files(self) -> Iterator[Path]:
        """Yield the files that may be the tokenizer, the preferred one first."""
        if self.hugging_face:
            yield from (self.hugging_face / name for name in FILE_NAMES)
        if self.run and self.run.data.tokenizer_model:
            yield Path(self.run.data.tokenizer_model)
        elif prefix := self.store():
            yield tokenizer_path(prefix)

    def store(self) -> str:
        """Return the prefix of the run's first token store, "" for a Hugging Face folder."""
        if self.run is None:
            return ""
        default = str(python_library_prefix(DEFAULT_FOLDER))
        return next(iter(self.run.data.blend), default)


def find_tokenizer(
    config: InferenceConfig, sources: TokenizerSources, vocab_size: int, exact: bool
) -> ModelTokenizer:
    """Find the tokenizer of a model with ``vocab_size`` rows.

    ``exact``: the model has a row for each id and no others. Raises ConfigError if the tokenizer
    does not fit the vocabulary, and DataError if its file cannot be read.
    """
    files = tuple(sources.files())
    path = _chosen_file(config, sources)
    known_ends = _known_ends(sources)
    if path is None:
        return ModelTokenizer(None, files, (), known_ends)
    tokenizer = Tokenizer.load(path)
    _check_fits(path, tokenizer, vocab_size, exact)
    return ModelTokenizer(
        tokenizer=tokenizer,
        searched=files,
        begin=_begin(config, sources, tokenizer),
        ends=known_ends or (tokenizer.end_of_document,),
    )


def _chosen_file(config: InferenceConfig, sources: TokenizerSources) -> Path | None:
    """Return the tokenizer's file: --tokenizer-model, else the first source that exists, if any."""
    if config.tokenizer_model:
        return Path(config.tokenizer_model)
    return next((file for file in sources.files() if file.is_file()), None)


def store_notes(
    config: InferenceConfig, sources: TokenizerSources, stores: Sequence[Fingerprint]
) -> tuple[str, ...]:
    """Return a note where the tokenizer would be that of another store than the run has read.

    ``stores`` are the fingerprints in the checkpoint. Stores are found by their paths, and another
    one may have been written to the same path since, even with another tokenizer of equal size.
    """
    prefix = sources.store()
    chosen = _chosen_file(config, sources)
    if not prefix or chosen is None or chosen != tokenizer_path(prefix):
        return ()
    try:
        found = manifest_sha256(prefix)
    except DataError:
        found = ""
    trained = [store["manifest_sha256"] for store in stores if store["prefix"] == prefix]
    if not (found and any(trained)) or found in trained:
        return ()
    return (
        f"token store {prefix} is not the one that the run has read; its tokenizer "
        f"{chosen} may be another one. Set --tokenizer-model if it is",
    )


def _known_ends(sources: TokenizerSources) -> tuple[int, ...]:
    """Return the ids that ended texts in training, or that the Hugging Face folder names."""
    if sources.trained_end is not None:
        return (sources.trained_end,)
    if sources.hugging_face is None:
        return ()
    end = SpecialTokens.find(sources.hugging_face, None).ids["eos_token_id"]
    if end is None:
        return ()
    return tuple(end) if isinstance(end, list) else (end,)


def _begin(
    config: InferenceConfig, sources: TokenizerSources, tokenizer: Tokenizer
) -> tuple[int, ...]:
    if config.prepend_bos == "auto" and (prefix := sources.store()):
        try:
            manifest = read_manifest(prefix)
        except DataError:
            manifest = None  # the store is not needed, and may have been replaced
        if manifest and manifest.tokenizer_sha256 == tokenizer.fingerprint:
            return manifest.begin_of_document
    return tokenizer.begin_of_document(config.prepend_bos)


def _check_fits(path: Path, tokenizer: Tokenizer, vocab_size: int, exact: bool) -> None:
    ids = tokenizer.vocab_size
    if ids == vocab_size or (ids < vocab_size and not exact):
        return
    rule = f"exactly {vocab_size}" if exact else f"at most {vocab_size}"
    raise ConfigError(
        f"tokenizer {path} has {ids} ids, and the model, whose vocabulary has {vocab_size} rows, "
        f"needs one of {rule}: it is the tokenizer of another model. Set --tokenizer-model."
    )
