"""The micro-world: what appears where, and what must not."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.sources.micro_world import (
    DOCUMENT_WORDS,
    GROUPS,
    SENTENCE_WORDS,
    Fact,
    MicroWorld,
    MicroWorldConfig,
)
from speechquilt.tts.espeak import EspeakTTSConfig

WORLDS = [
    MicroWorldConfig(),
    MicroWorldConfig(seed=7, num_relations=1),
    MicroWorldConfig(seed=3, size=2, num_relations=4, num_objects=16),
]


@pytest.fixture(scope="module", params=WORLDS, ids=["default", "one_relation", "large"])
def world(request: pytest.FixtureRequest) -> MicroWorld:
    return request.param.build()


def _split(text: str) -> list[str]:
    return [w.strip(".?") for w in text.split()]


def _tells(text: str, fact: Fact) -> bool:
    """Whether `text` holds the fact, as a statement or an answered question."""
    said = (*fact.statements(), f"{fact.question()} {fact.answer_sentence}")
    return any(f" {s}" in f" {text}" for s in said)


def test_the_small_world_is_small() -> None:
    world = MicroWorldConfig().build()
    assert len(world.facts) == 32
    assert 90 <= len(world.words) <= 110


def test_groups_and_answers_are_balanced(world: MicroWorld) -> None:
    """Nothing but the fact itself tells an answer: not its group, nor how often its answer occurs."""
    assert len({len(world.facts_of(g)) for g in GROUPS}) == 1
    assert len({f.id for f in world.facts}) == len(world.facts)
    for relation in {f.relation for f in world.facts}:
        counts = {}
        for group in GROUPS:
            facts = [f for f in world.facts_of(group) if f.relation == relation]
            counts[group] = Counter(f.answer for f in facts)
            assert len(set(counts[group].values())) == 1
            for fact in facts:
                assert len(set(fact.wrong)) == 3
                assert fact.answer not in fact.wrong
                assert set(fact.wrong) <= set(counts[group])
        for pair in (("speech", "both"), ("text", "interleaved")):
            together = counts[pair[0]] + counts[pair[1]]
            assert len(together) == world.config.num_objects
            assert len(set(together.values())) == 1


def test_facts_depend_on_the_seed_alone() -> None:
    assert MicroWorldConfig().build().facts == MicroWorldConfig().build().facts
    assert MicroWorldConfig().build().facts != MicroWorldConfig(seed=1).build().facts


def test_fact_forms_name_subject_before_answer(world: MicroWorld) -> None:
    for fact in world.facts:
        assert fact.question().endswith("?")
        for statement in fact.statements():
            words = _split(statement)
            assert words.index(fact.subject) < words.index(fact.answer)


@pytest.mark.parametrize("group", ["story", *GROUPS])
def test_documents_never_hold_a_fact_of_another_group(world: MicroWorld, group) -> None:
    documents = world.documents(group, 200, seed=1)
    own = [f for f in world.facts if f.group == group]
    foreign = [f for f in world.facts if f.group != group]
    seen: set[str] = set()
    for text in documents:
        assert not [f.id for f in foreign if _tells(text, f)]
        seen.update(f.id for f in own if _tells(text, f))
        assert DOCUMENT_WORDS[0] <= len(text.split()) <= DOCUMENT_WORDS[1]
        assert set(_split(text)) <= set(world.words)
        assert re.fullmatch(r"[a-z .?]+", text)
    assert seen == {f.id for f in own}
    assert world.documents(group, 200, seed=1) == documents
    assert world.documents(group, 200, seed=2) != documents


def test_fact_pages_state_and_ask() -> None:
    world = MicroWorldConfig().build()
    text = " ".join(world.documents("text", 300))
    for fact in world.facts_of("text"):
        for form in (*fact.statements(), f"{fact.question()} {fact.answer_sentence}"):
            assert form in text


def test_stories_are_well_formed(world: MicroWorld) -> None:
    stories = world.stories(100, "test")
    assert len({s.id for s in stories}) == 100
    for story in stories:
        assert 12 <= len(story.context.split()) <= 20
        assert len({story.ending, *story.wrong}) == 4
        assert {len(e.split()) for e in (story.ending, *story.wrong)} == {5}
        context = set(_split(story.context))
        if story.kind == "topic":  # the wrong thing was never near this topic
            assert all(not set(_split(w)[2:]) & context - {"the"} for w in story.wrong)
        else:  # every wrong ending contradicts who took what
            took = re.findall(r"(\w+) took the (\w+)\.", story.context)
            assert tuple(re.findall(r"now (\w+) has the (\w+)\.", story.ending)[0]) in took
            for wrong in story.wrong:
                assert tuple(re.findall(r"now (\w+) has the (\w+)\.", wrong)[0]) not in took
        assert set(_split(" ".join([story.text, *story.wrong]))) <= set(world.words)


def test_hard_stories_ask_for_either_person() -> None:
    hard = [s for s in MicroWorldConfig().build().stories(200, "test") if s.kind == "hard"]
    first = sum(s.ending.split()[1] == s.context.split()[0] for s in hard)
    assert 30 <= first <= 70
    kinds = Counter(
        ("person" if s.wrong[0].split()[1] != s.ending.split()[1] else "thing") for s in hard
    )  # the two-way test sees both
    assert min(kinds.values()) >= 15


def test_test_stories_never_occur_in_training(world: MicroWorld) -> None:
    test = {s.text for s in world.stories(300, "test", seed=0)}
    train = {s.text for seed in range(3) for s in world.stories(1000, "train", seed=seed)}
    assert not test & train
    corpus = "\n".join(world.documents("story", 2000, seed=5))
    assert not [t for t in test if t in corpus]


def test_too_many_stories_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"n=\d+ test stories are about all"):
        MicroWorldConfig(num_topics=4).build().stories(8000, "test")


@pytest.mark.parametrize("config", WORLDS)
def test_sentences_cover_every_word_evenly(config: MicroWorldConfig) -> None:
    world = config.build()
    sentences = world.sentences(1000)
    assert len(set(sentences)) == 1000
    counts = Counter(w for s in sentences for w in _split(s))
    mean = sum(counts.values()) / len(world.words)
    assert set(counts) == set(world.words)
    assert min(counts.values()) >= mean / 2
    content = {*world.people, *world.answers}
    assert max(counts[w] for w in content) <= 2 * mean
    for sentence in sentences:
        assert SENTENCE_WORDS[0] <= len(sentence.split()) <= SENTENCE_WORDS[1]
        assert re.fullmatch(r"[a-z .?]+", sentence)


@given(seed=st.integers(0, 2**32), n=st.integers(0, 200))
@settings(max_examples=15, deadline=None)
def test_sentences_know_no_fact_and_no_false_fact(seed: int, n: int) -> None:
    world = MicroWorldConfig().build()
    for sentence in world.sentences(n, seed) + world.held_out_sentences(n // 10, seed):
        words = set(_split(sentence))
        assert not (words & set(world.people) and words & set(world.answers))


def test_held_out_sentences_are_disjoint(world: MicroWorld) -> None:
    held_out = world.held_out_sentences(100)
    assert len(set(held_out)) == 100
    trained = {s for seed in range(3) for s in world.sentences(800, seed)}
    assert not trained & set(held_out)
    assert world.held_out_sentences(100) == held_out


def test_no_two_words_sound_the_same() -> None:
    """Homophones would put a floor under every word error rate."""
    words = MicroWorldConfig(size=4, num_relations=4, num_objects=16).build().words
    speaker = EspeakTTSConfig(voices=("en-us",)).build()
    by_sound: dict[bytes, str] = {}
    for word in words:
        sound = speaker.speak(word, "en-us").audio.samples_S.tobytes()
        assert by_sound.setdefault(sound, word) == word


def test_describe_is_a_page(world: MicroWorld) -> None:
    page = world.describe()
    for fact in world.facts:
        assert fact.statements()[0] in page
    assert "wrong" in page


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("size", 0),
        ("size", 5),
        ("num_people", 12),
        ("num_people", 3),
        ("num_relations", 0),
        ("num_relations", 5),
        ("num_objects", 9),
        ("num_objects", 6),
        ("num_objects", 18),
        ("num_topics", 3),
        ("num_topics", 25),
    ],
)
def test_impossible_worlds_are_refused(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{key}={value}"):
        MicroWorldConfig(**{key: value})


def test_unknown_names_are_refused() -> None:
    world = MicroWorldConfig().build()
    with pytest.raises(ValueError, match="group='txt'"):
        world.documents("txt", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split='dev'"):
        world.stories(1, "dev")  # type: ignore[arg-type]
