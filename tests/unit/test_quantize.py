"""The EMA codebook: its arithmetic by hand, warm-up, dead codes, exact resume, two processes equal to one."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from speechquilt.nn.quantize import EPSILON, POOL_PER_CODE, VectorQuantizer, VectorQuantizerConfig, kmeans, perplexity


def rows(seed: int, num_rows: int = 2, length: int = 9, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_BTD = torch.randn(num_rows, length, width, generator=generator)
    return x_BTD, torch.arange(length) < torch.tensor([length, length - 4, length][:num_rows])[:, None]


def quantizer(**keys) -> VectorQuantizer:
    return VectorQuantizerConfig(**{"codebook_size": 6, "width": 4, **keys}).build().train()


def test_ids_are_the_nearest_codes() -> None:
    vq = quantizer().eval()
    x_BTD, valid_BT = rows(0)
    result = vq(x_BTD, valid_BT)
    distance = (x_BTD[..., None, :] - vq.codebook_KD).square().sum(-1)
    assert torch.equal(result.ids_BT, distance.argmin(-1))
    assert torch.allclose(result.values_BTD, vq.decode(result.ids_BT), atol=1e-6)


def test_one_update_is_the_formula_of_the_spec() -> None:
    vq = quantizer(decay=0.9)
    x_BTD, valid_BT = rows(1)
    old_KD = vq.codebook_KD.clone()
    result = vq(x_BTD, valid_BT)
    count, total = torch.ones(6), old_KD.clone()
    for k in range(6):
        mine = valid_BT & (result.ids_BT == k)
        count[k] = 0.9 + 0.1 * mine.sum()
        total[k] = 0.9 * old_KD[k] + 0.1 * x_BTD[mine].sum(0)
    count = (count + EPSILON) * count.sum() / (count.sum() + 6 * EPSILON)
    assert torch.allclose(vq.ema_count_K, count)
    assert torch.allclose(vq.codebook_KD, total / count[:, None], atol=1e-6)
    # the loss and the values are those of the codes before the update
    assert torch.allclose(result.values_BTD, old_KD[result.ids_BT], atol=1e-6)
    expected = (x_BTD - old_KD[result.ids_BT]).square().mean(-1) * valid_BT
    assert torch.allclose(result.commitment_BT, expected)


def test_gradient_goes_straight_through_and_commitment_pulls_to_the_code() -> None:
    vq = quantizer().eval()
    x_BTD, valid_BT = rows(2)
    x_BTD.requires_grad_()
    vq(x_BTD, valid_BT).values_BTD.backward(torch.full_like(x_BTD, 3.0))
    assert torch.equal(x_BTD.grad, torch.full_like(x_BTD, 3.0))
    x_BTD.grad = None
    result = vq(x_BTD, valid_BT)
    result.commitment_BT.sum().backward()
    pull = (x_BTD - vq.codebook_KD[result.ids_BT]) * 2 / 4 * valid_BT[..., None]
    assert torch.allclose(x_BTD.grad, pull.detach())


def test_padding_never_reaches_the_codebook() -> None:
    first, second = quantizer(), quantizer()
    x_BTD, valid_BT = rows(3)
    first(x_BTD, valid_BT)
    second(x_BTD.masked_fill(~valid_BT[..., None], 100.0), valid_BT)
    assert torch.equal(first.codebook_KD, second.codebook_KD)


def test_eval_changes_nothing() -> None:
    vq = quantizer().eval()
    before = {k: v.clone() for k, v in vq.state_dict().items()}
    vq(*rows(4))
    assert all(torch.equal(before[k], v) for k, v in vq.state_dict().items())


def test_computes_in_float32_under_autocast() -> None:
    vq = quantizer(codebook_size=400).eval()
    x_BTD, valid_BT = rows(5)
    with torch.autocast("cpu", torch.bfloat16):
        result = vq(x_BTD, valid_BT)
    assert torch.equal(result.ids_BT, vq.encode(x_BTD))
    assert result.values_BTD.dtype == torch.float32


def test_dead_codes_are_replaced_by_vectors_of_the_batch() -> None:
    vq = quantizer(codebook_size=40, restart_interval=1, restart_threshold=0.9, decay=0.5)
    x_BTD, valid_BT = rows(6)
    vq(x_BTD, valid_BT)
    valid_ND = x_BTD[valid_BT]
    count_K = vq.ema_count_K
    replaced_K = (vq.codebook_KD[:, None] == valid_ND).all(-1).any(-1)
    assert replaced_K.sum() > len(valid_ND)  # more dead codes than vectors is no error
    assert torch.allclose(vq.ema_sum_KD, vq.codebook_KD * count_K[:, None], atol=1e-6)


def test_restarts_are_counted_when_they_happen() -> None:
    """Against the codes that differ from what the moving averages alone make of them."""
    keys = {"codebook_size": 40, "restart_threshold": 0.9, "decay": 0.5}
    vq, never = quantizer(**keys, restart_interval=2), quantizer(**keys, restart_interval=100)
    for update in range(2):
        vq(*rows(update))
        never(*rows(update))
        replaced_K = (vq.codebook_KD != never.codebook_KD).any(-1)
        assert vq.restarted == replaced_K.sum()
    assert vq.restarted > 0
    vq.eval()(*rows(2))
    assert vq.restarted == 0


def test_a_used_codebook_is_left_alone_at_any_batch_size() -> None:
    """The released code's absolute threshold of 0.366 would reset all of these codes; ours is relative."""
    vq = quantizer(codebook_size=16, restart_interval=1)
    vq.codebook_KD.copy_(torch.randn(16, 4, generator=torch.Generator().manual_seed(0)) * 10)
    vq.ema_count_K.fill_(0.01)
    vq.ema_sum_KD.copy_(vq.codebook_KD * 0.01)
    before_KD = vq.codebook_KD.clone()
    x_BTD = before_KD[None, :1]
    for _ in range(5):
        vq(x_BTD, torch.ones(1, 1, dtype=torch.bool))
    assert torch.allclose(vq.codebook_KD, before_KD, rtol=1e-2)


def test_warm_up_bypasses_then_clusters() -> None:
    vq = quantizer(codebook_size=8, warmup_updates=4)
    centres_KD = torch.eye(4)[:3] * 20
    ids = torch.arange(12) % 3
    with pytest.raises(ValueError, match="warmup_updates=4"):
        vq.encode(centres_KD)
    for update in range(4):
        noise = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(update)) * 0.1
        x_BTD = centres_KD[ids][None] + noise
        result = vq(x_BTD, torch.ones(1, 12, dtype=torch.bool))
        assert result.ids_BT is None
        assert torch.equal(result.values_BTD, x_BTD)
        assert not result.commitment_BT.any()
    assert vq(centres_KD[None], torch.ones(1, 3, dtype=torch.bool)).ids_BT is not None
    assert (vq.decode(vq.encode(centres_KD)) - centres_KD).abs().max() < 0.2


def test_warm_up_lasts_until_there_are_vectors_enough() -> None:
    vq = quantizer(codebook_size=10, warmup_updates=1)
    x_BTD, valid_BT = rows(7)
    needed = -(-POOL_PER_CODE * 10 // int(valid_BT.sum()))
    results = [vq(x_BTD, valid_BT).ids_BT for _ in range(needed + 1)]
    assert all(ids is None for ids in results[:-1])
    assert results[-1] is not None


def test_kmeans_fills_every_cluster() -> None:
    vectors_ND = torch.cat([torch.zeros(50, 2), torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])])
    centres_KD = kmeans(vectors_ND, 4, torch.Generator().manual_seed(0))
    assert torch.cdist(vectors_ND, centres_KD).min(1).values.max() < 1e-4


@pytest.mark.parametrize("stop", [2, 5, 9, 14])
def test_resume_is_exact_through_warm_up_and_restarts(stop: int) -> None:
    keys = {"codebook_size": 12, "warmup_updates": 6, "restart_interval": 3, "restart_threshold": 0.9}
    straight = quantizer(**keys)
    for update in range(20):
        if update == stop:
            saved = {k: v.clone() for k, v in straight.state_dict().items()}
        straight(*rows(update))
    resumed = quantizer(**keys, seed=0)
    resumed.load_state_dict(saved)
    for update in range(stop, 20):
        resumed(*rows(update))
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in straight.state_dict().items())
    assert straight.active


def test_perplexity() -> None:
    assert perplexity(torch.tensor([2.0, 2.0, 2.0, 2.0, 0.0])).item() == pytest.approx(4.0)
    assert perplexity(torch.zeros(3)).item() == 0.0


def test_bad_ids_and_configs_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"0\.\.5"):
        quantizer().decode(torch.tensor([6]))
    with pytest.raises(ValueError, match="decay=1"):
        quantizer(decay=1.0)


TWO = {"codebook_size": 12, "warmup_updates": 5, "restart_interval": 3, "restart_threshold": 0.9, "decay": 0.7}
UPDATES = 20


def _one_of_two(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    vq, restarts = quantizer(**TWO), []
    for update in range(UPDATES):
        x_BTD, valid_BT = rows(update, num_rows=3)
        part = slice(0, 1) if rank == 0 else slice(1, 3)
        vq(x_BTD[part], valid_BT[part])
        restarts.append(vq.restarted)
    torch.save({**vq.state_dict(), "restarts": torch.tensor(restarts)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_one_of_two, (port, str(tmp_path)), nprocs=2)
    one, restarts = quantizer(**TWO), []
    for update in range(UPDATES):
        one(*rows(update, num_rows=3))
        restarts.append(one.restarted)
    assert one.active
    assert sum(restarts) > 0
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in one.state_dict().items():
            assert torch.allclose(state[name].double(), value.double(), atol=1e-5), name
        assert state["restarts"].tolist() == restarts


def test_a_new_codebook_weighs_as_much_as_its_share_of_a_batch_however_large_the_batch() -> None:
    """A code whose vectors all moved by one goes the same share of the way, for batches of 8 and of 800 vectors."""
    codebook_KD = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    for repeats in (2, 200):
        quantizer = VectorQuantizer(VectorQuantizerConfig(codebook_size=4, width=2, decay=0.9, restart_threshold=0.0))
        quantizer.close()
        x_BTD = (codebook_KD + 1.0).repeat(repeats, 1)[None]
        valid_BT = torch.ones(x_BTD.shape[:2], dtype=torch.bool)
        assert quantizer.train()(x_BTD, valid_BT).ids_BT is None
        quantizer.open(codebook_KD)
        quantizer(x_BTD, valid_BT)
        torch.testing.assert_close(quantizer.codebook_KD, codebook_KD + 0.1, atol=1e-3, rtol=0)


def test_a_metric_decides_which_code_is_near() -> None:
    """Far in a direction that does not count is near; the value is the whole code all the same, and it still learns."""
    config = VectorQuantizerConfig(codebook_size=2, width=2, metric_width=1, decay=0.5, restart_threshold=0.0)
    quantizer = VectorQuantizer(config).eval()
    codes_KD = torch.tensor([[0.0, 0.0], [1.0, 9.0]])
    quantizer.open(codes_KD, torch.tensor([[1.0], [0.0]]))
    x_BTD = torch.tensor([[[0.2, 9.0], [0.9, -5.0]]])
    assert quantizer.encode(x_BTD).tolist() == [[0, 1]]
    quantized = quantizer(x_BTD, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(quantized.values_BTD, codes_KD[None])
    quantizer.train()(x_BTD, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(quantizer.codebook_KD, (codes_KD + x_BTD[0]) / 2, atol=1e-3, rtol=0)
    other = VectorQuantizer(config)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.encode(x_BTD), quantizer.encode(x_BTD))
    with pytest.raises(ValueError, match="metric_width=3"):
        VectorQuantizerConfig(codebook_size=2, width=2, metric_width=3)
