"""Waveform -> speech tokens: `load` opens any tokenizer folder; `supervised` has the tokenizer that we train."""

from speechquilt.tokenizer.loading import load

__all__ = ["load"]
