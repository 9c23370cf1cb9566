"""`speechquilt export`: the run folder of a plain language model -> a Hugging Face folder.

Place in the pipeline: layer 4, after pretraining.
Trap: the speech tokenizer does not travel along; without it nobody can make or hear the speech tokens.
"""

from pathlib import Path

from speechquilt import config
from speechquilt.model import export as exporter
from speechquilt.model import saving
from speechquilt.stages.train_lm import LMRun
from speechquilt.text import TextTokenizer


def export(run: Path, out: Path, max_positions: int) -> None:
    """Raises FileNotFoundError or ValueError when `run` is no finished run of a plain model, or `out` is not empty."""
    vocab = config.load(LMRun, run / "run.json").vocab
    tokenizer = TextTokenizer.load(run / "text_tokenizer.json")
    exporter.export(saving.load(run), vocab, tokenizer, out, max_positions)
    print(f"made     {out}\nread     {out / 'README.md'}, what the ids mean and how a prompt looks")
    print(f'next     AutoModelForCausalLM.from_pretrained("{out}") in transformers, or: vllm serve {out}')
