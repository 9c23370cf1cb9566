"""`speechquilt export LM OUT`."""

from dataclasses import dataclass
from pathlib import Path

from speechquilt.commands.grammar import Positional


@dataclass(frozen=True, kw_only=True)
class Export:
    """A trained plain language model -> a Hugging Face folder that other engines serve.

    The folder loads with transformers' AutoModelForCausalLM and AutoTokenizer and gives the logits of the run. Ids are
    text | special | speech; README.md in the folder has the numbers. A prompt is written in full, because the tokenizer adds
    nothing: <|bos|><|text|>the red fox<|speech|> goes on in speech tokens <|speech_17|> ... A latent model stays in its own
    folder (no Hugging Face class has patches), and the speech tokenizer does not travel along.
    """

    lm: Positional[Path]
    """Run of a plain language model (`train lm --kind plain`)."""
    out: Positional[Path]
    """Folder to make: weights, configs, tokenizer.json, README.md."""
    max_positions: int = 8192
    """Longest sequence in tokens that engines will accept; the model itself has no limit."""

    def run(self) -> None:
        from speechquilt import config
        from speechquilt.model import export, saving
        from speechquilt.stages.train_lm import LMRun
        from speechquilt.text import TextTokenizer

        vocab = config.load(LMRun, self.lm / "run.json").vocab
        tokenizer = TextTokenizer.load(self.lm / "text_tokenizer.json")
        export.export(saving.load(self.lm), vocab, tokenizer, self.out, self.max_positions)
        print(f"made     {self.out}\nread     {self.out / 'README.md'}, what the ids mean and how a prompt looks")
        print(f'next     AutoModelForCausalLM.from_pretrained("{self.out}") in transformers, or: vllm serve {self.out}')
