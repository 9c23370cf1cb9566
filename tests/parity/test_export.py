"""An exported plain model is the same model in transformers: logits, generation, ids, and the way back."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from speechquilt import cli, config
from speechquilt.evals.scorer import Scorer
from speechquilt.model import saving
from speechquilt.model.export import export
from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.patcher import PatcherConfig
from speechquilt.model.plain import PlainLM, PlainLMConfig
from speechquilt.model.warm_start import latent_from_hugging_face, plain_from_hugging_face
from speechquilt.nn.llama import LlamaConfig
from speechquilt.nn.rope import RopeScaling
from speechquilt.stages.train_lm import LMRun
from speechquilt.text import TextTokenizer
from speechquilt.types import IGNORE, Batch, Document, Modality, Segment
from speechquilt.vocab import Vocab

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "warm-start.md"
SIZES: dict[str, Any] = {"width": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_width": 56}
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32)
STACKS = {
    "LlamaForCausalLM": LlamaConfig(**SIZES, head_width=16, rope_theta=1000.0, rope_scaling=SCALING),
    "Qwen2ForCausalLM": LlamaConfig(**SIZES, qkv_bias=True, norm_eps=1e-6),
    "Qwen3ForCausalLM": LlamaConfig(**SIZES, qk_norm=True, head_width=16),
}
TOKENIZER = TextTokenizer.train(["the red fox sees a small house today."] * 3, 280)
VOCAB = Vocab(num_text=TOKENIZER.size, num_speech=30)


def made(llama: LlamaConfig, seed: int = 0) -> PlainLM:
    """A model whose biases and norms are not the neutral ones of a new model."""
    model = PlainLMConfig(vocab_size=VOCAB.size, llama=llama).build(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.5 * torch.randn(weight.shape, generator=generator))
    return model


def text(words: str) -> Segment:
    return Segment(modality="text", ids_T=np.asarray(TOKENIZER.encode(words), dtype=np.int32))


def speech(*ids: int) -> Segment:
    return Segment(modality="speech", ids_T=np.asarray(ids, dtype=np.int32))


@pytest.mark.parametrize("architecture", STACKS)
@torch.no_grad()
def test_logits_are_equal_and_the_weights_come_back(architecture: str, tmp_path: Path) -> None:
    model = made(STACKS[architecture])
    export(model, VOCAB, TOKENIZER, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == architecture
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id) == (
        VOCAB.bos,
        VOCAB.eos,
        VOCAB.pad,
    )
    ids_BT = torch.randint(0, VOCAB.size, (2, 64), generator=torch.Generator().manual_seed(1))
    zeros_BT = torch.zeros_like(ids_BT)
    ours = model(Batch(ids_BT=ids_BT, labels_BT=zeros_BT + IGNORE, doc_BT=zeros_BT))
    torch.testing.assert_close(theirs(ids_BT).logits, ours, atol=1e-5, rtol=0)
    back = plain_from_hugging_face(tmp_path, VOCAB, seed=5)
    assert back.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name


PROMPTS = [(text("the red fox"),), (text("a house"), speech(3, 4, 5)), (text("the"), speech(1), text("fox sees"))]


@pytest.mark.parametrize("architecture", STACKS)
@pytest.mark.parametrize("modality", ["text", "speech"])
@torch.no_grad()
def test_greedy_generation_is_the_scorers(architecture: str, modality: Modality, tmp_path: Path) -> None:
    model = made(STACKS[architecture])
    export(model, VOCAB, TOKENIZER, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ends = [VOCAB.eos, VOCAB.marker("text"), VOCAB.marker("speech")]
    ids_V = torch.arange(VOCAB.size)
    allowed_V = VOCAB.is_text(ids_V) if modality == "text" else VOCAB.is_speech(ids_V)
    allowed = [*ids_V[allowed_V].tolist(), *ends]
    answers = Scorer(model, VOCAB, None).generate(PROMPTS, modality, max_tokens=20)
    assert len({tuple(a.tolist()) for a in answers}) > 1  # else the prompt would not matter
    for prompt, answer in zip(PROMPTS, answers):
        start_T = VOCAB.lay_out(Document(id="", segments=prompt, source="")).ids_T[:-1]
        if prompt[-1].modality != modality:
            start_T = np.append(start_T, VOCAB.marker(modality))
        out_T = theirs.generate(
            torch.from_numpy(start_T)[None],
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=ends,
            prefix_allowed_tokens_fn=lambda row, ids: allowed,
        )[0, len(start_T) :].tolist()
        expected = VOCAB.to_model(modality, answer).tolist()
        assert [i for i in out_T if i not in ends] == expected


def test_the_exported_tokenizer_writes_documents_with_our_ids(tmp_path: Path) -> None:
    export(made(STACKS["LlamaForCausalLM"]), VOCAB, TOKENIZER, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (VOCAB.bos, VOCAB.eos, VOCAB.pad)
    document = Document(id="", segments=(text("the red fox"), speech(0, 29, 7), text("a house")), source="")
    written = "<|bos|><|text|>the red fox<|speech|><|speech_0|><|speech_29|><|speech_7|><|text|>a house<|eos|>"
    assert theirs(written).input_ids == VOCAB.lay_out(document).ids_T.tolist()
    readme = (tmp_path / "README.md").read_text()
    for said in (
        f"{VOCAB.speech_start} to {VOCAB.speech_start + 29}",
        f"| {VOCAB.bos} | `<|bos|>` |",
        "LlamaForCausalLM",
    ):
        assert said in readme


def test_the_page_that_explains_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export(made(STACKS["LlamaForCausalLM"]), VOCAB, TOKENIZER, tmp_path / "exported")
    code = re.findall(r"^```python\n(.*?)^```", HOW_TO.read_text(), flags=re.M | re.S)[-1]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(HOW_TO), "exec"), {})
    assert "<|bos|><|text|> the red fox<|speech|>" in capsys.readouterr().out


def test_a_bases_own_special_tokens_stay_text_and_are_not_added(tmp_path: Path) -> None:
    full = Tokenizer.from_str(TOKENIZER.json)
    full.add_special_tokens(["<|begin_of_text|>"])
    first = full.token_to_id("<|begin_of_text|>")
    full.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", first)]
    )
    full.save(str(tmp_path / "base.json"))
    tokenizer = TextTokenizer.load(tmp_path / "base.json")
    vocab = Vocab(num_text=tokenizer.size, num_speech=5)
    model = PlainLMConfig(vocab_size=vocab.size, llama=STACKS["LlamaForCausalLM"]).build()
    export(model, vocab, tokenizer, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = theirs("<|bos|><|text|>the red fox<|begin_of_text|><|speech|><|speech_4|>").input_ids
    expected = [vocab.bos, vocab.marker("text"), *tokenizer.encode("the red fox"), first]
    assert ids == [*expected, vocab.marker("speech"), vocab.speech_start + 4]


def test_a_text_tokenizer_with_a_token_of_our_name_is_refused(tmp_path: Path) -> None:
    data = json.loads(TOKENIZER.json)
    del data["model"]["merges"][-1]
    data["model"]["vocab"]["<|bos|>"] = data["model"]["vocab"].pop(
        max(data["model"]["vocab"], key=data["model"]["vocab"].get)
    )
    (tmp_path / "t.json").write_text(json.dumps(data))
    taken = TextTokenizer.load(tmp_path / "t.json")
    assert taken.size == VOCAB.num_text
    with pytest.raises(ValueError, match=rf"token <\|bos\|> would get id {VOCAB.num_text - 1}"):
        export(made(STACKS["LlamaForCausalLM"]), VOCAB, taken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_codebook_keeps_text_and_special_rows(tmp_path: Path) -> None:
    model = made(STACKS["Qwen2ForCausalLM"])
    export(model, VOCAB, TOKENIZER, tmp_path)
    wider = Vocab(num_text=VOCAB.num_text, num_speech=500)
    kept = VOCAB.speech_start
    plain = plain_from_hugging_face(tmp_path, wider)
    assert torch.equal(plain.embedding.weight[:kept], model.embedding.weight[:kept])
    assert torch.equal(plain.head.weight[:kept], model.head.weight[:kept])
    latent = latent_from_hugging_face(tmp_path, VOCAB, LATENT)
    assert torch.equal(latent.text_head.weight, model.head.weight[:kept])


LATENT = LatentLMConfig(
    vocab_size=VOCAB.size,
    global_=LlamaConfig(**SIZES),
    local_width=16,
    encoder_layers=1,
    decoder_layers=1,
    local_heads=2,
    local_ffn=32,
)


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[[Any], Path]:
    def make(model: Any) -> Path:
        folder = tmp_path / "run"
        saving.save(model, folder)
        TOKENIZER.save(folder / "text_tokenizer.json")
        run = LMRun(
            num_text=VOCAB.num_text,
            num_speech=VOCAB.num_speech,
            text_fingerprint=config.fingerprint(TOKENIZER.json),
            speech_fingerprint="",
            patcher=PatcherConfig(kind="static", patch_size=2),
        )
        config.save(run, folder / "run.json")
        return folder

    return make


def test_the_command_exports_a_run(run_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = made(STACKS["Qwen3ForCausalLM"]), tmp_path / "out"
    run = run_folder(model)
    assert cli.main(["export", str(run), str(out), "--max-positions", "100"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.config.max_position_embeddings == 100
    assert torch.equal(theirs.lm_head.weight, model.head.weight)
    assert cli.main(["export", str(run), str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "nothing"), str(tmp_path / "other")]) == 2
    assert "run.json is missing" in capsys.readouterr().err


def test_the_command_refuses_a_latent_run(run_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(LATENT.build())
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "kind=latent cannot be exported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sizes_of_another_run_are_refused(tmp_path: Path) -> None:
    model = made(STACKS["LlamaForCausalLM"])
    with pytest.raises(ValueError, match="must be of one run"):
        export(model, Vocab(num_text=VOCAB.num_text, num_speech=900), TOKENIZER, tmp_path)
    with pytest.raises(ValueError, match="max_positions=0 must be at least 1"):
        export(model, VOCAB, TOKENIZER, tmp_path, max_positions=0)
