"""What is derived from a batch's document starts is kept as long as the batch is in flight."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary


class BatchCache:
    """Values by tensor and key. They live as long as the tensor, which is as long as its batch.

    Values of earlier batches are of no use, and key ranges of a million tokens take 16 MB. A tensor
    that was refilled for another batch is detected by its content.
    """

    def __init__(self):
        self._kept = WeakTensorKeyDictionary()

    def get(self, tensor: torch.Tensor, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return what ``compute`` returned for this content of ``tensor`` and this key."""
        content, values = self._kept.get(tensor, (None, {}))
        if content is None or not torch.equal(content, tensor):
            values = {}
            self._kept[tensor] = tensor.clone(), values
        if key not in values:
            values[key] = compute()
        return values[key]
