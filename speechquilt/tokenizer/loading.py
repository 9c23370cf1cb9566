"""Any tokenizer folder: a run of ours, the released GLM-4-Voice tokenizer, or HuBERT units.

Its files say which kind a folder is, not its name. A plain Whisper or HuBERT is not a tokenizer yet.
"""

from pathlib import Path

from speechquilt.nn.hugging_face import read_json
from speechquilt.protocols import SpeechTokenizer
from speechquilt.tokenizer.glm4_voice import is_glm4_voice, load_glm4_voice
from speechquilt.tokenizer.hubert import UNITS, HubertUnits
from speechquilt.tokenizer.supervised import SupervisedTokenizer


def load(folder: Path | str) -> SpeechTokenizer:
    """The tokenizer in eval mode, on CPU. Raises FileNotFoundError or ValueError saying what the folder is instead."""
    folder = Path(folder)
    data = read_json(folder / "config.json")
    if is_glm4_voice(data):
        return load_glm4_voice(folder)
    if (folder / UNITS).is_file():
        return HubertUnits.load(folder)
    if kind := data.get("model_type"):
        remedy = {
            "whisper": "start a training from it with speechquilt.tokenizer.whisper.whisper_start",
            "hubert": f"add {UNITS} and centroids.safetensors (docs/how-to/public-tokenizers.md)",
        }.get(kind, "give a run folder, a GLM-4-Voice tokenizer or HuBERT units")
        raise ValueError(f"{folder} holds a model of model_type={kind!r}, which is not a speech tokenizer; {remedy}")
    return SupervisedTokenizer.load(folder)
