"""What every Aligner keeps, for each network that can listen; and that one trained for seconds finds words to 40 ms."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt import protocols
from speechquilt.aligner import CTCAligner, Wav2Vec2Emitter
from speechquilt.data.sources.micro_world import MicroWorldConfig
from speechquilt.stages.corpus import join, speak
from speechquilt.stages.train_aligner import (
    GOAL_S,
    AlignerRecipe,
    align_utterances,
    load_aligner,
    measure_aligner,
    measure_shift,
    train_aligner,
)
from speechquilt.text import TextTokenizer
from speechquilt.tokenizer.emitters import CharacterCTC, CharacterCTCConfig, TokenizerEmitter
from speechquilt.tokenizer.supervised import SupervisedTokenizerConfig
from speechquilt.train.trainer import TrainConfig
from speechquilt.tts.espeak import EspeakTTSConfig
from speechquilt.types import Utterance, Waveform

WORDS = ["the", "cat", "sat", "on", "mat", "where", "does", "anna's", "dog", "live"]
ALPHABET = "abcdefghijklmnopqrstuvwxyz'"
TINY_RECIPE = AlignerRecipe(
    model=CharacterCTCConfig(alphabet="", num_mels=40, width=64, ffn_width=128, num_layers=2),
    train=TrainConfig(
        steps=200, lr=4e-3, warmup_steps=20, min_lr_ratio=0.05, beta2=0.98, weight_decay=0.01, checkpoint_every=1000
    ),
    batch_seconds=8.0,
    gain_db=0.0,
)


def wav2vec2_folder(folder: Path, *, upper: bool = True, **changes: object) -> Path:
    """A tiny random checkpoint as facebook/wav2vec2-base-960h has it: the same files, keys and alphabet."""
    import transformers

    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *(ALPHABET.upper() if upper else ALPHABET)]
    settings = {
        "vocab_size": len(letters), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
        "pad_token_id": 0, "feat_extract_norm": "layer",
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**(settings | changes)))
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"do_normalize": True, "feature_size": 1, "padding_value": 0.0, "sampling_rate": 16000})
    )
    return folder


@pytest.fixture(scope="module", params=["characters", "tokenizer", "wav2vec2"])
def aligner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CTCAligner:
    """Random weights, and windows of 2 s, so that clips of a few seconds have edges inside."""
    if request.param == "characters":
        sizes = {"num_mels": 20, "width": 32, "num_heads": 2, "ffn_width": 64, "num_layers": 2}
        config = CharacterCTCConfig(alphabet=ALPHABET, **sizes, max_frames=100, context_frames=20)
        return CTCAligner(config.build().eval())
    if request.param == "wav2vec2":
        return CTCAligner(Wav2Vec2Emitter(wav2vec2_folder(tmp_path_factory.mktemp("wav2vec2")), window_s=6.0))
    text = TextTokenizer.train([" ".join(WORDS)], 300)
    config = SupervisedTokenizerConfig(
        text_vocab_size=text.size, num_mels=20, width=32, num_heads=2, ffn_width=64, layers_below=1, layers_above=1,
        decoder_layers=1, block_frames=20, max_frames=100, codebook_size=16,
    )  # fmt: skip
    return CTCAligner(TokenizerEmitter(config.build(text).eval()))


def noise(seed: int, seconds: float, sample_rate: int = 16000) -> Waveform:
    samples_S = np.random.default_rng(seed).standard_normal(round(seconds * sample_rate)) * 0.1
    return Waveform(samples_S=samples_S.astype(np.float32), sample_rate=sample_rate)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=6),
    seconds=st.floats(5.0, 9.0),
    sample_rate=st.sampled_from([16000, 8000, 44100]),
)
def test_words_come_back_in_order_inside_the_audio(
    aligner: CTCAligner, words: list[str], seconds: float, sample_rate: int
) -> None:
    """Whatever the network hears: one word each, in the text's own spelling, and the same again when asked again."""
    assert isinstance(aligner, protocols.Aligner)
    waveform, text = noise(len(words), seconds, sample_rate), " ".join(word.title() + "," for word in words)
    found = aligner.align(waveform, text)
    assert [w.text for w in found] == text.split()
    times = [t for w in found for t in (w.start_s, w.end_s)]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= waveform.duration_s + 1e-9
    assert all(w.end_s > w.start_s for w in found)
    assert all(0 < w.score <= 1 for w in found)
    assert aligner.align(waveform, text) == found


def test_a_clip_that_is_too_short_is_named(aligner: CTCAligner) -> None:
    with pytest.raises(ValueError, match=r"needs \d+ frames, the audio of 0\.03 s has [12]"):
        aligner.align(noise(0, 0.03), "where does the cat live")


def test_recordings_that_cannot_be_aligned_are_counted(aligner: CTCAligner) -> None:
    good = Utterance(id="good", text="the cat", audio=noise(0, 2.0))
    broken = Waveform(samples_S=np.full(9000, np.nan, dtype=np.float32), sample_rate=16000)
    timed = replace(good, id="timed", alignment=aligner.align(good.audio, "the cat")[:1])
    bad = [replace(good, id="nan", audio=broken), replace(good, id="short", audio=noise(0, 0.03))]
    aligned, rejects = align_utterances(aligner, [bad[0], good, bad[1], timed])
    assert [(u.id, len(u.alignment)) for u in aligned] == [("good", 2), ("timed", 1)]
    assert [r.id for r in rejects] == ["nan", "short"]
    assert "NaN" in rejects[0].reason


@pytest.fixture(scope="module")
def speech() -> tuple[list[Utterance], list[Utterance]]:
    """One voice, nine minutes of the micro-world, and held-out sentences."""
    world, speaker = MicroWorldConfig().build(), EspeakTTSConfig(voices=("en-us",)).build()
    held_out = speak(speaker, join(world.held_out_sentences(60), 5, 1))
    return speak(speaker, join(world.sentences(400), 2, 0)), held_out


@pytest.fixture(scope="module")
def trained(speech: tuple[list[Utterance], list[Utterance]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aligner")
    train_aligner(TINY_RECIPE, speech[0], [], folder)
    return folder


def test_two_hundred_steps_find_words_to_40_ms(trained: Path, speech: tuple[list[Utterance], list[Utterance]]) -> None:
    aligner = load_aligner(trained)
    found = measure_aligner(aligner, speech[1])
    assert found["aligner.boundary_error_median_s"] <= GOAL_S
    assert found["aligner.boundaries_within_goal"] > 0.85
    untrained = CTCAligner(CharacterCTCConfig(alphabet=ALPHABET, num_mels=40, width=64).build().eval())
    untrained.shift = measure_shift(untrained, speech[0][:50])
    assert measure_aligner(untrained, speech[1])["aligner.boundary_error_median_s"] > 2 * GOAL_S


def test_words_are_found_when_other_speech_surrounds_them(
    trained: Path, speech: tuple[list[Utterance], list[Utterance]]
) -> None:
    """A recording over several windows gives each sentence the times it has alone."""
    aligner, parts = load_aligner(trained), speech[1]
    samples_S = np.concatenate([u.audio.samples_S for u in parts])
    found = aligner.align(Waveform(samples_S=samples_S, sample_rate=16000), " ".join(u.text for u in parts))
    starts = np.cumsum([0.0] + [u.duration_s for u in parts[:-1]])
    known = [(w.start_s + at, w.end_s + at) for u, at in zip(parts, starts) for w in u.alignment]
    errors = np.abs(np.array([(w.start_s, w.end_s) for w in found]) - np.array(known))
    assert len(samples_S) > 2 * aligner.emitter.window_frames * aligner.emitter.frame_samples
    assert np.median(errors) <= GOAL_S


def test_the_saved_aligner_is_the_trained_one(trained: Path, speech: tuple[list[Utterance], list[Utterance]]) -> None:
    aligner, utterance = load_aligner(trained), speech[1][0]
    assert isinstance(aligner.emitter, CharacterCTC)
    assert aligner.emitter.config.alphabet == "".join(
        sorted(set("".join(u.text for u in speech[0]).lower()) - set(" .,?"))
    )
    assert aligner.shift.start_s < -0.02  # spikes come after the onset
    other = CTCAligner(CharacterCTC.load(trained), aligner.shift)
    assert other.align(utterance.audio, utterance.text) == aligner.align(utterance.audio, utterance.text)
    text = utterance.text + " 12"
    assert aligner.align(utterance.audio, text)[-1].score == 0  # a digit was never heard
    assert "'" not in aligner.emitter.config.alphabet
    assert aligner.align(utterance.audio, utterance.text + " dog’s")[-1].score > 0


def test_folders_that_are_not_aligners_are_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_aligner(tmp_path)
    (tmp_path / "config.json").write_text((trained / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load_aligner(tmp_path)
    other = replace(CharacterCTC.load(trained).config, num_layers=3).build()
    other.save(tmp_path)
    (tmp_path / "config.json").write_text((trained / "config.json").read_text())
    with pytest.raises(ValueError, match="does not fit its config"):
        load_aligner(tmp_path)


def test_a_clip_sounds_the_same_in_a_padded_batch() -> None:
    model = CharacterCTCConfig(alphabet=ALPHABET, width=32, num_heads=2, ffn_width=64, num_layers=2).build().eval()
    wavs = [torch.from_numpy(noise(i, seconds).samples_S) for i, seconds in enumerate((0.31, 1.7))]
    wav_BS = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    with torch.no_grad():
        states_BFD, num_frames_B = model(wav_BS, torch.tensor([len(w) for w in wavs]))
        log_p_BFV = model.ctc.proj(states_BFD).log_softmax(-1)
    for b, wav_S in enumerate(wavs):
        torch.testing.assert_close(log_p_BFV[b, : num_frames_B[b]], model.emit(wav_S), atol=1e-4, rtol=0)


def test_ids_belong_to_their_words() -> None:
    """Character encoder: the space in front of a word is nobody's. Tokenizer: it is part of the piece."""
    model = CharacterCTCConfig(alphabet="abc'").build()
    spelling = model.spell(["ab", "12", "c's", "c b"])
    assert model.text_tokenizer.decode(spelling.ids_L) == "ab c b"
    assert spelling.word_L.tolist() == [-1, 0, 0, -1, 3, 3, 3]
    text = TextTokenizer.train(["cat cat cat dogs"] * 9, 259)
    tokenizer = SupervisedTokenizerConfig(text_vocab_size=text.size, width=32, num_heads=2).build(text).eval()
    spelling = TokenizerEmitter(tokenizer).spell(["cat", "", "at"])
    assert text.decode(spelling.ids_L) == "cat at"
    assert set(spelling.word_L.tolist()) == {0, 2}


def test_the_tokenizers_head_reads_what_the_aligner_hears() -> None:
    """Best path through the emitter == the tokenizer's own transcript."""
    text = TextTokenizer.train([" ".join(WORDS)], 300)
    config = SupervisedTokenizerConfig(text_vocab_size=text.size, width=32, num_heads=2, ffn_width=64, codebook_size=16)
    tokenizer = config.build(text).eval()
    emitter = TokenizerEmitter(tokenizer)
    wav_S = torch.from_numpy(noise(3, 4.0).samples_S)
    best_T = torch.unique_consecutive(emitter.emit(wav_S).argmax(-1)).tolist()
    transcript = tokenizer.transcribe(wav_S[None], torch.tensor([len(wav_S)]), "ctc")
    assert [text.decode([i for i in best_T if i != emitter.blank])] == transcript


@pytest.mark.parametrize("changes", [{}, {"feat_extract_norm": "group", "do_stable_layer_norm": False}])
def test_wav2vec2_hears_what_transformers_hears(tmp_path: Path, changes: dict) -> None:
    import transformers

    emitter = Wav2Vec2Emitter(wav2vec2_folder(tmp_path, **changes))
    assert (emitter.frame_samples, emitter.margin) == (320, 40)
    samples_S = noise(5, 2.0).samples_S * 0.3 + 0.1
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    values_1S = extractor(samples_S, sampling_rate=16000, return_tensors="pt").input_values
    model = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected_FV = model(torch.nn.functional.pad(values_1S, (40, 40))).logits[0].log_softmax(-1)
    found_FV = emitter.emit(torch.from_numpy(samples_S))
    assert found_FV.shape == (100, 32)
    torch.testing.assert_close(found_FV, expected_FV, atol=1e-4, rtol=0)
    assert emitter.emit(torch.from_numpy(samples_S[:1])).shape == (1, 32)


@pytest.mark.parametrize("upper", [True, False])
def test_wav2vec2_spells_in_the_alphabets_case(tmp_path: Path, upper: bool) -> None:
    emitter = Wav2Vec2Emitter(wav2vec2_folder(tmp_path, upper=upper))
    spelling = emitter.spell(["it's", "5", "a b", "é", "c"])
    letters = {i: letter.lower() for letter, i in emitter.vocab.items()}
    assert "".join(letters[i] for i in spelling.ids_L) == "it's|a|b|c"
    assert spelling.word_L.tolist() == [0, 0, 0, 0, -1, 2, 2, 2, -1, 4]
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({k: v for k, v in vocab.items() if k not in "'|"}))
    spelling = Wav2Vec2Emitter(tmp_path).spell(["it's", "so"])
    assert "".join(letters[i] for i in spelling.ids_L) == "itsso"


def test_wav2vec2_folders_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    folder = wav2vec2_folder(tmp_path)
    assert isinstance(load_aligner(folder).emitter, Wav2Vec2Emitter)
    (folder / "vocab.json").write_text(json.dumps({"eng": {"a": 1}}))
    with pytest.raises(ValueError, match="one alphabet per language"):
        Wav2Vec2Emitter(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="read from safetensors only, convert"):
        Wav2Vec2Emitter(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "whisper"}))
    with pytest.raises(ValueError, match="model_type='whisper' must be 'wav2vec2'"):
        Wav2Vec2Emitter(folder)
    (folder / "preprocessor_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    wav2vec2_folder(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json is missing"):
        Wav2Vec2Emitter(folder)
