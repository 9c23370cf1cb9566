"""What a warm start keeps of its base: loss of the same held-out text under the base and under what was trained from it.

The base is transformers' model of the folder; both read the same ids, each document a row of its own behind BOS.
Trap: the first token of a document is not counted. What stands in front of it differs (the base's BOS, our marker), and what
follows it does not.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from speechquilt.evals.intervals import per_token
from speechquilt.evals.measures import Measure, Promise, Value, at_most_amount
from speechquilt.evals.scorer import Request, Scorer
from speechquilt.nn.hub import local_folder
from speechquilt.types import Segment

RUNS = ("plain", "latent")
LIMIT = 0.1
MEASURES = (
    Measure(key="lm.<run>.text.loss", kind="amount", unit="nats", meaning="held-out text: loss per token after training"),
    Measure(key="lm.<run>.text.base", kind="amount", unit="nats", meaning="held-out text: loss per token of the base it started from"),
    Measure(
        key="lm.<run>.text.change", kind="change", unit="nats", meaning="held-out text: the first minus the second",
        promise=Promise(name="Text loss above the base's, <run>", bound=at_most_amount(LIMIT, "nats"), where={"run": RUNS}),
    ),
    Measure(key="lm.<run>.text.low", kind="change", unit="nats", meaning="lower end of the change's 95 % interval (bootstrap over documents)"),
    Measure(key="lm.<run>.text.high", kind="change", unit="nats", meaning="upper end of the same interval"),
    Measure(key="lm.<run>.text.n", kind="count", meaning="held-out texts"),
    Measure(key="lm.<run>.text.tokens", kind="count", meaning="their tokens, the first of each left out"),
)  # fmt: skip


@torch.no_grad()
def base_nats(folder: Path, bos: int, documents: Sequence[np.ndarray]) -> np.ndarray:
    """Nats of each document `ids_T` (at least two ids) under the base, the first token left out: `[documents]`.

    `bos`: id of the base's that stands in front of a document.
    """
    model = AutoModelForCausalLM.from_pretrained(local_folder(folder), dtype=torch.float32).eval()
    nats = []
    for ids_T in documents:
        row_T = torch.tensor([bos, *ids_T.tolist()])
        log_probs_TV = model(row_T[None]).logits[0, 1:-1].log_softmax(-1)
        nats.append(-float(log_probs_TV.gather(1, row_T[2:, None]).double().sum()))
    return np.array(nats)


def our_nats(scorer: Scorer, documents: Sequence[np.ndarray]) -> np.ndarray:
    """The same under a trained model, in its own layout."""
    requests = [
        Request((Segment(modality="text", ids_T=ids_T[:1]),), Segment(modality="text", ids_T=ids_T[1:]))
        for ids_T in documents
    ]
    return np.array([-score.sum for score in scorer.log_likelihoods(requests)])


def text_losses(run: str, scorer: Scorer, documents: Sequence[np.ndarray], base_N: np.ndarray) -> dict[str, Value]:
    """`lm.<run>.text.*`; `base_N`: `base_nats` of the same documents. Raises ValueError for other ones."""
    if len(base_N) != len(documents):
        raise ValueError(
            f"{len(base_N)} losses of the base for {len(documents)} documents; both must be of the same ones"
        )
    tokens_N = np.array([len(ids_T) - 1 for ids_T in documents])
    ours_N = our_nats(scorer, documents)
    change = per_token(ours_N - base_N, tokens_N)
    return {
        f"lm.{run}.text.loss": float(ours_N.sum() / tokens_N.sum()),
        f"lm.{run}.text.base": float(base_N.sum() / tokens_N.sum()),
        f"lm.{run}.text.change": change.value,
        f"lm.{run}.text.low": change.low,
        f"lm.{run}.text.high": change.high,
        f"lm.{run}.text.n": len(documents),
        f"lm.{run}.text.tokens": int(tokens_N.sum()),
    }
