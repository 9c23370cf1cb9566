"""A plain model as a Hugging Face folder, so that transformers, vLLM and others serve it as it is.

`AutoModelForCausalLM` gives the same logits as `PlainLM`, `AutoTokenizer` the ids of `Vocab`: specials and speech
tokens are added to the text tokenizer as `<|bos|>`, `<|speech_17|>` and so on.
Trap: a document here is BOS, a marker (none in front of opening text, where the run has that layout), ids, another
marker, ... The exported tokenizer adds none of them by itself.
"""

import json
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer

from speechquilt.config import to_dict
from speechquilt.files import write_json
from speechquilt.model.latent import LatentLM
from speechquilt.model.plain import PlainLM
from speechquilt.nn.hugging_face import BODY, EMBEDDING, HEAD, LAYOUT_KEY, MAX_POSITIONS, hugging_face_config
from speechquilt.text import TextTokenizer
from speechquilt.vocab import Special, Vocab


def export(
    model: PlainLM | LatentLM, vocab: Vocab, tokenizer: TextTokenizer, folder: Path, max_positions: int = MAX_POSITIONS
) -> None:
    """Write weights, configs, tokenizer and a README.md that says what the ids mean; `folder` is made, or is empty.

    `max_positions`: longest sequence that engines will accept. Raises ValueError for a latent model, a model that no
    Hugging Face class computes, and a vocabulary or tokenizer of another size.
    """
    if not isinstance(model, PlainLM):
        raise ValueError(
            "kind=latent cannot be exported: no Hugging Face class has patches; export a plain model, or use the latent "
            "one from its own folder"
        )
    if vocab.size != model.config.vocab_size or tokenizer.size != vocab.num_text:
        raise ValueError(
            f"the model has {model.config.vocab_size} ids, the vocabulary {vocab.size} with {vocab.num_text} of text, the "
            f"text tokenizer {tokenizer.size}; they must be of one run"
        )
    if max_positions < 1:
        raise ValueError(f"max_positions={max_positions} must be at least 1; give the longest sequence to serve")
    dtype = str(model.head.weight.dtype).removeprefix("torch.")
    config = hugging_face_config(model.config.llama, vocab, dtype=dtype, max_positions=max_positions)
    speaking = _with_all_tokens(tokenizer, vocab)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; an export goes into a folder of its own, choose another")
    weights = {_theirs(name): tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config | {LAYOUT_KEY: to_dict(vocab)})
    write_json(folder / "generation_config.json", {key: config[key] for key in _ENDS})
    write_json(folder / "tokenizer_config.json", _tokenizer_config(max_positions))
    speaking.save(str(folder / "tokenizer.json"))
    (folder / "README.md").write_text(_readme(config["architectures"][0], vocab))


_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def token(special: Special) -> str:
    """How the exported tokenizer writes a special token."""
    return f"<|{special.name.lower()}|>"


def _theirs(name: str) -> str:
    own = {"embedding.weight": EMBEDDING, "head.weight": HEAD}
    return own.get(name) or BODY + name.removeprefix("llama.")


def _with_all_tokens(tokenizer: TextTokenizer, vocab: Vocab) -> Tokenizer:
    """The text tokenizer with the special and speech tokens behind the text, at the ids of `vocab`."""
    data = json.loads(tokenizer.json)
    data["post_processor"] = None  # a base model's own would put its BOS before ours
    full = Tokenizer.from_str(json.dumps(data))
    names = [token(special) for special in Special] + [f"<|speech_{i}|>" for i in range(vocab.num_speech)]
    full.add_special_tokens(names)
    for i, name in enumerate(names, vocab.num_text):
        if full.token_to_id(name) != i:
            raise ValueError(
                f"token {name} would get id {full.token_to_id(name)}, the model has it at {i}: the text tokenizer has a "
                "token of this name or leaves ids free; rename it there"
            )
    return full


def _tokenizer_config(max_positions: int) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        "bos_token": token(Special.BOS),
        "eos_token": token(Special.EOS),
        "pad_token": token(Special.PAD),
    }


def _readme(architecture: str, vocab: Vocab) -> str:
    specials = "\n".join(f"| {vocab.special(s)} | `{token(s)}` |" for s in Special)
    opening = "" if vocab.opening_marker else "; text that opens a document has no `<|text|>` in front of it"
    prompt = f"<|bos|>{'<|text|>' if vocab.opening_marker else ''}the red fox<|speech|>"
    return f"""# A speech-text language model

`{architecture}`, exported by SpeechQuilt. Plain `transformers` or any engine that serves the architecture runs it.

| ids | meaning |
| --- | --- |
| 0 to {vocab.num_text - 1} | text, of the text tokenizer |
{specials}
| {vocab.speech_start} to {vocab.speech_start + vocab.num_speech - 1} | speech: id - {vocab.speech_start} is the entry of the speech tokenizer's codebook, written `<|speech_0|>` to `<|speech_{vocab.num_speech - 1}|>` |
| {vocab.speech_start + vocab.num_speech} to {vocab.size - 1} | padding of the table, never produced by training data |

A document is `<|bos|>`, then spans, then `<|eos|>`. A span is `<|text|>` and text, or `<|speech|>` and speech tokens{opening}. The
tokenizer adds none of these by itself: write the prompt in full, for example `{prompt}` to be answered in speech. To
stop at the end of a span and not of the document, give generation the end ids {vocab.eos}, {vocab.marker("text")} and {vocab.marker("speech")}.
Audio becomes speech tokens by the speech tokenizer of the run that trained this model, and by no other.
"""
