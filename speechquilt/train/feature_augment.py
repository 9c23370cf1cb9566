"""What changes a model's input features while it trains, and only then."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class FeatureAugment(ABC):
    """`mel_BMF` -> another of the same shape."""

    @abstractmethod
    def __call__(self, mel_BMF: torch.Tensor) -> torch.Tensor: ...

    @contextmanager
    def behind(self, features: nn.Module) -> Iterator[None]:
        """Inside, what `features` returns is changed."""
        handle = features.register_forward_hook(lambda module, arguments, mel_BMF: self(mel_BMF))
        try:
            yield
        finally:
            handle.remove()
