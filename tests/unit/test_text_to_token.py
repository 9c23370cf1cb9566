"""Examples, packing, sampling and answer reading of the text-to-token stage: everything that needs no trained model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example as with_example
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.nn.llama import LlamaConfig
from speechquilt.text import TextTokenizer, spoken_form
from speechquilt.text_to_token import network
from speechquilt.text_to_token.examples import (
    TextToTokenDataConfig,
    cut_span,
    draw_span,
    lay_out,
    whole_example,
)
from speechquilt.text_to_token.generate import EngineConfig, longest_loop, read_answer, sample
from speechquilt.text_to_token.network import TextToTokenConfig
from speechquilt.train.objectives.next_token import NextTokenObjective
from speechquilt.types import IGNORE, AlignedTokens, UnitEnd
from speechquilt.vocab import Special

NUM_SPEECH = 40
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "slept", "while", "rain", "fell", "all", "night", "long"]
TOKENIZER = TextTokenizer.train([" ".join(WORDS)] * 3, 300)
LLAMA = LlamaConfig(width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=16)
CONFIG = TextToTokenConfig(num_text=TOKENIZER.size, num_speech=NUM_SPEECH, llama=LLAMA)
VOCAB = CONFIG.vocab


def utterance(runs: list[tuple[int, int]], words: tuple[str, ...], seed: int = 0) -> AlignedTokens:
    """`runs`: (word index or -1, tokens) in order."""
    word_T = np.concatenate([np.full(n, w) for w, n in runs])
    return AlignedTokens(
        id="u",
        text=" ".join(words).capitalize() + ".",
        words=words,
        ids_T=np.random.default_rng(seed).integers(0, NUM_SPEECH, len(word_T)),
        word_T=word_T,
    )


def random_utterance(seed: int, num_words: int = 8) -> AlignedTokens:
    rng = np.random.default_rng(seed)
    words = tuple(rng.choice(WORDS, num_words).tolist())
    runs = [(-1, int(rng.integers(1, 3)))]
    for w in range(num_words):
        if rng.random() < 0.85:
            runs.append((w, int(rng.integers(1, 6))))
        if rng.random() < 0.2:
            runs.append((-1, int(rng.integers(1, 3))))
    return utterance(runs, words, seed)


def test_laid_out_example_is_the_documented_sequence():
    example = whole_example(utterance([(-1, 2), (0, 1), (1, 3)], ("The", "cat")), TOKENIZER)
    ids, loss = lay_out(VOCAB, example)
    the, cat = TOKENIZER.encode("the"), TOKENIZER.encode("cat")
    s, end = (example.ids_T + VOCAB.speech_start).tolist(), VOCAB.word_end
    assert ids.tolist() == [
        *[VOCAB.bos, *the, *cat, VOCAB.marker("speech")],
        *[s[0], s[1], end, *the, s[2], end, *cat, s[3], s[4], s[5], end, VOCAB.eos],
    ]
    num_text = len(the) + len(cat)
    of_cues = [[True] + [False] * (len(cue) - 1) for cue in (the, cat)]  # the rest of a cue is certain
    assert loss.tolist() == [False] * (num_text + 2) + [True] * 3 + of_cues[0] + [True] * 2 + of_cues[1] + [True] * 5


def test_a_cue_of_several_ids_is_a_target_in_its_first():
    ids, loss = lay_out(VOCAB, whole_example(utterance([(0, 1), (1, 1)], ("zebra", "cat")), TOKENIZER))
    zebra = TOKENIZER.encode("zebra")
    start = len(zebra) + len(TOKENIZER.encode("cat")) + 2
    assert len(zebra) > 2
    assert ids[start : start + len(zebra)].tolist() == zebra
    assert loss[start : start + len(zebra) + 2].tolist() == [True] + [False] * (len(zebra) - 1) + [True, True]


def test_logits_of_labelled_positions_alone_give_the_same_loss_and_gradients():
    found = []
    for labelled_only in (False, True):
        batch = (
            TextToTokenDataConfig(rows=2, row_tokens=96)
            .build([random_utterance(s) for s in range(4)], TOKENIZER, VOCAB)
            .next_batch()
        )
        model = CONFIG.build()
        loss, weight, scalars = NextTokenObjective(VOCAB, labelled_only=labelled_only)(model, batch)
        loss.backward()
        found.append([loss, weight, *scalars.values(), *(p.grad for p in model.parameters())])
    assert 0 < int(found[0][1]) < batch.labels_BT.numel()
    torch.testing.assert_close(found[0], found[1])


def layout(example) -> list[tuple[str, list[int]]]:
    """(text of the cue, speech ids) of every unit."""
    return [(TOKENIZER.decode(unit.cue_ids), unit.ids_T.tolist()) for unit in example.units]


def test_a_word_of_several_ids_is_cued_whole():
    example = whole_example(utterance([(0, 1), (1, 1)], ("Rain-fall", "zebra")), TOKENIZER)
    assert len(TOKENIZER.encode("zebra")) > 2
    assert [cue for cue, _ in layout(example)] == ["rain fall", "zebra"]
    assert example.text_ids.tolist() == TOKENIZER.encode("rain fall zebra")


def test_a_word_without_a_token_is_a_cue_alone_before_the_next_word():
    spoken = utterance([(-1, 1), (1, 2), (-1, 1), (4, 1), (-1, 1)], ("a", "cat", "sat", "on", "the", "mat"))
    s = spoken.ids_T.tolist()
    assert layout(whole_example(spoken, TOKENIZER)) == [
        *[("", s[:1]), ("a", []), ("cat", s[1:3]), ("", s[3:4]), ("sat", []), ("on", []), ("the", s[4:5])],
        *[("", s[5:]), ("mat", [])],
    ]
    assert layout(cut_span(spoken, TOKENIZER, 1, 4)) == [("cat", s[1:3]), ("sat", []), ("on", [])]


def test_tokens_of_a_word_without_a_spoken_form_are_silence():
    spoken = utterance([(0, 1), (1, 2), (2, 1), (-1, 1), (3, 1)], ("The", "--", "cat", "!"))
    s = spoken.ids_T.tolist()
    example = whole_example(spoken, TOKENIZER)
    assert example.text == "the cat"
    assert layout(example) == [("the", s[:1]), ("", s[1:3]), ("cat", s[3:4]), ("", s[4:])]
    assert cut_span(spoken, TOKENIZER, 1, 2) is None
    spans = [draw_span(spoken, TOKENIZER, np.random.default_rng(i), 4) for i in range(30)]
    assert {span.text for span in spans} == {"the", "cat", "the cat"}
    assert whole_example(utterance([(0, 2)], ("?",)), TOKENIZER) is None


def test_silence_inside_a_word_is_part_of_it():
    spoken = utterance([(0, 1), (-1, 1), (0, 1), (-1, 1), (1, 1)], ("the", "cat"))
    s = spoken.ids_T.tolist()
    assert layout(whole_example(spoken, TOKENIZER)) == [("the", s[:3]), ("", s[3:4]), ("cat", s[4:])]


def test_a_recording_without_word_times_is_one_unit():
    spoken = utterance([(0, 5)], ("The cat, on a mat.",))
    for whole in (whole_example(spoken, TOKENIZER), draw_span(spoken, TOKENIZER, np.random.default_rng(0), 4)):
        assert layout(whole) == [("the cat on a mat", spoken.ids_T.tolist())]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
@with_example("don't 's 'tis x's '' 3rd_one ärzte's 東京 ١٢ e\u0301")
def test_words_encoded_one_by_one_are_the_text_encoded(text):
    plain = spoken_form(text)
    assert [i for word in plain.split() for i in TOKENIZER.encode(word)] == TOKENIZER.encode(plain)


def test_a_cut_span_starts_and_ends_on_its_words():
    spoken = utterance([(-1, 2), (0, 3), (-1, 1), (1, 2), (-1, 4), (3, 2), (-1, 1)], ("One", "two,", "a", "four!"))
    middle = cut_span(spoken, TOKENIZER, 1, 4)
    assert middle.text == "two a four"
    np.testing.assert_array_equal(middle.ids_T, spoken.ids_T[6:14])
    assert [len(unit.ids_T) for unit in middle.units] == [2, 4, 0, 2]
    assert cut_span(spoken, TOKENIZER, 2, 3) is None  # the word owns no token
    np.testing.assert_array_equal(whole_example(spoken, TOKENIZER).ids_T, spoken.ids_T)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_drawn_spans_are_runs_of_words_with_their_tokens(seed, max_words):
    spoken = random_utterance(seed)
    example = draw_span(spoken, TOKENIZER, np.random.default_rng(seed), max_words)
    if example is None:
        assert (spoken.word_T < 0).all()
        return
    owners = np.unique(spoken.word_T[spoken.word_T >= 0])
    found = []
    for i, first in enumerate(owners):
        for last in owners[i : i + max_words]:
            span_T = (spoken.word_T >= first) & (spoken.word_T <= last)
            cut = slice(int(np.flatnonzero(span_T)[0]), int(np.flatnonzero(span_T)[-1]) + 1)
            found.append((" ".join(spoken.words[first : last + 1]), spoken.ids_T[cut].tolist()))
    assert (example.text, example.ids_T.tolist()) in found
    assert example.text_ids.tolist() == TOKENIZER.encode(example.text)
    for end in (example.units[0], example.units[-1]):
        assert len(end.cue_ids)
        assert len(end.ids_T)


def test_every_span_length_is_drawn():
    spoken = utterance([(w, 2) for w in range(6)], tuple(WORDS[:6]))
    lengths = {len(draw_span(spoken, TOKENIZER, np.random.default_rng(i), 4).text.split()) for i in range(100)}
    assert lengths == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"word_T": np.array([0])}, "one of each"),
        ({"word_T": np.array([0, -2, 1])}, "must rise"),
        ({"word_T": np.array([1, 0, 0])}, "must rise"),
        ({"word_T": np.array([0, 1, 2])}, "from 0 to 1"),
    ],
)
def test_inconsistent_alignments_are_refused(change, message):
    good = utterance([(0, 1), (1, 2)], ("a", "mat"))
    with pytest.raises(ValueError, match=message):
        replace(good, **change)


def loader(utterances, rank=0, world_size=1, **change):
    config = TextToTokenDataConfig(**{"rows": 3, "row_tokens": 96, "spans_per_utterance": 2, "seed": 5} | change)
    return config.build(utterances, TOKENIZER, VOCAB, rank, world_size)


def documents(batch):
    """(ids, labels) of every example in a batch."""
    for ids, labels, docs in zip(batch.ids_BT.numpy(), batch.labels_BT.numpy(), batch.doc_BT.numpy()):
        for doc in range(docs.max() + 1):
            if (ids[docs == doc] != VOCAB.pad).any():
                yield ids[docs == doc], labels[docs == doc]


def test_loss_covers_exactly_the_speech_side():
    batch = loader([random_utterance(i) for i in range(20)]).next_batch().validate()
    count = 0
    for ids, labels in documents(batch):
        marker = int(np.flatnonzero(ids == VOCAB.marker("speech"))[0])
        assert ids[0] == VOCAB.bos
        assert ids[-1] == VOCAB.eos
        assert (labels[:marker] == IGNORE).all()
        np.testing.assert_array_equal(labels[marker:-1], ids[marker + 1 :])
        assert labels[-1] == IGNORE
        count += 1
    assert count == batch.meta["num_examples"]
    assert batch.meta["tokens"] == batch.meta["units"] == int((batch.ids_BT != VOCAB.pad).sum())
    assert batch.meta["speech_tokens"] == int(VOCAB.is_speech(batch.ids_BT).sum())


def test_an_epoch_holds_every_utterance_whole_once_and_little_padding():
    utterances = [random_utterance(i) for i in range(60)]
    wholes = sorted(tuple(lay_out(VOCAB, whole_example(u, TOKENIZER))[0]) for u in utterances)
    one_epoch = loader(utterances, rows=1)
    seen, pads, total = [], 0, 0
    while True:
        batch = one_epoch.next_batch()
        if batch.meta["epoch"] == 1:
            break
        seen += [tuple(ids) for ids, _ in documents(batch)]
        pads += int((batch.ids_BT == VOCAB.pad).sum())
        total += batch.ids_BT.numel()
    assert len(seen) == 180
    remaining = list(seen)
    for whole in wholes:
        remaining.remove(whole)  # raises when it is not there
    assert pads / total < 0.1


def test_epochs_differ_and_seeds_differ():
    utterances = [random_utterance(i) for i in range(4)]
    by_epoch = {0: set(), 1: set()}
    small = loader(utterances, rows=1)
    while (batch := small.next_batch()).meta["epoch"] < 2:
        by_epoch[batch.meta["epoch"]] |= {tuple(ids) for ids, _ in documents(batch)}
    assert by_epoch[0] & by_epoch[1]  # the whole utterances
    assert by_epoch[0] - by_epoch[1]  # the spans are drawn again
    one = loader(utterances, rows=8)
    first, second = one.next_batch(), one.next_batch()
    assert not torch.equal(first.ids_BT, second.ids_BT)
    assert not torch.equal(first.ids_BT, loader(utterances, rows=8, seed=6).next_batch().ids_BT)
    assert torch.equal(first.ids_BT, loader(utterances, rows=8).next_batch().ids_BT)


def test_two_ranks_read_what_one_reads():
    utterances = [random_utterance(i) for i in range(10)]
    alone = loader(utterances, rows=4)
    pair = [loader(utterances, rank, 2, rows=4) for rank in range(2)]
    for _ in range(6):
        together = torch.stack([p.next_batch().ids_BT for p in pair], dim=1).flatten(0, 1)
        assert torch.equal(alone.next_batch().ids_BT, together)
    with pytest.raises(ValueError, match="rows=3 cannot be divided over 2 ranks"):
        loader(utterances, 0, 2, rows=3)


def test_what_does_not_fit_is_counted_and_nothing_fitting_is_an_error():
    long = utterance([(w, 20) for w in range(6)], tuple(WORDS[:6]))
    some = loader([long], max_span_words=1)
    batch = some.next_batch()
    assert batch.meta["left_out"] >= 1
    with pytest.raises(ValueError, match="raise row_tokens"):
        loader([long], row_tokens=16).next_batch()
    with pytest.raises(ValueError, match="0 utterances"):
        loader([])


def test_loader_state_of_another_corpus_is_refused():
    utterances = [random_utterance(i) for i in range(4)]
    state = loader(utterances).state_dict()
    with pytest.raises(ValueError, match="another corpus"):
        loader(utterances[:3]).load_state_dict(state)
    with pytest.raises(ValueError, match="another corpus"):
        loader([*utterances[:3], random_utterance(9)]).load_state_dict(state)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.floats(0.3, 3.0), st.integers(3, 200))
def test_sampling_inverts_the_nucleus_distribution(seed, top_p, temperature, num_ids):
    """Against a plain reading of the definition, row by row, narrow and wide distributions mixed in one batch."""
    rng = torch.Generator().manual_seed(seed)
    sharpness = torch.rand(6, 1, generator=rng) * 6
    logits = torch.randn(6, num_ids, generator=rng) * sharpness
    logits[:, 0] = -torch.inf
    draw = torch.rand(6, generator=rng)
    chosen = sample(logits, draw, temperature, top_p)
    for row in range(6):
        probs = (logits[row].double() / temperature).softmax(0)
        order = probs.argsort(descending=True)
        mass = probs[order].cumsum(0)
        keep = int((mass < top_p).sum()) + 1
        edges = mass[:keep] / mass[min(keep, num_ids) - 1]
        expected = order[int((edges <= float(draw[row])).sum())]
        near_edge = (edges - float(draw[row])).abs().min() < 1e-5 or (mass - top_p).abs().min() < 1e-5
        assert chosen[row] == expected or near_edge
        assert chosen[row] != 0


def test_sampling_frequencies_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None].expand(8000, -1)
    draw = torch.rand(8000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(sample(logits, draw, 1.0, 0.9), minlength=4) / 8000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.02, rtol=0)
    assert (sample(logits, draw, 0, 0.9) == 0).all()


def test_the_largest_draw_stays_inside():
    logits = torch.full((1, 100), -torch.inf)
    logits[0, 7] = 3.0
    for top_p in (0.5, 1.0):
        assert sample(logits, torch.tensor([1.0]), 1.0, top_p) == 7


WORD_END, EOS, S = VOCAB.word_end, VOCAB.eos, VOCAB.speech_start


def test_cues_and_word_ends_are_stripped_into_unit_ends():
    cue = TOKENIZER.encode("zebra")
    answer = np.array([S + 3, S + 4, WORD_END, *cue, S + 5, WORD_END, EOS])
    span = read_answer(answer, VOCAB, 1, EngineConfig())
    assert span.reject == ""
    assert span.ids_T.tolist() == [3, 4, 5]
    assert span.unit_end_T.tolist() == [UnitEnd.NONE, UnitEnd.SILENCE, UnitEnd.WORD]


@pytest.mark.parametrize(
    ("ids", "num_text", "reason"),
    [
        ((S, S + 1, WORD_END, 7), 1, "length cap"),
        ((7, S, S + 1, WORD_END, S), 1, "length cap"),
        ((7, S, S + 1, WORD_END, EOS), 3, "too few speech tokens"),
        ((7, S, S + 1, WORD_END, EOS), 2, ""),
        ((7, *range(S, S + 28), WORD_END, EOS), 3, "too many speech tokens"),
        ((7, *range(S, S + 27), WORD_END, EOS), 3, ""),
        ((7, *(S, S + 1) * 13, WORD_END, EOS), 4, "repeats itself"),
        ((7, *(S, S + 1) * 12, WORD_END, EOS), 4, ""),
    ],
)
def test_answers_are_refused_with_their_reason(ids, num_text, reason):
    span = read_answer(np.array(ids), VOCAB, num_text, EngineConfig())
    assert span.reject == reason
    assert span.unit_end_T.dtype == np.uint8
    assert span.unit_end_T[-1] in (UnitEnd.WORD, UnitEnd.SILENCE)
    assert len(span.ids_T) == len(span.unit_end_T)


@pytest.mark.parametrize("num_speech", [2, 3, 12, 27, 28, 90])
def test_answers_are_refused_as_their_twins_at_another_frame_rate(num_speech):
    def reason(times: int) -> str:
        ids = np.array([7, *(S + i % 40 for i in range(num_speech * times)), WORD_END, EOS])
        return read_answer(ids, VOCAB, 3, EngineConfig().for_frame_rate(12.5 * times)).reject

    assert reason(4) == reason(1)
    assert EngineConfig().for_frame_rate(12.5) == EngineConfig()
    assert EngineConfig().for_frame_rate(50).cap_per_token == 40


def test_a_model_folder_keeps_its_frame_rate_and_an_older_one_has_the_papers(tmp_path):
    network.save(tmp_path, replace(CONFIG, frame_rate=50.0).build(), TOKENIZER, "speech")
    loaded = network.load(tmp_path)
    speaker = EngineConfig().build(loaded.model, loaded.tokenizer)
    assert (speaker.frame_rate, speaker.config.max_per_token) == (50.0, 36.0)
    ours = json.loads((tmp_path / network.OURS).read_text())
    del ours["frame_rate"]
    (tmp_path / network.OURS).write_text(json.dumps(ours))
    assert network.describe(tmp_path).config.frame_rate == 12.5


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=24))
def test_longest_loop_is_what_a_slow_search_finds(ids):
    best = 0
    for start in range(len(ids)):
        for end in range(start + 1, len(ids) + 1):
            for period in range(1, min(8, (end - start) // 2) + 1):
                if all(ids[t] == ids[t - period] for t in range(start + period, end)):
                    best = max(best, end - start)
    assert longest_loop(np.array(ids, dtype=np.int32)) == best


def test_bad_settings_name_the_key():
    with pytest.raises(ValueError, match=r"top_p=1\.5"):
        EngineConfig(top_p=1.5)
    with pytest.raises(ValueError, match="temperature=-1"):
        EngineConfig(temperature=-1)
    with pytest.raises(ValueError, match="row_tokens=2"):
        TextToTokenDataConfig(row_tokens=2)
    with pytest.raises(ValueError, match=r'cue=.* must be "word" or "text"'):
        replace(CONFIG, cue="letter")


def test_special_tokens_are_those_of_the_shared_vocabulary():
    assert VOCAB.word_end == VOCAB.num_text + Special.WORD_END
