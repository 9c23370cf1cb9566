"""Speech tokens per second of the text-to-token engine against `transformers`' padded `generate`, same weights, same run.

    python benchmarks/text_to_token.py [--texts 500] [--rows 128] [--threads 1]

A toy model is trained for a few seconds on an invented language in which each word sounds like 3 to 6 tokens, so that
lengths are those of real use (1 to 12 words). Both sides sample with the same temperature and top-p and the same batch
size; the padded side gets its texts sorted by length, as a careful user would. Both count every speech token written.
The ratio compares CPU seconds of this process, so that other work on the machine does not decide it.
"""

import argparse
import time

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM

from speechquilt.nn.llama import LlamaConfig
from speechquilt.text import TextTokenizer
from speechquilt.text_to_token.examples import AlignedTokens, TextToTokenDataConfig, prompt_ids
from speechquilt.text_to_token.generate import EngineConfig
from speechquilt.text_to_token.model import TextToTokenConfig, TextToTokenLM, hugging_face_config
from speechquilt.types import IGNORE

NUM_SPEECH = 512
WORDS = [
    a + b for a in ("ba", "ke", "li", "mo", "nu", "pa", "re", "so", "ti", "vu") for b in ("lon", "mit", "nar", "rok")
]
TOP_P, TEMPERATURE, CAP_PER_TOKEN, CAP_EXTRA = 0.9, 1.0, 10, 10


def spoken(words: list[str], sounds: dict[str, np.ndarray]) -> AlignedTokens:
    runs = [sounds[w] for w in words]
    word_T = np.repeat(np.arange(len(words)), [len(r) for r in runs])
    return AlignedTokens(
        text=" ".join(words),
        words=tuple(words),
        ids_T=np.concatenate(runs),
        word_of_token_T=word_T,
        unit_end_T=np.append(word_T[1:] != word_T[:-1], True),
    )


def train(steps: int) -> tuple[TextToTokenLM, TextTokenizer]:
    rng = np.random.default_rng(0)
    sounds = {w: rng.integers(0, NUM_SPEECH, rng.integers(3, 7)) for w in WORDS}
    utterances = [spoken(rng.choice(WORDS, rng.integers(4, 13)).tolist(), sounds) for _ in range(400)]
    tokenizer = TextTokenizer.train([u.text for u in utterances], 400)
    llama = LlamaConfig(width=192, num_layers=4, num_heads=6, num_kv_heads=2, ffn_width=512)
    model = TextToTokenConfig(num_text=tokenizer.size, num_speech=NUM_SPEECH, llama=llama).build()
    loader = TextToTokenDataConfig(rows=4, row_tokens=256).build(utterances, tokenizer, model.vocab)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        batch = loader.next_batch()
        loss = cross_entropy(model(batch).flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"trained {steps} steps, loss {loss.item():.3f}")
    return model.eval(), tokenizer


def padded_generate(model: TextToTokenLM, tokenizer: TextTokenizer, texts: list[str], rows: int) -> tuple[int, float]:
    """-> speech tokens, CPU seconds: batches of `rows` texts of similar length, left-padded, each run to its slowest row."""
    twin = LlamaForCausalLM(HFConfig(**hugging_face_config(model)))
    twin.load_state_dict(model.state_dict())
    twin.eval()
    vocab = model.vocab
    prompts = sorted((prompt_ids(vocab, tokenizer.encode(t)) for t in texts), key=len, reverse=True)
    torch.manual_seed(0)
    count, started = 0, time.process_time()
    for at in range(0, len(prompts), rows):
        batch = prompts[at : at + rows]
        longest = len(batch[0])
        ids = torch.full((len(batch), longest), vocab.pad)
        for row, prompt in enumerate(batch):
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        with torch.inference_mode():
            out = twin.generate(
                ids,
                attention_mask=(ids != vocab.pad).long(),
                do_sample=True,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                top_k=0,
                max_new_tokens=(1 + CAP_PER_TOKEN) * (longest - 2) + CAP_EXTRA,  # its cues count too
            )
        count += int(vocab.is_speech(out[:, longest:]).sum())
    return count, time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train-steps", type=int, default=120)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = train(args.train_steps)
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 13))) for _ in range(args.texts)]

    config = EngineConfig(
        max_rows=args.rows,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        cap_per_token=CAP_PER_TOKEN,
        cap_extra=CAP_EXTRA,
        max_retries=0,
    )
    engine = config.build(model, tokenizer)
    config.build(model, tokenizer).generate(texts[:8], range(8))  # warm up
    started = time.process_time()
    spans = engine.generate(texts, range(len(texts)))
    seconds = time.process_time() - started
    num_speech = sum(len(span.ids_T) for span in spans)
    print(f"engine: {num_speech} speech tokens in {seconds:.1f} CPU s = {num_speech / seconds:,.0f}/s")
    print(f"  {sum(bool(span.reject) for span in spans)} of {len(texts)} refused: {dict(engine.stats.rejects)}")
    padded, padded_seconds = padded_generate(model, tokenizer, texts, args.rows)
    print(f"padded generate: {padded} speech tokens in {padded_seconds:.1f} CPU s = {padded / padded_seconds:,.0f}/s")
    print(f"ratio: {(num_speech / seconds) / (padded / padded_seconds):.2f}")


if __name__ == "__main__":
    main()
