"""What is asked about the micro-world: story endings and facts, in speech and in text, chosen and answered freely.

Trap: prompt and endings are spoken and tokenised separately and their ids joined, so that all endings of an item follow
exactly the same prompt (spec latent-speech-text, 9).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from speechquilt.data.sources.micro_world import GROUPS, KINDS, Fact, MicroWorld, Story
from speechquilt.evals.measures import Chart, Promise, above_chance
from speechquilt.evals.results import BY_SUM, FIRST, task_measures
from speechquilt.evals.tasks import AnswerItem, AnswerTask, ChoiceItem, ChoiceTask
from speechquilt.stages.encode import encode_utterances
from speechquilt.text import TextTokenizer
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.tts.espeak import EspeakTTS
from speechquilt.types import Modality, Segment

PAIRS = ("SS", "ST", "TS", "TT")  # modality of prompt and ending
VERSION = 1
MAX_ANSWER = {"text": 8, "speech": 24}  # tokens of a free answer: a word and a full stop, about two seconds
OPTIONS = {"topic": 2, "hard": 2, "topic_4way": 4, "hard_4way": 4}  # endings to choose from
WRITTEN_ONLY = ("text", "interleaved")  # groups of facts that no recording contains
GROUP_NAMES = {"text": "facts only ever written", "interleaved": "facts written, their text interleaved"}
MEASURES = (
    *task_measures(
        "lm.<run>.story.<set>.<pair>", "story endings", BY_SUM,
        chart=Chart(title="Story endings, two to choose from; the words alone tell the right one", where={"set": ("topic",)}),
        promise=Promise(
            name="Story endings <pair> above chance, <run> LST",
            bound=above_chance(),
            where={"run": ("static", "curriculum"), "set": ("topic",), "pair": ("TT", "SS")},
        ),
    ),
    *task_measures(
        "lm.<run>.fact.<group>.<pair>", "fact questions by likelihood", BY_SUM,
        chart=Chart(title="Facts that were only written, four answers to choose from", where={"group": WRITTEN_ONLY}, words=GROUP_NAMES),
    ),
    *task_measures(
        "lm.<run>.qa.<group>.<pair>", "fact questions answered freely", FIRST,
        chart=Chart(title="Facts that were only written, answered freely", where={"group": WRITTEN_ONLY}, words=GROUP_NAMES),
    ),
)  # fmt: skip


@dataclass
class Voicer:
    """Texts as segments, each (text, voice) spoken and tokenised once."""

    speaker: EspeakTTS
    tokenizer: SupervisedTokenizer
    text_tokenizer: TextTokenizer
    spoken: dict[tuple[str, str], Segment] = field(default_factory=dict)

    def prepare(self, wanted: Sequence[tuple[str, str]]) -> None:
        """Tokenise many at once; `segment` then only looks up."""
        new = sorted(set(wanted) - self.spoken.keys())
        tokens = encode_utterances(self.tokenizer, [self.speaker.speak(text, voice) for text, voice in new])
        for key, value in zip(new, tokens):
            self.spoken[key] = Segment(modality="speech", ids_T=value.ids_T, unit_end_T=value.unit_end_T)

    def segment(self, letter: str, text: str, voice: str) -> Segment:
        """`letter` S or T."""
        if letter == "S":
            return self.spoken[text, voice]
        return Segment(modality="text", ids_T=np.asarray(self.text_tokenizer.encode(text), dtype=np.int32))


def story_tasks(world: MicroWorld, voicer: Voicer, num_stories: int) -> dict[str, ChoiceTask]:
    """`story.<set>.<pair>`: test stories, told by one fixed voice."""
    stories = world.stories(2 * num_stories, "test")
    voice = voicer.speaker.voices[0]
    voicer.prepare([(t, voice) for s in stories for t in (s.context, s.ending, *s.wrong)])
    tasks = {}
    for name, options in OPTIONS.items():
        mine = [s for s in stories if s.kind == name.removesuffix("_4way")]
        for pair in PAIRS:
            items = [_story_item(s, options, pair, voice, voicer, i) for i, s in enumerate(mine)]
            key = f"story.{name}.{pair}"
            tasks[key] = ChoiceTask(name=key, version=VERSION, items=items)
    assert {s.kind for s in stories} == set(KINDS)
    return tasks


def fact_tasks(world: MicroWorld, voicer: Voicer) -> dict[str, ChoiceTask]:
    """`fact.<group>.<pair>`: the right answer against three others of its group, asked in every voice when spoken."""
    voices = voicer.speaker.voices
    wanted = [t for f in world.facts for t in (f.question(), f.answer_sentence, *(f"{w}." for w in f.wrong))]
    voicer.prepare([(text, voice) for text in wanted for voice in voices])
    tasks = {}
    for group in GROUPS:
        for pair in PAIRS:
            items = [
                _fact_item(fact, pair, voice, voicer, i)
                for i, fact in enumerate(world.facts_of(group))
                for voice in (voices if "S" in pair else voices[:1])
            ]
            key = f"fact.{group}.{pair}"
            tasks[key] = ChoiceTask(name=key, version=VERSION, items=items)
    return tasks


def question_tasks(world: MicroWorld, voicer: Voicer) -> dict[str, AnswerTask]:
    """`qa.<group>.<pair>`: the same questions answered freely; speech answers are read back by the tokenizer."""
    voices = voicer.speaker.voices
    read_back: Callable[[list[np.ndarray]], list[str]] = voicer.tokenizer.read_back
    tasks = {}
    for group in GROUPS:
        for pair in PAIRS:
            items = [
                AnswerItem(
                    id=f"{fact.id}/{voice}",
                    cluster=fact.id,
                    prompt=(voicer.segment(pair[0], fact.question(), voice),),
                    answers=(fact.answer,),
                    choices=(fact.answer, *fact.wrong),
                )
                for fact in world.facts_of(group)
                for voice in (voices if pair[0] == "S" else voices[:1])
            ]
            key = f"qa.{group}.{pair}"
            modality: Modality = "speech" if pair[1] == "S" else "text"
            tasks[key] = AnswerTask(
                name=key,
                version=VERSION,
                items=items,
                modality=modality,
                max_tokens=MAX_ANSWER[modality],
                decode_text=voicer.text_tokenizer.decode,
                read_back=read_back,
            )
    return tasks


def _story_item(story: Story, options: int, pair: str, voice: str, voicer: Voicer, index: int) -> ChoiceItem:
    endings = [story.ending, *story.wrong[: options - 1]]
    return _choice(story.id, story.id, story.context, endings, pair, voice, voicer, index)


def _fact_item(fact: Fact, pair: str, voice: str, voicer: Voicer, index: int) -> ChoiceItem:
    endings = [fact.answer_sentence, *(f"{w}." for w in fact.wrong)]
    return _choice(f"{fact.id}/{voice}", fact.id, fact.question(), endings, pair, voice, voicer, index)


def _choice(
    id: str, cluster: str, prompt: str, endings: list[str], pair: str, voice: str, voicer: Voicer, index: int
) -> ChoiceItem:
    """The right ending (first in `endings`) moves from place to place with the item's index."""
    right = index % len(endings)
    order = endings[1:]
    order.insert(right, endings[0])
    return ChoiceItem(
        id=id,
        cluster=cluster,
        prompt=(voicer.segment(pair[0], prompt, voice),),
        endings=tuple(voicer.segment(pair[1], ending, voice) for ending in order),
        answer=right,
    )
