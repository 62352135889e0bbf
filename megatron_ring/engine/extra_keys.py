"""The check of the user's extra DeepSpeed keys by the DeepSpeed that is installed.

DeepSpeed ignores a key that it never reads, so a misspelt one would change nothing. No list of its
keys is published; they are those that ``DeepSpeedConfig`` reads while it is built.
"""

import contextlib
import difflib
from collections.abc import Iterator
from typing import Any

import deepspeed
import pydantic

from megatron_ring import untrusted
from megatron_ring.config import Config
from megatron_ring.errors import ConfigError
from megatron_ring.settings.run_settings import RunSettings

_REMEDY = "in deepspeed of section training (YAML only), or leave it out."
_MAX_SUGGESTIONS = 3

# They depend on the number of processes, which DeepSpeed takes from torch.distributed.
_BATCH_SIZES = {"train_batch_size", "gradient_accumulation_steps"}


def resolve_settings(config: Config, world_size: int) -> RunSettings:
    """Resolve ``config`` (``RunSettings.resolve``) and check its extra keys. Does not communicate.

    Raises ConfigError for keys and values of the config's deepspeed that DeepSpeed rejects or would
    ignore, besides the errors of ``RunSettings.resolve``.
    """
    setup = RunSettings.resolve(config, world_size)
    extra = config.training.deepspeed
    if not extra:
        return setup
    settings = {key: value for key, value in setup.deepspeed.items() if key not in _BATCH_SIZES}
    recording = _RecordingSettings(settings)
    with rejected_settings_as_config_error():
        try:
            deepspeed.DeepSpeedConfig(recording)
        except pydantic.ValidationError:
            raise
        # DeepSpeedConfigError, or any other if a section is no dict or a value has another type.
        except Exception as error:
            rejected = [key for key in extra if _is_accepted(settings, without=key)] or extra
            raise ConfigError(
                f"deepspeed: {', '.join(rejected)} is rejected by DeepSpeed "
                f"{deepspeed.__version__}: {str(error).rstrip('.')}. Change it {_REMEDY}"
            ) from error
    if problems := recording.problems():
        raise ConfigError(problems)
    return setup


def _is_accepted(settings: dict[str, Any], without: str) -> bool:
    """Return whether DeepSpeed accepts ``settings`` without one of its keys."""
    try:
        deepspeed.DeepSpeedConfig({key: settings[key] for key in settings if key != without})
    except Exception:
        return False
    return True


@contextlib.contextmanager
def rejected_settings_as_config_error() -> Iterator[None]:
    """Raise ConfigError for extra keys and values that DeepSpeed's pydantic models reject."""
    try:
        yield
    except pydantic.ValidationError as error:
        raise ConfigError(
            f"deepspeed: {'.'.join(map(str, problem['loc']))} {untrusted.shown(problem['input'])} "
            f"is rejected by {error.title}: {problem['msg']}. Change it {_REMEDY}"
            for problem in error.errors()
        ) from error


class _RecordingDict(dict):
    """A dict that records which of its keys are looked up.

    A reader that copies or unpacks the whole dict counts as a look-up of every key.
    """

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.looked_up: set[str] = set()

    def __contains__(self, key: str) -> bool:
        self.looked_up.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.looked_up.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.looked_up.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self.looked_up.update(super().keys())
        return super().__iter__()

    def keys(self) -> "_RecordingDict":
        # DeepSpeed tests for a key with ``in settings.keys()``.
        return self

    def items(self) -> Any:
        self.looked_up.update(super().keys())
        return super().items()

    def __copy__(self) -> "_RecordingDict":
        self.looked_up.update(super().keys())
        return self


class _RecordingSettings(_RecordingDict):
    """DeepSpeed's config, which DeepSpeedConfig copies before it reads it; its sections record too.

    pydantic reads a section without these methods and rejects unknown keys itself. So a section
    shows ignored keys only if another key was looked up. Deeper dicts may be options of any name.
    """

    def __init__(self, values: dict[str, Any]):
        super().__init__(
            (key, _RecordingDict(value) if isinstance(value, dict) else value)
            for key, value in values.items()
        )

    def __copy__(self) -> "_RecordingSettings":
        return self

    def problems(self) -> list[str]:
        """Return one problem for each key that was never looked up."""
        problems = _ignored_key_problems(self, "")
        for name, section in dict.items(self):
            if isinstance(section, _RecordingDict) and section.looked_up:
                problems += _ignored_key_problems(section, f"{name}.")
        return problems


def _ignored_key_problems(recording: _RecordingDict, prefix: str) -> list[str]:
    problems = []
    for key in dict.keys(recording) - recording.looked_up:
        near = difflib.get_close_matches(key, recording.looked_up, n=_MAX_SUGGESTIONS)
        nearest = f" Nearest: {', '.join(prefix + name for name in near)}." if near else ""
        problems.append(
            f"deepspeed: {untrusted.shown(prefix + key)} is not a key of DeepSpeed "
            f"{deepspeed.__version__}, which would ignore it.{nearest} Correct it {_REMEDY}"
        )
    return sorted(problems)
