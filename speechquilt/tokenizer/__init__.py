"""Waveform -> speech tokens: `load` opens any tokenizer folder; `model` has the one that we train."""

from speechquilt.tokenizer.loading import load

__all__ = ["load"]
