"""With the real weights (`make weights`): our Whisper is transformers' Whisper, our Llama transformers' SmolLM2.

Random weights cannot show everything: real ones have channels a hundred times as large as others and know English.
"""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from speechquilt.model.plain import PlainLM
from speechquilt.model.warm_start import plain_from_hugging_face
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.tokenizer.whisper import whisper_start
from speechquilt.types import Batch
from speechquilt.vocab import Vocab
from tests.parity.tiny_tokenizers import noise
from tests.real_weights import SMOLLM2, WHISPER, real_weights

PROSE = (
    "The old lighthouse stood at the end of the pier, where the fishermen came in the evening to mend their nets. "
    "In winter nobody walked there, because the waves went over the stones and the wind was too strong to speak."
)


@pytest.fixture(scope="module")
def whispers() -> tuple[SupervisedTokenizer, Any]:
    folder = real_weights(WHISPER)
    own_rate = {"codebook_size": 8, "block_frames": 100, "max_frames": 1500}
    ours = whisper_start(folder, language=None, causal=False, features="whisper", pooling=1, **own_rate)
    return ours, transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()


@torch.no_grad()
def test_encoder_and_reader_are_whispers(whispers: tuple[SupervisedTokenizer, Any]) -> None:
    """From samples to logits, on a window of 30 s. The codebook is bypassed before its warm-up."""
    ours, theirs = whispers
    wav_BS = torch.nn.functional.pad(noise(0, 3.0)[None], (0, 27 * 16000))
    extractor = transformers.WhisperFeatureExtractor()
    mel_BMF = extractor(wav_BS[0].numpy(), sampling_rate=16000, return_tensors="pt").input_features
    states_BTD = ours(wav_BS, torch.tensor([wav_BS.shape[1]])).states_BTD
    expected = theirs.model.encoder(mel_BMF).last_hidden_state
    assert (states_BTD - expected).abs().max() <= 1e-3
    assert ours.text_tokenizer is not None
    ids_BL = torch.tensor([[*ours.config.decoder_prompt, *ours.text_tokenizer.encode(f" {PROSE}")]])
    logits_BLV = ours.decoder(ids_BL, states_BTD, torch.tensor([states_BTD.shape[1]]))
    theirs_BLV = theirs(encoder_outputs=(expected,), decoder_input_ids=ids_BL).logits
    assert (logits_BLV - theirs_BLV).abs().max() <= 1e-3
    assert theirs_BLV.std() > 1


@pytest.fixture(scope="module")
def llamas() -> tuple[PlainLM, Vocab, Any]:
    folder = real_weights(SMOLLM2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    vocab = Vocab(num_text=theirs.config.vocab_size, num_speech=16)
    return plain_from_hugging_face(folder, vocab).eval(), vocab, theirs


def prose_ids() -> Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_weights(SMOLLM2))
    return torch.tensor([tokenizer(PROSE).input_ids])


def plain_batch(ids_BT: Tensor) -> Batch:
    return Batch(ids_BT=ids_BT, labels_BT=ids_BT.roll(-1, 1), doc_BT=torch.zeros_like(ids_BT))


@torch.no_grad()
def test_a_warm_start_has_smollm2s_logits(llamas: tuple[PlainLM, Vocab, Any]) -> None:
    ours, vocab, theirs = llamas
    ids_BT = prose_ids()
    logits_BTV, expected_BTV = ours(plain_batch(ids_BT)), theirs(ids_BT).logits
    end = theirs.config.eos_token_id  # its row is that of EOS now
    expected_BTV = torch.cat([expected_BTV, expected_BTV[..., [end]]], -1)
    kept = [i for i in range(vocab.num_text) if i != end]
    difference_BTV = logits_BTV[..., [*kept, vocab.eos]] - expected_BTV[..., [*kept, vocab.num_text]]
    assert difference_BTV.abs().max() <= 1e-3
    state = ours.init_state(1, ids_BT.shape[1])
    for t in range(8):
        stepped_BV, state = ours.step(ids_BT[:, t], None, None, state)
        assert (stepped_BV - logits_BTV[:, t]).abs().max() <= 1e-3


@torch.no_grad()
def test_it_knows_english(llamas: tuple[PlainLM, Vocab, Any]) -> None:
    """Wrong rows or rotations give words no better than chance, whatever parity says: both sides read one folder."""
    ids_BT = prose_ids()
    mixed_BT = ids_BT[:, torch.randperm(ids_BT.shape[1], generator=torch.Generator().manual_seed(0))]
    assert perplexity(llamas[0], ids_BT) < 40
    assert perplexity(llamas[0], mixed_BT) > 400


def perplexity(model: PlainLM, ids_BT: Tensor) -> float:
    logits_BTV = model(plain_batch(ids_BT))[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten()).exp())
