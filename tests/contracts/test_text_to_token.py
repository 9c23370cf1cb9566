"""The TextToToken contract, the model's Hugging Face twin, and the stage end to end: train, save, load, speak."""

import itertools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.nn.llama import LlamaConfig
from speechquilt.protocols import LanguageModel
from speechquilt.stages import train_text_to_token as recipes
from speechquilt.text import TextTokenizer
from speechquilt.text_to_token import generate as generation
from speechquilt.text_to_token.examples import TextToTokenDataConfig, lay_out, whole_example
from speechquilt.text_to_token.generate import EngineConfig, TextToTokenEngine
from speechquilt.text_to_token.network import TextToTokenConfig, TextToTokenLM, load, save
from speechquilt.train.objectives.next_token import NextTokenObjective
from speechquilt.train.trainer import TrainConfig
from speechquilt.types import IGNORE, AlignedTokens, AlignedWord, Batch, UnitEnd, Utterance, Waveform

NUM_SPEECH = 40
WORDS = ["red", "blue", "dog", "cat", "runs", "sleeps", "here", "there"]
TOKENIZER = TextTokenizer.train([" ".join(WORDS)] * 3, 300)
LLAMA = LlamaConfig(width=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=128)
CONFIG = TextToTokenConfig(num_text=TOKENIZER.size, num_speech=NUM_SPEECH, llama=LLAMA)
SOUND = {w: np.random.default_rng(i).integers(1, NUM_SPEECH, 2 + i % 3) for i, w in enumerate(WORDS)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spoken(words: tuple[str, ...]) -> AlignedTokens:
    """A language in which every word always sounds the same, with silence (token 0) at both ends."""
    runs = [(-1, np.array([0])), *((i, SOUND[w]) for i, w in enumerate(words)), (-1, np.array([0]))]
    word_T = np.concatenate([np.full(len(ids), i) for i, ids in runs])
    return AlignedTokens(
        id=" ".join(words),
        text=" ".join(words),
        words=words,
        ids_T=np.concatenate([ids for _, ids in runs]),
        word_T=word_T,
    )


SENTENCES = list(itertools.product(*(WORDS[i : i + 2] for i in range(0, 8, 2))))[::2]  # 8 of the 16


def train(loader, steps: int, learning_rate: float = 4e-3, config: TextToTokenConfig = CONFIG) -> TextToTokenLM:
    model = config.build(seed=1)
    objective = NextTokenObjective(model.vocab)  # that of the one trainer, as it is
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for _ in range(steps):
        batch = loader.next_batch()
        loss, weight, _ = objective(model, batch)
        optimizer.zero_grad()
        (loss / weight).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def overfitted() -> TextToTokenLM:
    """Whole sentences only: each text has one right answer."""
    data = TextToTokenDataConfig(rows=2, row_tokens=128, spans_per_utterance=0)
    return train(data.build([spoken(s) for s in SENTENCES], TOKENIZER, CONFIG.vocab), steps=60)


def engine(model: TextToTokenLM, **change) -> TextToTokenEngine:
    return EngineConfig(**change).build(model, TOKENIZER)


def same(a, b) -> bool:
    return a.reject == b.reject and np.array_equal(a.ids_T, b.ids_T) and np.array_equal(a.unit_end_T, b.unit_end_T)


def test_eight_examples_are_learned_and_spoken_again(overfitted):
    speaker = engine(overfitted, temperature=0.1)
    spans = speaker.generate([" ".join(s) for s in SENTENCES], seeds=range(8))
    for sentence, span in zip(SENTENCES, spans):
        truth = spoken(sentence)
        assert span.reject == ""
        np.testing.assert_array_equal(span.ids_T, truth.ids_T)
        np.testing.assert_array_equal(span.unit_end_T, truth.unit_end_T)
    assert (speaker.stats.texts, speaker.stats.retries, dict(speaker.stats.rejects)) == (8, 0, {})
    assert speaker.stats.speech_tokens == sum(len(s.ids_T) for s in spans)


@pytest.fixture
def raw(monkeypatch) -> list[list[int]]:
    """The model ids of every answer, in the order they are finished."""
    answers = []

    def read(answer, *rest):
        answers.append(answer.tolist())
        return read_answer(answer, *rest)

    read_answer = generation.read_answer
    monkeypatch.setattr(generation, "read_answer", read)
    return answers


def test_what_is_generated_is_what_was_laid_out(overfitted, raw):
    for sentence in SENTENCES[:3]:
        engine(overfitted, temperature=0).generate([" ".join(sentence)], [0])
        ids, loss = lay_out(CONFIG.vocab, whole_example(spoken(sentence), TOKENIZER))
        assert raw.pop() == ids[loss].tolist()


def test_a_model_of_whole_texts_cues_the_whole_text(raw):
    """Utterances without word times: one unit, its cue is the text."""
    data = TextToTokenDataConfig(rows=2, row_tokens=128, spans_per_utterance=0)
    whole = []
    for words in SENTENCES:
        ids_T = spoken(words).ids_T
        text, word_T = " ".join(words), np.zeros(len(ids_T), int)
        whole.append(AlignedTokens(id=text, text=text, words=(text,), ids_T=ids_T, word_T=word_T))
    config = replace(CONFIG, cue="text")
    model = train(data.build(whole, TOKENIZER, config.vocab), steps=70, config=config)
    for utterance in whole:
        span = engine(model, temperature=0).generate([utterance.text], [0])[0]
        assert raw[-1][: raw[-1].index(CONFIG.vocab.speech_start)] == TOKENIZER.encode(utterance.text)
        assert span.reject == ""
        np.testing.assert_array_equal(span.ids_T, utterance.ids_T)
        np.testing.assert_array_equal(span.unit_end_T, utterance.unit_end_T)


@pytest.mark.parametrize(("num_aligned", "cue", "num_trained"), [(3, "word", 3), (2, "word", 2), (0, "text", 3)])
def test_the_recipe_cues_by_what_the_recordings_have(tmp_path, monkeypatch, capsys, num_aligned, cue, num_trained):
    seen = []

    def tokenize(_, utterances):
        seen.extend(utterances)
        return [spoken(SENTENCES[0])] * len(utterances)

    monkeypatch.setattr(recipes, "encode_utterances", tokenize)
    monkeypatch.setattr(recipes, "measure_text_to_token", lambda *_: {})
    recipe = recipes.TextToTokenRecipe(
        llama=LLAMA,
        data=TextToTokenDataConfig(rows=1, row_tokens=64),
        train=TrainConfig(steps=1, lr=1e-3, device="cpu", num_threads=1),
        engine=EngineConfig(),
    )
    tokenizer = SimpleNamespace(text_tokenizer=TOKENIZER, vocab_size=NUM_SPEECH, fingerprint="abc123", frame_rate=25.0)
    audio, word = Waveform(samples_S=np.zeros(1), sample_rate=1), AlignedWord(text="red", start_s=0, end_s=1)
    train = [
        Utterance(id=str(i), text="red", audio=audio, alignment=(word,) if i < num_aligned else ()) for i in range(3)
    ]
    recipes.train_text_to_token(recipe, tokenizer, train, [], tmp_path)
    assert load(tmp_path).model.config.cue == cue
    assert seen == train[:num_trained]
    assert ("1 of 3 utterances have no word times" in capsys.readouterr().out) == (num_aligned == 2)


def test_case_and_punctuation_say_the_same(overfitted):
    plain, written = engine(overfitted, temperature=0).generate(["red dog runs here", "Red dog, runs HERE!"], [0, 1])
    assert same(plain, written)


@pytest.fixture(scope="module")
def requests() -> tuple[list[str], list[int]]:
    """40 mixed requests, 1 to 12 words of one or more ids, some empty."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice([*WORDS, "zebra"], rng.integers(1, 13))) for _ in range(38)]
    return [*texts[:20], "", *texts[20:], "?!"], list(range(100, 140))


@pytest.mark.parametrize("change", [{"max_rows": 7}, {"max_rows": 64, "poll_every": 5}])
def test_a_request_alone_is_the_request_in_any_company(overfitted, requests, change):
    texts, seeds = requests
    speaker = engine(overfitted, temperature=2.0, top_p=1.0, **change)
    together = speaker.generate(texts, seeds)
    order = np.random.default_rng(1).permutation(40)
    shuffled = speaker.generate([texts[i] for i in order], [seeds[i] for i in order])
    assert all(same(together[i], span) for i, span in zip(order, shuffled))
    for i in range(0, 40, 3):
        assert same(together[i], speaker.generate([texts[i]], [seeds[i]])[0])
    assert speaker.stats.retries > 0  # so the sameness above covers second attempts too


def test_a_step_looks_at_no_tensor():
    """On the meta device there is nothing to look at, as on a GPU nothing may be waited for."""
    with torch.device("meta"):
        model = TextToTokenLM(CONFIG)
    slots = generation._Slots(model, EngineConfig(), num_rows=3, max_tokens=20)
    request, _ = generation.request_of("red dog", 0, 0, TOKENIZER, "word", EngineConfig())
    slots.requests[1], slots.lengths[1] = request, 5
    for _ in range(2):
        slots.step()
    assert slots.lengths[1] == 7
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        slots.collect()


@given(st.integers(0, 2**32), st.sampled_from([0.3, 2.0, 8.0]), st.sampled_from([0.3, 0.9, 1.0]))
@settings(max_examples=20, deadline=None)
def test_short_lists_choose_what_sorting_everything_chooses(seed, sharpness, top_p):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(6, 300, generator=generator)
    draws = torch.rand(6, generator=generator)
    probs, ids = logits.softmax(1).sort(1, descending=True)
    chosen = generation.sample(logits, draws, 1.0, top_p)
    assert chosen.tolist() == generation._invert(probs, ids, draws, top_p).tolist()
    for row, choice in enumerate(chosen.tolist()):  # by definition: the first place where the mass passes the draw
        mass = probs[row].double().cumsum(0)
        num_inside = int((mass - probs[row] < top_p - 1e-6).sum())
        before = mass[ids[row].tolist().index(choice)] - probs[row][ids[row].tolist().index(choice)]
        assert before <= draws[row] * mass[num_inside - 1] + 1e-4


def test_another_attempt_is_another_draw(overfitted, requests):
    def rejects(max_retries: int) -> int:
        speaker = engine(overfitted, temperature=2.0, top_p=1.0, max_retries=max_retries)
        speaker.generate(*requests)
        return speaker.stats.rejects.total()

    assert rejects(4) < rejects(0)


def test_different_seeds_differ(overfitted):
    spans = engine(overfitted, temperature=1.5, top_p=1.0).generate(["red dog runs here"] * 12, seeds=range(12))
    assert len({tuple(s.ids_T.tolist()) for s in spans}) > 4


def test_only_legal_ids_leave_the_engine(requests):
    """Even from a model that knows nothing, at a high temperature."""
    spans = engine(CONFIG.build(), temperature=3.0, top_p=1.0, max_retries=0).generate(*requests)
    for span in spans:
        assert ((span.ids_T >= 0) & (span.ids_T < NUM_SPEECH)).all()
        assert span.ids_T.dtype == np.int32
        assert span.unit_end_T.shape == span.ids_T.shape
        if span.reject not in ("empty text", "nothing speakable"):
            assert len(span.ids_T) > 0
            assert span.unit_end_T[-1] in (UnitEnd.WORD, UnitEnd.SILENCE)


def biased(token: str) -> TextToTokenLM:
    """A model that always wants one id: its head reads a constant from the last norm."""
    model = CONFIG.build()
    vocab = model.vocab
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = 1.0
        model.lm_head.weight[:] = 0.0
        wanted = {"eos": vocab.eos, "word_end": vocab.word_end, "speech": vocab.speech_start + 3}[token]
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight[vocab.eos] = -1.0
        model.lm_head.weight[wanted] = 1.0
    return model.eval()


@pytest.mark.parametrize("cue", ["word", "text"])
def test_every_word_is_cued_once_in_order(requests, raw, cue):
    """Whatever the model wants: nothing but (silence)? (cue speech WORD_END (silence)?)* EOS, cues those of the text."""
    model = replace(CONFIG, cue=cue).build()
    speaker = engine(model, temperature=2.0, top_p=1.0, max_retries=0, cap_per_token=300, max_rows=40)
    assert len(TOKENIZER.encode("zebra")) > 2
    texts = [text for text in requests[0] if text.isascii() and text.strip("?!")]
    shown = []
    for ids in raw_answers(speaker, texts, raw):
        vocab = CONFIG.vocab
        signs = {vocab.word_end: "|", vocab.eos: "$"}
        shown.append("".join("s" if vocab.is_speech(i) else signs.get(i, f"<{i}>") for i in ids))
    silences = 0
    for text, answer in zip(texts, shown):
        cues = ["".join(f"<{i}>" for i in TOKENIZER.encode(c)) for c in (text.split() if cue == "word" else [text])]
        assert re.fullmatch(r"(s+\|)?" + "".join(rf"{c}s+\|(s+\|)?" for c in cues) + r"\$", answer), (text, answer)
        silences += answer.count("|") - len(cues)
    assert silences > len(texts) / 4


def raw_answers(speaker: TextToTokenEngine, texts: list[str], raw: list[list[int]]) -> list[list[int]]:
    """All texts in one call; an answer is found again by its speech."""
    spans = speaker.generate(texts, range(len(texts)))
    assert not any(span.reject == "length cap" for span in spans)
    start, by_speech = CONFIG.vocab.speech_start, {}
    for answer in raw:
        by_speech[tuple(i - start for i in answer if CONFIG.vocab.is_speech(i))] = answer
    return [by_speech[tuple(span.ids_T.tolist())] for span in spans]


def test_a_runaway_is_retried_then_refused():
    speaker = engine(biased("speech"), temperature=0, max_retries=2)
    span = speaker.generate(["red dog"], [5])[0]
    num_text = len(TOKENIZER.encode("red dog"))
    assert span.reject == "length cap"
    assert span.ids_T.tolist() == [3] * (11 * num_text + 10)  # a silence that never ends, in the place of the cues too
    assert (speaker.stats.retries, dict(speaker.stats.rejects)) == (2, {"length cap": 1})


RED, DOG = TOKENIZER.encode("red"), TOKENIZER.encode("dog")


def test_ends_come_only_where_they_are_legal(raw):
    """EOS only after the last word, WORD_END only after a speech token, never two silences in a row."""
    vocab = CONFIG.vocab
    end, s = vocab.word_end, vocab.speech_start
    engine(biased("eos"), temperature=0, max_retries=0).generate(["red dog"], [0])
    assert raw.pop() == [*RED, s, end, *DOG, s, end, vocab.eos]
    engine(biased("word_end"), temperature=0, max_retries=0).generate(["red"], [0])
    assert raw.pop() == [*RED, s, end, s, end, vocab.eos]


def test_the_next_cue_competes_with_a_silence_by_its_first_id(raw):
    vocab = CONFIG.vocab
    end, s = vocab.word_end, vocab.speech_start
    model = biased("eos")
    zebra = TOKENIZER.encode("zebra")
    with torch.no_grad():
        model.lm_head.weight[RED[0]] = 0.5
        model.lm_head.weight[zebra[0]] = -0.5
        model.lm_head.weight[zebra[1:]] = 2.0  # what follows the first id has no say
    engine(model, temperature=0, max_retries=0).generate(["red zebra"], [0])
    assert raw.pop() == [*RED, s, end, s, end, *zebra, s, end, vocab.eos]


def test_a_slot_forgets_the_request_before(raw):
    """A cap of two ids leaves the slot inside its last word, where neither a cue nor the same place is legal any more."""
    assert len(RED) == 1
    one_slot = engine(biased("eos"), temperature=0, max_retries=0, max_rows=1, cap_per_token=1, cap_extra=0)
    one_slot.generate(["red"] * 3, [0, 1, 2])
    assert raw == [[*RED, CONFIG.vocab.speech_start]] * 3


def test_what_cannot_be_spoken_is_refused_with_its_reason(overfitted):
    speaker = engine(overfitted, max_text_tokens=6, max_retries=0)
    spans = speaker.generate(["", "  \n", "?!…", "red " * 9, "red"], seeds=range(5))
    assert [s.reject for s in spans[:4]] == [
        "empty text",
        "empty text",
        "nothing speakable",
        "text longer than 6 tokens",
    ]
    assert all(len(s.ids_T) == 0 and len(s.unit_end_T) == 0 for s in spans[:4])
    assert len(spans[4].ids_T) > 0
    assert speaker.generate([], []) == []
    with pytest.raises(ValueError, match="2 texts and 1 seeds"):
        speaker.generate(["red", "dog"], [1])


def test_text_in_another_script_is_spoken_or_refused_but_never_fails(overfitted):
    spans = engine(overfitted).generate(["犬は走る", "собака", "🙂"], seeds=[0, 1, 2])
    assert spans[2].reject == "nothing speakable"
    assert all(isinstance(s.reject, str) for s in spans)


def test_the_loader_resumes_bit_for_bit_across_an_epoch_edge():
    data = TextToTokenDataConfig(rows=2, row_tokens=64, spans_per_utterance=2)
    utterances = [*(spoken(s) for s in SENTENCES), spoken(SENTENCES[0] * 5)]  # the last does not fit and is counted

    def build():
        return data.build(utterances, TOKENIZER, CONFIG.vocab)

    through = build()
    states, batches = [], []
    while not batches or batches[-1].meta["epoch"] < 2:
        states.append(json.loads(json.dumps(through.state_dict())))
        batches.append(through.next_batch())
    for at, state in enumerate(states):
        resumed = build()
        resumed.load_state_dict(state)
        for expected in batches[at : at + 3]:
            batch = resumed.next_batch()
            assert torch.equal(batch.ids_BT, expected.ids_BT)
            assert torch.equal(batch.labels_BT, expected.labels_BT)
            assert torch.equal(batch.doc_BT, expected.doc_BT)
            assert batch.meta == expected.meta


def one_row(ids: torch.Tensor) -> Batch:
    return Batch(ids_BT=ids, labels_BT=torch.full_like(ids, IGNORE), doc_BT=torch.zeros_like(ids))


def test_step_is_forward():
    model = CONFIG.build()
    assert isinstance(model, LanguageModel)
    ids = torch.randint(0, CONFIG.vocab.size, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(one_row(ids))
        state = model.init_state(3, 12)
        yes = torch.ones(3, dtype=torch.bool)
        for t in range(12):
            logits, state = model.step(ids[:, t], yes, yes, state)
            torch.testing.assert_close(logits, whole[:, t], atol=1e-4, rtol=0)


def test_packed_examples_do_not_see_each_other():
    model = CONFIG.build()
    data = TextToTokenDataConfig(rows=1, row_tokens=128, spans_per_utterance=1)
    batch = data.build([spoken(s) for s in SENTENCES], TOKENIZER, CONFIG.vocab).next_batch()
    with torch.no_grad():
        packed = model(batch)[0]
        for doc in range(int(batch.doc_BT.max())):
            here = batch.doc_BT[0] == doc
            alone = model(one_row(batch.ids_BT[:, here]))[0]
            torch.testing.assert_close(packed[here], alone, atol=1e-4, rtol=0)


def test_the_folder_is_a_hugging_face_llama(tmp_path, overfitted):
    from transformers import LlamaForCausalLM

    save(tmp_path, overfitted, TOKENIZER, speech_fingerprint="abc123")
    twin = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, CONFIG.vocab.size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(twin(input_ids=ids).logits, overfitted(one_row(ids)), atol=1e-4, rtol=0)
    vocab = CONFIG.vocab
    assert (twin.config.bos_token_id, twin.config.eos_token_id) == (vocab.bos, vocab.eos)


def test_save_and_load_keep_everything(tmp_path, overfitted):
    save(tmp_path, overfitted, TOKENIZER, speech_fingerprint="abc123")
    back = load(tmp_path)
    assert back.speech_fingerprint == "abc123"
    assert back.tokenizer.json == TOKENIZER.json
    assert back.model.config == CONFIG
    save(tmp_path / "text", replace(CONFIG, cue="text").build(), TOKENIZER, speech_fingerprint="abc123")
    assert load(tmp_path / "text").model.config.cue == "text"
    texts = [" ".join(s) for s in SENTENCES]
    before = engine(overfitted).generate(texts, range(8))
    after = EngineConfig().build(back.model, back.tokenizer).generate(texts, range(8))
    assert all(map(same, before, after))


def test_a_damaged_folder_says_what_is_wrong(tmp_path, overfitted):
    save(tmp_path, overfitted, TOKENIZER, speech_fingerprint="abc123")
    ours = json.loads((tmp_path / "text_to_token.json").read_text())
    (tmp_path / "text_to_token.json").write_text(json.dumps(ours | {"num_speech": NUM_SPEECH + 64}))
    with pytest.raises(ValueError, match="does not fit"):
        load(tmp_path)
    (tmp_path / "text_to_token.json").write_text(json.dumps(ours | {"num_speach": 1}))
    with pytest.raises(ValueError, match="did you mean num_speech"):
        load(tmp_path)
    (tmp_path / "text_to_token.json").write_text(json.dumps(ours))
    TextTokenizer.train(["other words"], 280).save(tmp_path / "text_tokenizer.json")
    with pytest.raises(ValueError, match="not the text tokenizer"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape("model.safetensors is missing")):
        load(tmp_path)
    with pytest.raises(ValueError, match="load both from the same model folder"):
        EngineConfig().build(overfitted, TextTokenizer.train(["other words"], 270))


def test_a_window_cannot_be_saved_as_llama():
    with pytest.raises(ValueError, match="no sliding window"):
        TextToTokenConfig(
            num_text=10,
            num_speech=10,
            llama=LlamaConfig(width=64, num_layers=1, num_heads=4, num_kv_heads=2, ffn_width=64, window=8),
        )
