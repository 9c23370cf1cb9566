"""`speechquilt train text_to_token`."""

from dataclasses import dataclass, replace
from pathlib import Path

from speechquilt.commands.grammar import Flat
from speechquilt.recipes import catalog, defaults, text_to_token_models
from speechquilt.stages.corpus import folder_corpus
from speechquilt.stages.encode import text_tokenizer_of
from speechquilt.stages.stage import remembered, report, required
from speechquilt.stages.train_text_to_token import TextToTokenRecipe, train_text_to_token
from speechquilt.tokenizer import loading

RECIPES = tuple(name for name, entry in catalog.ENTRIES.items() if entry.kind == "text_to_token")


@dataclass(frozen=True, kw_only=True)
class TrainTextToToken:
    """Train a text-to-token model: text in, speech tokens with the ends of words out, no audio in between.

    With word times in the metadata it learns spans and word ends; without them, whole utterances only.
    """

    STARTS = ("preset",)

    preset: str = "toy"
    """Start from a size (toy, 100M, 500M, 1.5B) with the toy's schedule, or from a recipe (text_to_token_1_5b)."""
    speech: str = ""
    """Folder of audio with transcripts; one recording in twenty is held out."""
    tokenizer: str = "runs/tokenizer"
    """Folder of the speech tokenizer, trained or released."""
    text_tokenizer: str = ""
    """Text tokenizer that it reads with: a Hugging Face folder with tokenizer.json, or such a file; none: the one in the speech
    tokenizer's folder."""
    run_dir: str = "runs/text_to_token"
    """Folder of the run; transformers and vLLM read it as a Llama."""
    recipe: Flat[TextToTokenRecipe] = defaults.TEXT_TO_TOKEN
    """What is trained, and how."""

    @classmethod
    def starting_from(cls, preset: str = "toy") -> "TrainTextToToken":
        """Raises ValueError naming the known sizes."""
        if preset in RECIPES:
            return cls(preset=preset, recipe=catalog.load(preset).recipe)
        return cls(preset=preset, recipe=replace(defaults.TEXT_TO_TOKEN, llama=text_to_token_models.llama(preset)))

    def run(self) -> None:
        speech = required("speech", self.speech)
        tokenizer = loading.load(required("tokenizer", self.tokenizer))
        text_tokenizer = text_tokenizer_of(tokenizer, self.text_tokenizer)
        corpus = folder_corpus(speech, None)
        folder = Path(self.run_dir)
        with remembered(self, folder):
            found = train_text_to_token(
                self.recipe, tokenizer, corpus.sentences, corpus.held_out, folder, text_tokenizer=text_tokenizer
            )
        report(found, folder, f"speechquilt interleave TEXT SHARDS --text-to-token {folder}")
