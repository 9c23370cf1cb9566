"""Recomputing and compiling change what a step costs, not what it computes."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from speechquilt.train import fsdp
from tests.e2e.test_fsdp import MODELS, RandomRows, next_token


class Dropping(nn.Module):
    """A model of one part, with dropout: recomputing must draw the same."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 6))

    def forward(self, x):
        return self.layers(x)


def gradients(model, how, compiled=False):
    """Of one batch, by name."""
    model = copy.deepcopy(model)
    fsdp.recompute_activations(model, how)
    if compiled:
        fsdp.compile_parts(model)
    torch.manual_seed(0)
    if isinstance(model, Dropping):
        model(torch.randn(4, 6)).square().sum().backward()
    else:
        next_token(model, RandomRows().next_batch())[0].backward()
    return {name: p.grad for name, p in model.named_parameters()}


def gradients_and_flops(model, how):
    with FlopCounterMode(display=False) as counter:
        return gradients(model, how), counter.get_total_flops()


@pytest.mark.parametrize("kind", [*MODELS, "one part"])
def test_recomputing_gives_the_same_gradients_for_more_or_the_same_work(kind):
    model = Dropping() if kind == "one part" else MODELS[kind].build(0)
    expected, work = gradients_and_flops(model, "none")
    for how in ("blocks", "selective"):
        found, more = gradients_and_flops(model, how)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), how
        assert more > work if how == "blocks" else more == work  # selective keeps every matrix product and attention


def saved_bytes(how):
    """What the backward pass keeps of a plain model's activations."""
    model = MODELS["plain"].build(0)
    fsdp.recompute_activations(model, how)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def note(x):
        if x.untyped_storage().data_ptr() not in parameters:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        next_token(model, RandomRows().next_batch())
    return sum(seen.values())


def test_recomputing_keeps_less():
    assert saved_bytes("blocks") < 0.8 * saved_bytes("none")


def test_a_recomputed_model_still_evaluates_and_names_its_parameters():
    model = MODELS["latent"].build(0).eval()
    batch, names = RandomRows().next_batch(), list(model.state_dict())
    expected = model(batch)
    fsdp.recompute_activations(model, "selective")
    with torch.no_grad():
        assert torch.equal(model(batch), expected)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("how", ["none", "blocks", "selective"])
def test_compiling_goes_block_by_block(how, monkeypatch):
    """With a back end that only counts: what is compiled are the blocks, once per kind of block and shape."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: whole(self, backend=count))
    torch._dynamo.reset()
    model = MODELS["plain"].build(0)
    expected = gradients(model, "none")
    found = gradients(model, how, compiled=True)
    assert graphs
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-6), name
    inputs = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "placeholder"}
    assert any("mlp" in name for name in inputs)
    assert not any("head" in name or "embedding" in name for name in inputs), inputs


@pytest.mark.slow
@pytest.mark.parametrize("how", ["none", "selective"])
def test_the_real_compiler_agrees(how):
    torch._dynamo.reset()
    model = MODELS["plain"].build(0)
    expected, found = gradients(model, "none"), gradients(model, how, compiled=True)
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5), name
