"""Speech tokens per second of the text-to-token engine against `transformers`' padded `generate`, same weights, same run.

    python benchmarks/text_to_token.py [--texts 500] [--rows 128] [--padded-rows 32 128] [--threads 1]
    python benchmarks/text_to_token.py --preset 1.5B --device cuda --dtype bfloat16 --texts 8192 --rows 1024
    python benchmarks/text_to_token.py --sizes

Without `--preset`: a toy model is trained for a few seconds on an invented language in which each word sounds like 3 to 6
tokens, so that lengths are those of real use (1 to 12 words). Both sides sample with the same temperature and top-p; each
has its own number of rows, the padded side the best of `--padded-rows`, and its texts sorted by length, as a careful user
would. Both count every speech token written. The ratio compares CPU seconds of this process, so that other work on the
machine does not decide it.

With `--preset`: the engine alone, on random weights with a bias for the structure (`speaking_weights`), so that answers have
realistic lengths: about 4.5 tokens per word, a silence at one word in ten. Printed: speech tokens per second of wall time, and
the share of the memory bandwidth that a step needs at least (the weights once, each row's valid keys and values once).

With `--sizes`: the table of docs/how-to/text-to-token.md.
"""

import argparse
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM

from speechquilt.nn.hugging_face import hugging_face_config
from speechquilt.nn.llama import LlamaConfig
from speechquilt.recipes import text_to_token_models
from speechquilt.text import TextTokenizer
from speechquilt.text_to_token.examples import TextToTokenDataConfig, prompt_ids
from speechquilt.text_to_token.generate import EngineConfig, TextToTokenEngine
from speechquilt.text_to_token.network import TextToTokenConfig, TextToTokenLM
from speechquilt.types import IGNORE, AlignedTokens, SpokenSpan

NUM_SPEECH = 512
PAPER_TEXT, PAPER_SPEECH = 32_000, 16_384  # ids; the paper's codebook, spec synthetic-interleaved 2
WORDS = [
    a + b for a in ("ba", "ke", "li", "mo", "nu", "pa", "re", "so", "ti", "vu") for b in ("lon", "mit", "nar", "rok")
]
TOP_P, TEMPERATURE, CAP_PER_TOKEN, CAP_EXTRA = 0.9, 1.0, 10, 10
TOKENS_PER_WORD, SILENCES_PER_WORD = 4.5, 0.1
PEAK_BYTES_PER_S = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}  # the makers' data sheets


def sizes() -> str:
    """Parameters of every preset with the paper's vocabulary, counted on the meta device, and bytes of state per token."""
    header = "| preset | layers | width | heads (key) | body, M | vocabulary, M | parameters, M | state per token, KB (bf16) |"
    lines = [header, "|" + " --- |" * (header.count("|") - 1)]
    for name, llama in text_to_token_models.PRESETS.items():
        with torch.device("meta"):
            model = TextToTokenLM(TextToTokenConfig(num_text=PAPER_TEXT, num_speech=PAPER_SPEECH, llama=llama))
        total = sum(p.numel() for p in model.parameters())
        vocabulary = 2 * model.lm_head.weight.numel()
        counts = (f"{n / 1e6:,.1f}" for n in (total - vocabulary, vocabulary, total))
        heads = f"{llama.num_heads} ({llama.num_kv_heads})"
        cells = [name, str(llama.num_layers), str(llama.width), heads, *counts, f"{state_bytes(llama, 2) / 1e3:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def state_bytes(llama: LlamaConfig, bytes_per_number: int) -> int:
    """Keys and values of one token."""
    return 2 * llama.num_layers * llama.num_kv_heads * llama.head_width * bytes_per_number


def spoken(words: list[str], sounds: dict[str, np.ndarray]) -> AlignedTokens:
    runs = [sounds[w] for w in words]
    word_T = np.repeat(np.arange(len(words)), [len(r) for r in runs])
    return AlignedTokens(
        id=" ".join(words),
        text=" ".join(words),
        words=tuple(words),
        ids_T=np.concatenate(runs),
        word_T=word_T,
    )


def text_tokenizer() -> TextTokenizer:
    return TextTokenizer.train([" ".join(WORDS)] * 3, 400)


def train(tokenizer: TextTokenizer, steps: int) -> TextToTokenLM:
    rng = np.random.default_rng(0)
    sounds = {w: rng.integers(0, NUM_SPEECH, rng.integers(3, 7)) for w in WORDS}
    utterances = [spoken(rng.choice(WORDS, rng.integers(4, 13)).tolist(), sounds) for _ in range(400)]
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
    return model.eval()


@torch.no_grad()
def speaking_weights(model: TextToTokenLM) -> TextToTokenLM:
    """Turn random weights into ones whose answers have realistic structure: channel 0 carries a bias for the head.

    No block reads or writes the channel differently per token, so after the last norm it is nearly constant.
    """
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    width = model.config.llama.width
    model.model.embed_tokens.weight[:, 0] = math.sqrt(width)
    model.lm_head.weight[:, 0] = 0
    ids = torch.randint(0, model.vocab.size, (1, 64), device=model.lm_head.weight.device)
    state = model.init_state(1, 64)
    x_BTD, _ = model.model.extend(model.model.embed_tokens(ids), torch.tensor([64], device=ids.device), state)
    level = float(x_BTD[..., 0].float().mean())
    speech = slice(model.vocab.speech_start, model.vocab.speech_start + model.vocab.num_speech)
    mass = float((x_BTD[0] @ model.lm_head.weight[speech].T).float().logsumexp(-1).mean())

    def bias(ids: int | slice, share: float) -> None:
        """These ids get this share of what is legal, whatever the hidden state says beside channel 0."""
        model.lm_head.weight[ids] = 0
        model.lm_head.weight[ids, 0] = (mass + math.log(share / (1 - share))) / level

    bias(model.vocab.word_end, TOP_P / TOKENS_PER_WORD)  # the nucleus cuts the tail of the speech ids only
    bias(model.vocab.eos, 1 - SILENCES_PER_WORD)
    bias(slice(model.vocab.num_text), 1 - SILENCES_PER_WORD)
    return model


def padded_generate(model: TextToTokenLM, tokenizer: TextTokenizer, texts: list[str], rows: int) -> tuple[int, float]:
    """-> speech tokens, CPU seconds: batches of `rows` texts of similar length, left-padded, each run to its slowest row."""
    twin = LlamaForCausalLM(HFConfig(**hugging_face_config(model.config.llama, model.vocab)))
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


@dataclass
class Steps:
    """Counts the steps of an engine: each embeds its rows once."""

    count: int = 0

    def watch(self, model: TextToTokenLM) -> None:
        def step(*_: object) -> None:
            self.count += 1

        model.model.embed_tokens.register_forward_hook(step)


def engine_of(model: TextToTokenLM, tokenizer: TextTokenizer, args: argparse.Namespace) -> TextToTokenEngine:
    return EngineConfig(
        max_rows=args.rows,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        cap_per_token=CAP_PER_TOKEN,
        cap_extra=CAP_EXTRA,
        max_per_token=CAP_PER_TOKEN,
        max_retries=0,
        poll_every=args.poll_every,
        cache_tokens=args.cache_tokens,
    ).build(model, tokenizer)


def some_texts(count: int) -> list[str]:
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 13))) for _ in range(count)]


def compare(args: argparse.Namespace) -> None:
    tokenizer = text_tokenizer()
    model = train(tokenizer, args.train_steps)
    texts, engine = some_texts(args.texts), engine_of(model, tokenizer, args)
    engine_of(model, tokenizer, args).generate(texts[:8], range(8))  # warm up
    started = time.process_time()
    spans = engine.generate(texts, range(len(texts)))
    seconds = time.process_time() - started
    num_speech = sum(len(span.ids_T) for span in spans)
    print(
        f"engine, {args.rows} rows: {num_speech} speech tokens in {seconds:.1f} CPU s = {num_speech / seconds:,.0f}/s"
    )
    print(f"  {sum(bool(span.reject) for span in spans)} of {len(texts)} refused: {dict(engine.stats.rejects)}")
    best = 0.0
    for rows in args.padded_rows:
        padded, padded_seconds = padded_generate(model, tokenizer, texts, rows)
        best = max(best, padded / padded_seconds)
        rate = padded / padded_seconds
        print(f"padded generate, {rows} rows: {padded} speech tokens in {padded_seconds:.1f} CPU s = {rate:,.0f}/s")
    print(f"ratio: {(num_speech / seconds) / best:.2f}")


def fed_and_read(tokenizer: TextTokenizer, texts: list[str], spans: list[SpokenSpan]) -> tuple[int, int]:
    """-> ids fed over all requests, and tokens of state read for them: a request of n ids reads 1 + 2 + ... + n."""
    lengths = [
        2 * len(tokenizer.encode(text)) + 2 + len(span.ids_T) + int((span.unit_end_T > 0).sum())
        for text, span in zip(texts, spans)
    ]
    return sum(lengths), sum(n * (n + 1) // 2 for n in lengths)


def measure_preset(args: argparse.Namespace) -> None:
    dtype, tokenizer = getattr(torch, args.dtype), text_tokenizer()
    config = TextToTokenConfig(
        num_text=tokenizer.size if args.preset == "toy" else PAPER_TEXT,
        num_speech=NUM_SPEECH if args.preset == "toy" else PAPER_SPEECH,
        llama=text_to_token_models.llama(args.preset),
    )
    with torch.device(args.device):
        model = TextToTokenLM(config)
        for name, weight in model.named_parameters():  # made on the device: a 1.5B model takes minutes on a CPU
            if name.endswith("proj.weight") or name == "lm_head.weight":
                torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    model = speaking_weights(model.to(dtype).eval())
    words = WideTokenizer(tokenizer, config.num_text)
    texts, steps = some_texts(args.texts), Steps()
    engine_of(model, words, args).generate(texts[:64], range(64))  # warm up
    engine = engine_of(model, words, args)
    steps.watch(model)
    started = time.perf_counter()
    spans = engine.generate(texts, range(len(texts)))
    seconds = time.perf_counter() - started
    num_speech = sum(len(span.ids_T) for span in spans)
    fed, read = fed_and_read(words, texts, spans)
    number = torch.finfo(dtype).bits // 8
    weights = sum(p.numel() for p in model.parameters()) - model.lm_head.weight.numel()  # the embedding is looked up
    least_bytes = number * weights * steps.count + read * state_bytes(config.llama, number)
    print(f"{args.preset}, {args.device}, {args.dtype}, {args.rows} rows, {len(texts)} texts, random weights")
    print(f"  {num_speech} speech tokens in {seconds:.1f} s = {num_speech / seconds:,.0f}/s")
    print(
        f"  {steps.count} steps of {1e3 * seconds / steps.count:.2f} ms, {fed / steps.count:.0f} rows at work on average"
    )
    print(
        f"  {num_speech / sum(len(t.split()) for t in texts):.2f} tokens per word, {dict(engine.stats.rejects)} refused"
    )
    print(
        f"  {least_bytes / seconds / 1e9:,.0f} GB/s needed at least{share_of_peak(args.device, least_bytes / seconds)}"
    )


class WideTokenizer(TextTokenizer):
    """The words of the benchmark for a model that was made for more text ids."""

    def __init__(self, tokenizer: TextTokenizer, num_text: int) -> None:
        super().__init__(tokenizer._tokenizer)
        self._num_text = num_text

    @property
    def size(self) -> int:
        return self._num_text


def share_of_peak(device: str, bytes_per_s: float) -> str:
    if not device.startswith("cuda"):
        return ""
    name = torch.cuda.get_device_name(torch.device(device))
    known = [peak for chip, peak in PEAK_BYTES_PER_S.items() if chip in name]
    return f" = {bytes_per_s / known[0]:.1%} of the bandwidth of {name}" if known else f" on {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--padded-rows", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train-steps", type=int, default=120)
    parser.add_argument("--poll-every", type=int, default=2)
    parser.add_argument("--cache-tokens", type=int, default=EngineConfig().cache_tokens)
    parser.add_argument("--preset", choices=text_to_token_models.PRESETS, help="measure the engine alone at this size")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--sizes", action="store_true", help="print the table of presets")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.sizes:
        print(sizes())
    elif args.preset:
        measure_preset(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
