"""SpeechQuilt: pre-train speech-text language models, from raw audio and text to a measured model."""

__version__ = "0.1.0"
