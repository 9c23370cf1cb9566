"""The numbers of the real story: what two CPU cores do in its minutes, and how they shrink together.

Trap: lengths are steps and not minutes, because a clock would end every run elsewhere and a killed one would not end with
the same bits. The minutes beside them were measured on two cores at `scale` 1.
"""

from dataclasses import replace

from speechquilt.data.feed.pack import PackConfig
from speechquilt.data.feed.spoken_documents import JoinConfig
from speechquilt.data.sources.joined_speech import JoinedSpeechConfig
from speechquilt.model import ladder
from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.patcher import PatcherConfig
from speechquilt.stages.spoken_corpus import SpokenCorpusConfig
from speechquilt.stages.train_lm import LMRecipe
from speechquilt.stages.train_reader import ReaderRecipe
from speechquilt.stages.train_tokenizer import TokenizerRecipe
from speechquilt.tokenizer.whisper_sizes import preset
from speechquilt.train.trainer import TrainConfig

WHISPER, BASE = ".cache/weights/whisper-tiny.en", ".cache/weights/smollm2-135m-instruct"
THREADS = 2
END_OF_TEXT = "<|endoftext|>"  # what stands between documents in SmolLM2's pre-training, whatever its chat tokens are

LEAST_CODES, LEAST_SENTENCES = 256, 64  # at the smallest scale

CORPUS = SpokenCorpusConfig(  # the minutes are an end for slow machines, not a length
    sentences=29_000, passes=1, held_out=400, minutes=60.0, flite_folder=".cache/speech"
)
# Single sentences: the lower half says a sound otherwise at another position, and a small codebook cannot hold them all.
ROWS = JoinedSpeechConfig(most=1)
_READER = TrainConfig(
    steps=600,
    lr=1e-4,
    warmup_steps=50,
    min_lr_ratio=0.05,
    beta2=0.98,
    weight_decay=0.01,
    log_every=20,
    checkpoint_every=100,
    keep_checkpoints=1,
    dtype="bfloat16",  # twice as fast on CPUs that multiply it
    num_threads=THREADS,
)
TOKENIZER = TokenizerRecipe(
    model=replace(
        preset("tiny", 25.0),
        codebook_size=16384,
        metric_width=64,
        vq_warmup_updates=0,
        vq_decay=0.98,
        commitment_weight=10.0,  # less, and the encoder leaves its codes
    ),
    first=replace(_READER, seed=1),
    train=replace(_READER, steps=1300, lr=3e-5),  # at 1e-4 the reader of codes gets worse for hundreds of steps
    lower_lr=0.05,
    vectors_per_code=10,
    kmeans_passes=4,
    batch_seconds=60.0,
    sorted_epochs=0,
    start=WHISPER,
    language=None,
)
# The tokens stay as they are, so a step costs the reader alone.
READER = ReaderRecipe(train=replace(_READER, steps=300, lr=5e-5))
# Of 135 million parameters two cores train about 185 tokens in a second, so rows are short and hold little padding.
# Every step moves a map in each of its 385 features, so a row of it moves hundreds of times as far as a weight of its own.
EMBEDDING_MAP, HEAD_MAP = (f"{table}.parametrizations.weight.0" for table in ("embedding", "head"))
PATCH_SIZE = 4  # 160 ms at 25 Hz, as in the second paper
WEIGHTS = {"text": 0.3, "interleaved": 0.35, "parallel": 0.2, "speech": 0.05, "asr": 0.1}
PLAIN = LMRecipe(
    model=ladder.plain("toy"),  # the base decides the sizes
    patcher=PatcherConfig(kind="none"),
    weights=WEIGHTS,
    pack=PackConfig(rows=4, units_per_row=256, tokens_per_row=256),
    join=JoinConfig(max_tokens=200, session=r"(.+)/\d+\.flac"),  # single sentences are too short to change sides in
    train=TrainConfig(
        steps=150,
        lr=1e-4,
        lr_scale={EMBEDDING_MAP: 0.3, HEAD_MAP: 0.05},
        warmup_steps=15,
        weight_decay=0.0,
        log_every=5,
        checkpoint_every=50,
        keep_checkpoints=1,
        dtype="bfloat16",
        num_threads=THREADS,
    ),
    codebook_rows=True,
    warm_start=BASE,
    bos_token=END_OF_TEXT,
    eos_token=END_OF_TEXT,
)
LATENT = replace(
    PLAIN,
    model=LatentLMConfig(
        vocab_size=0,
        global_=ladder.TOY,  # the base's takes its place
        local_width=256,
        encoder_layers=1,
        decoder_layers=2,
        local_heads=4,
        local_ffn=704,
        text_path="bypass",
    ),
    patcher=PatcherConfig(kind="static", patch_size=PATCH_SIZE),
    pack=PackConfig(rows=4, units_per_row=256, tokens_per_row=512),
    train=replace(  # the local modules are new
        PLAIN.train,
        lr_scale={"": 10.0, "global_": 1.0, "text_embedding": 1.0, "text_head": 1.0, EMBEDDING_MAP: 1.0, HEAD_MAP: 0.1},
    ),
)


def shrunk(number: int, scale: float, least: int = 1) -> int:
    """A number of things at another scale; not below `least`, and not below itself where it is less than that."""
    return max(min(number, least), round(number * scale))


def shrunk_run(train: TrainConfig, scale: float, least: int = 2) -> TrainConfig:
    """A run of so many times the steps; its warm-up is the same share of it."""
    return replace(train, steps=shrunk(train.steps, scale, least), warmup_steps=int(train.warmup_steps * scale))


def shrunk_corpus(corpus: SpokenCorpusConfig, scale: float) -> SpokenCorpusConfig:
    """Fewer sentences in the same voices."""
    sentences, held_out = shrunk(corpus.sentences, scale, LEAST_SENTENCES), shrunk(corpus.held_out, scale, 16)
    return replace(corpus, sentences=sentences, held_out=held_out)
