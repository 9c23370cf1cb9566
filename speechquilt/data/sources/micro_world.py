"""The micro-world: a generator of small English stories, facts and questions, the embedded default corpus.

Because each fact is only ever shown in one form (as text, as speech, ...), it can be measured whether a form carries
over.
Trap: the tokenizer and the text-to-token model also learn language from what they are trained on. Train them on
`sentences`, in which a person and an answer never stand together, so that they know neither facts nor false facts.

Everything is a pure function of the config and the arguments. Text is lower case with "." and "?" only.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar, get_args

import numpy as np

Group = Literal["text", "speech", "both", "interleaved"]
X = TypeVar("X")
GROUPS: tuple[Group, ...] = get_args(Group)
Kind = Literal["topic", "hard"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Split = Literal["train", "test"]
DOCUMENT_WORDS = (25, 60)  # length of a document, in words
SENTENCE_WORDS = (3, 9)  # length of a tokenizer sentence, in words
HELD_OUT = 10  # one story, and one sentence, in so many belongs to the test side


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@dataclass(frozen=True)
class _Relation:
    """`statements` and `question` name {subject} before {answer}, so that a left-to-right model can recall the answer."""

    name: str
    question: str
    statements: tuple[str, ...]
    answers: tuple[str, ...]
    stand_in: str  # what replaces the answer in tokenizer sentences: "place" or "thing" of a topic


@dataclass(frozen=True)
class _Topic:
    place: str
    things: tuple[str, ...]
    verbs: tuple[str, ...]


# All words are short, spoken differently from each other by espeak-ng (tested), and belong to one list only.
_PEOPLE = _words(
    """tom kate ben ann jack ruth max beth sam jane paul sue nick lucy carl rose dan meg fred gwen
    luke tess pete joan hugh claire seth faye ross dawn john grace glen ivy dean june scott lynn
    brad nora drew emma todd anna keith mary bruce vera neil dora kurt lola chad rita gus tina
    alan zoe oscar nina leo eva hank cora"""
)

_RELATIONS = (
    _Relation(
        name="lives",
        question="where does {subject} live?",
        statements=(
            "{subject} lives in {answer}.",
            "the home of {subject} is {answer}.",
            "{subject} has a home in {answer}.",
        ),
        answers=_words(
            "rome paris lima cairo oslo tokyo boston delhi perth berlin madrid dublin milan vienna prague lyon"
        ),
        stand_in="place",
    ),
    _Relation(
        name="likes",
        question="what does {subject} like?",
        statements=("{subject} likes {answer}.", "the food of {subject} is {answer}.", "{subject} eats {answer}."),
        answers=_words("cake rice soup bread cheese nuts figs plums beans corn fish eggs peas dates honey yams"),
        stand_in="thing",
    ),
    _Relation(
        name="plays",
        question="what does {subject} play?",
        statements=(
            "{subject} plays {answer}.",
            "the game of {subject} is {answer}.",
            "{subject} is good at {answer}.",
        ),
        answers=_words(
            "chess golf drums cards flute harp darts tennis pool rugby guitar hockey squash bingo banjo polo"
        ),
        stand_in="thing",
    ),
    _Relation(
        name="sells",
        question="what does {subject} sell?",
        statements=("{subject} sells {answer}.", "the trade of {subject} is {answer}.", "{subject} makes {answer}."),
        answers=_words("hats lamps rugs toys boots rings pens soap combs dolls kites maps paint wool tiles string"),
        stand_in="thing",
    ),
)

_TOPICS = tuple(
    _Topic(place=place, things=_words(things), verbs=_words(verbs))
    for place, things, verbs in (
        ("farm", "cow hen goat pig", "fed chased milked"),
        ("kitchen", "pot pan bowl knife", "washed dried filled"),
        ("sea", "boat ship raft canoe", "sailed rowed moored"),
        ("school", "book page poem letter", "wrote copied spelled"),
        ("garden", "tree bush flower weed", "planted watered trimmed"),
        ("shop", "coat shirt dress belt", "bought folded ironed"),
        ("forest", "wolf bear deer fox", "hunted tracked spotted"),
        ("street", "car bus van bike", "drove parked stopped"),
        ("hall", "song tune waltz hymn", "sang hummed whistled"),
        ("shed", "nail plank board beam", "hammered sawed painted"),
        ("hill", "rock cliff peak slope", "climbed crossed mapped"),
        ("lab", "tube lens magnet battery", "tested measured weighed"),
        ("bakery", "dough pie bun tart", "baked sliced glazed"),
        ("office", "form memo report chart", "printed signed mailed"),
        ("court", "ball rope bat puck", "threw caught kicked"),
        ("castle", "king queen guard prince", "crowned served praised"),
        ("bank", "coin cash gold gem", "counted saved hid"),
        ("camp", "tent torch stove blanket", "packed carried dropped"),
        ("clinic", "arm leg hand foot", "bandaged rubbed healed"),
        ("studio", "vase statue portrait mask", "carved shaped sketched"),
        ("lake", "eel trout carp pike", "hooked fried netted"),
        ("station", "train wagon engine crane", "started loaded fixed"),
        ("museum", "bone fossil sword shield", "dusted labeled studied"),
        ("tower", "bell flag clock horn", "rang raised lowered"),
    )
)

# Sentences without facts, from which stories and tokenizer sentences are made.
_WENT, _BOTH_WENT = "{person} went to the {place}.", "{person} and {other} went to the {place}."
_DID, _TOOK = "{person} {verb} the {thing}.", "{person} took the {thing}."
_THEN, _NOW = "then {person} {verb} the {thing}.", "now {person} has the {thing}."


@dataclass(frozen=True, kw_only=True)
class Fact:
    """`group`: how training documents show it. "text" and "interleaved" facts exist as text only, and the documents of
    the latter are also handed to synthetic interleaving; "speech" facts are only spoken; "both" are written and spoken.

    `wrong`: three answers of other facts of the same group and relation, each as frequent as the right one there.
    """

    id: str
    subject: str
    relation: str
    answer: str
    group: Group
    wrong: tuple[str, ...]

    def statements(self) -> tuple[str, ...]:
        """Paraphrases, the subject always before the answer."""
        return tuple(s.format(subject=self.subject, answer=self.answer) for s in self._relation.statements)

    def question(self) -> str:
        return self._relation.question.format(subject=self.subject)

    @property
    def answer_sentence(self) -> str:
        return self.answer + "."

    @property
    def _relation(self) -> _Relation:
        return next(r for r in _RELATIONS if r.name == self.relation)


@dataclass(frozen=True, kw_only=True)
class Story:
    """`wrong` holds three endings as long as the right one; a two-way test uses `wrong[0]` alone.

    "topic": wrong endings come from three other topics, so word co-occurrence is enough.
    "hard": wrong endings stay in the topic and contradict the context: the other person's thing, a thing or a person
    that did not occur, in random order.
    """

    id: str
    context: str
    ending: str
    wrong: tuple[str, ...]
    kind: Kind

    @property
    def text(self) -> str:
        return f"{self.context} {self.ending}"


@dataclass(frozen=True, kw_only=True)
class MicroWorldConfig:
    """How large the micro-world is; `size` is the dial, the other numbers are those of size 1.

    There is one fact per person and relation. The four groups get equally many, and inside a group every answer that
    occurs is equally frequent; that needs people in multiples of twice the answers per relation (`num_objects`).
    """

    seed: int = 0
    """Decides who has what, and every text; another seed is another world."""
    size: int = 1
    """Times as many people (so facts) and topics: 1 has 102 words and 32 facts, 4 has 294 words and 128 facts."""
    num_people: int = 16
    """People at size 1; num_people times size must be a multiple of twice num_objects."""
    num_relations: int = 2
    """Kinds of facts that are told of every person."""
    num_objects: int = 8
    """Answers that each kind of fact chooses from; even, at least 8."""
    num_topics: int = 6
    """Topics of stories at size 1; at least 4."""

    def __post_init__(self) -> None:
        def limit(key: str, low: int, high: int, per_size: bool = False) -> None:
            value = getattr(self, key)
            total = value * self.size if per_size else value
            if value < low or total > high:
                times = f" times size={self.size}" if per_size else ""
                raise ValueError(f"{key}={value}{times} must be {low}..{high}; the micro-world's word lists end there")

        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1; it multiplies num_people and num_topics")
        limit("num_people", 4, len(_PEOPLE), per_size=True)
        limit("num_topics", 4, len(_TOPICS), per_size=True)  # a topic story has three wrong topics
        limit("num_relations", 1, len(_RELATIONS))
        limit("num_objects", 8, min(len(r.answers) for r in _RELATIONS))  # half of them are a four-way choice
        if self.num_objects % 2:
            raise ValueError(f"num_objects={self.num_objects} must be even; each half belongs to two groups of facts")
        if (self.num_people * self.size) % (2 * self.num_objects):
            raise ValueError(
                f"num_people={self.num_people} times size={self.size} must be a multiple of 2 * num_objects="
                f"{2 * self.num_objects}, for answers to be equally frequent in every group"
            )

    def build(self) -> "MicroWorld":
        return MicroWorld(self)


class MicroWorld:
    """The world of one config. `facts`, then texts: `stories`, `documents`, `sentences`."""

    def __init__(self, config: MicroWorldConfig) -> None:
        self.config = config
        self.people = _PEOPLE[: config.num_people * config.size]
        self._topics = _TOPICS[: config.num_topics * config.size]
        self._relations = _RELATIONS[: config.num_relations]
        self.facts = self._draw_facts()

    def facts_of(self, group: Group) -> tuple[Fact, ...]:
        """Raises ValueError on an unknown group."""
        if group not in GROUPS:
            raise ValueError(f"group={group!r} must be one of {', '.join(GROUPS)}")
        return tuple(f for f in self.facts if f.group == group)

    @property
    def answers(self) -> tuple[str, ...]:
        """Every word that answers a question."""
        return tuple(a for r in self._relations for a in r.answers[: self.config.num_objects])

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Every word any text of this world can hold, sorted."""
        templates = [_WENT, _BOTH_WENT, _DID, _TOOK, _THEN, _NOW]
        for relation in self._relations:
            templates += [relation.question, *relation.statements]
        grammar = {w.strip(".?") for t in templates for w in t.split() if not w.startswith("{")}
        of_topics = {w for t in self._topics for w in (t.place, *t.things, *t.verbs)}
        return tuple(sorted({*self.people, *self.answers, *of_topics, *grammar}))

    def stories(self, n: int, split: Split, seed: int = 0) -> list[Story]:
        """`n` different stories, "topic" and "hard" in turn. One in ten possible stories is a test story, by a hash of
        context and ending, so none is ever in both splits. Raises ValueError when the world has hardly more.
        """
        if split not in ("train", "test"):
            raise ValueError(f"split={split!r} must be 'train' or 'test'")
        rng = self._rng("stories", split, seed)
        found: dict[str, Story] = {}
        repeats = 0
        while len(found) < n:
            story = self._story(rng, KINDS[len(found) % 2], split)
            repeats = repeats + 1 if story.id in found else 0
            if repeats > 20:
                raise ValueError(f"n={n} {split} stories are about all this world has; raise size or ask for fewer")
            found[story.id] = story
        return list(found.values())

    def documents(self, group: Group | Literal["story"], n: int, seed: int = 0) -> list[str]:
        """`n` training texts of 25 to 60 words.

        "story": training stories one after the other. A fact group: a page of statements and answered questions about
        facts of that group alone, in random order; as a rule no fact comes twice on a page, so that it
        must be remembered instead of copied.
        """
        rng = self._rng("documents", group, seed)
        if group == "story":
            return [" ".join(self._story(rng, _pick(rng, KINDS), "train").text for _ in range(2)) for _ in range(n)]
        facts = self.facts_of(group)
        return [self._fact_page(facts, rng) for _ in range(n)]

    def sentences(self, n: int, seed: int = 0) -> list[str]:
        """`n` different sentences of 3 to 9 words for training the tokenizer and the text-to-token model.

        Half are grammatical with random pairings, half plain lists that keep all words evenly frequent. A person and an
        answer never share a sentence, so no fact is in them, and no contradiction of one.
        """
        return self._sentences(n, self._rng("sentences", seed), held_out=False)

    def held_out_sentences(self, n: int, seed: int = 0) -> list[str]:
        """Like `sentences`, but disjoint from every call of it."""
        return self._sentences(n, self._rng("held_out_sentences", seed), held_out=True)

    def describe(self) -> str:
        """One readable page."""
        c = self.config
        lines = [
            f"micro-world, seed {c.seed}, size {c.size}: {len(self.words)} words, {len(self.people)} people, "
            f"{len(self.facts)} facts, {len(self._topics)} topics",
            "",
            "words    " + " ".join(self.words),
            "topics   " + " ".join(t.place for t in self._topics),
            "",
        ]
        for group in GROUPS:
            facts = self.facts_of(group)
            lines.append(f"facts shown as {group} ({len(facts)})")
            lines += [f"  {f.statements()[0]:<28} {f.question()} {f.answer_sentence}" for f in facts]
        lines.append("")
        for story in self.stories(4, "test"):
            lines += [f"story ({story.kind})  {story.context}", f"  right  {story.ending}"]
            lines += [f"  wrong  {wrong}" for wrong in story.wrong]
        lines += ["", f"page of text facts  {self.documents('text', 1)[0]}"]
        lines += ["tokenizer sentences  " + " ".join(self.sentences(6))]
        return "\n".join(lines) + "\n"

    def _rng(self, *key: object) -> np.random.Generator:
        return np.random.default_rng(_number(repr((self.config, *key))))

    def _draw_facts(self) -> tuple[Fact, ...]:
        """Per relation: people to groups at random; answers in two halves, one per group.

        The spoken groups ("speech", "both") together use every answer equally often, and so do the two written ones
        ("text", "interleaved"); all answers of one group are then equally frequent in every form of training data.
        """
        rng = self._rng("facts")
        facts = []
        for relation in self._relations:
            people = rng.permutation(self.people)
            answers = rng.permutation(relation.answers[: self.config.num_objects])
            halves = np.split(answers, 2)
            flip = int(rng.integers(2))
            half_of = {"speech": halves[0], "both": halves[1], "text": halves[flip], "interleaved": halves[1 - flip]}
            for group, subjects in zip(GROUPS, np.split(people, len(GROUPS))):
                half = half_of[group]
                given = rng.permutation(np.resize(half, len(subjects)))
                for subject, answer in zip(subjects.tolist(), given.tolist()):
                    wrong = rng.permutation([a for a in half.tolist() if a != answer])[:3]
                    facts.append(
                        Fact(
                            id=f"{subject}-{relation.name}",
                            subject=subject,
                            relation=relation.name,
                            answer=answer,
                            group=group,
                            wrong=tuple(wrong.tolist()),
                        )
                    )
        return tuple(sorted(facts, key=lambda f: f.id))

    def _story(self, rng: np.random.Generator, kind: Kind, split: Split) -> Story:
        while True:
            story = self._topic_story(rng) if kind == "topic" else self._hard_story(rng)
            if _held_out(story.text) == (split == "test"):
                return story

    def _topic_story(self, rng: np.random.Generator) -> Story:
        """A person goes to a place and does three things of its topic."""
        person = _pick(rng, self.people)
        topic, *others = (self._topics[i] for i in rng.permutation(len(self._topics))[:4])
        pairs = [(v, t) for v in topic.verbs for t in topic.things]
        *before, (verb, thing) = (pairs[i] for i in rng.permutation(len(pairs))[:3])
        context = [_WENT.format(person=person, place=topic.place)]
        context += [_DID.format(person=person, verb=v, thing=t) for v, t in before]
        wrong = [_THEN.format(person=person, verb=_pick(rng, o.verbs), thing=_pick(rng, o.things)) for o in others]
        return _story("topic", context, _THEN.format(person=person, verb=verb, thing=thing), wrong)

    def _hard_story(self, rng: np.random.Generator) -> Story:
        """Two people each take a thing; who has what? The person asked about may be the first or the second."""
        a, b, stranger = rng.permutation(self.people)[:3].tolist()
        topic = self._topics[rng.integers(len(self._topics))]
        things = rng.permutation(topic.things)[:3].tolist()
        context = [_BOTH_WENT.format(person=a, other=b, place=topic.place)]
        context += [_TOOK.format(person=p, thing=t) for p, t in zip((a, b), things)]
        asked = int(rng.integers(2))
        person, thing, others_thing = (a, b)[asked], things[asked], things[1 - asked]
        wrong = [
            _NOW.format(person=p, thing=t) for p, t in ((person, others_thing), (person, things[2]), (stranger, thing))
        ]
        return _story("hard", context, _NOW.format(person=person, thing=thing), rng.permutation(wrong).tolist())

    def _fact_page(self, facts: Sequence[Fact], rng: np.random.Generator) -> str:
        low, high = DOCUMENT_WORDS
        target = rng.integers(low, high - SENTENCE_WORDS[1])  # the last item still fits
        words: list[str] = []
        while len(words) < low:
            for i in rng.permutation(len(facts)):
                fact = facts[i]
                asked = rng.integers(2)
                item = f"{fact.question()} {fact.answer_sentence}" if asked else _pick(rng, fact.statements())
                words += item.split()
                if len(words) >= target:
                    break
        return " ".join(words)

    def _sentences(self, n: int, rng: np.random.Generator, held_out: bool) -> list[str]:
        used: Counter[str] = Counter()
        found: dict[str, None] = {}
        while len(found) < n:
            sentence = self._list(rng, used) if len(found) % 2 else self._grammatical(rng, used)
            if sentence not in found and _held_out(sentence) == held_out:
                found[sentence] = None
                used.update(w.strip(".?") for w in sentence.split())
        return list(found)

    def _grammatical(self, rng: np.random.Generator, used: Counter[str]) -> str:
        """A sentence of the world's grammar: either about a person, without answers, or about a thing, with one."""
        relation = _pick(rng, self._relations)
        asking = f"{relation.question} {{answer}}."
        template = _pick(rng, (_WENT, _BOTH_WENT, _DID, _TOOK, _THEN, _NOW, asking, *relation.statements))
        place = _least_used(rng, used, [t.place for t in self._topics])
        thing = _least_used(rng, used, [x for t in self._topics for x in t.things])
        other_thing = _least_used(rng, used, [x for t in self._topics for x in t.things])
        person = _least_used(rng, used, self.people)
        other = _least_used(rng, used, [p for p in self.people if p != person])
        subject, answer = person, f"the {place if relation.stand_in == 'place' else thing}"
        if rng.integers(2):
            of_relation = relation.answers[: self.config.num_objects]
            subject, answer = f"the {other_thing}", _least_used(rng, used, of_relation)
        return template.format(
            person=person,
            other=other,
            place=place,
            thing=thing,
            verb=_least_used(rng, used, [v for t in self._topics for v in t.verbs]),
            subject=subject,
            answer=answer,
        )

    def _list(self, rng: np.random.Generator, used: Counter[str]) -> str:
        """Words that were used least so far, without people or without answers."""
        left_out = set(self.answers if rng.integers(2) else self.people)
        words = [w for w in self.words if w not in left_out]
        low, high = SENTENCE_WORDS
        length = int(rng.integers(low, high + 1))
        return " ".join(_least_used(rng, used, words, among=12) for _ in range(length)) + "."


def _story(kind: Kind, context: list[str], ending: str, wrong: list[str]) -> Story:
    text = " ".join(context)
    digest = _number(f"{text} {ending}") % 16**10
    return Story(id=f"{kind}-{digest:010x}", context=text, ending=ending, wrong=tuple(wrong), kind=kind)


def _number(text: str) -> int:
    """The same large number for the same text on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def _held_out(text: str) -> bool:
    return _number(text) % HELD_OUT == 0


def _pick(rng: np.random.Generator, options: Sequence[X]) -> X:
    return options[int(rng.integers(len(options)))]


def _least_used(rng: np.random.Generator, used: Counter[str], options: Sequence[str], among: int = 4) -> str:
    """Of a few drawn at random, the one used least: even in the long run, and still at random."""
    return min((_pick(rng, options) for _ in range(among)), key=lambda w: used[w])
