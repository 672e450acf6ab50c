"""`torch.compile` of prepared models: whole graphs, eager's numbers, few recompilations."""

import copy

import pytest
import torch
from conftest import VOCABULARY, make_llama
from torch import nn
from torch._dynamo.utils import counters

import libqat

ALL_Q4 = {"rules": [{"match": ".*", "weight": "q4_0"}]}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()


def tokens(length, batch=2):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def logits(model, ids):
    return model(ids, use_cache=False).logits


def make_bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    # dropout would draw other numbers in the compiled graph
    return BertModel(BertConfig(vocab_size=VOCABULARY, **sizes), add_pooling_layer=False).eval()


def make_convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 12 * 12, 10),
    )


def images(batch):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))


FAMILIES = {
    # name: (model, policy, input of a size, output of a model)
    "llama": (make_llama, "gguf-q4_0", tokens, logits),
    "learned scales": (make_llama, ALL_Q4 | {"estimator": {"kind": "lsq"}}, tokens, logits),
    "bert": (make_bert, ALL_Q4, tokens, lambda model, ids: model(ids).last_hidden_state),
    "convolutions": (
        make_convolutions,
        {"rules": [{"match": "0|3|4|6", "weight": "int4_channel"}]},
        images,
        lambda model, x: model(x),
    ),
}


def run(call, model, input, compiled=None, autocast=False):
    """Output and gradients of one training step of `model`, float32, through `compiled` when given."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = call(model if compiled is None else compiled, input).float()
    output.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output.detach(), gradients


def assert_close(compiled, eager, rtol, atol):
    torch.testing.assert_close(compiled[0], eager[0], rtol=rtol, atol=atol)
    assert compiled[1].keys() == eager[1].keys()
    for name, gradient in compiled[1].items():
        # as a whole vector: single gradients may cancel to almost nothing
        error = (gradient - eager[1][name]).norm()
        assert error <= rtol * eager[1][name].norm() + 1e-9, name


def prepared(family):
    make, policy, input_of, call = FAMILIES[family]
    model = make()
    libqat.prepare(model, policy)
    return model, input_of, call


@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_and_the_same_numbers(family):
    model, input_of, call = prepared(family)
    # traces forward and backward through the operators' meta kernels; fullgraph raises on a graph break
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    # norms and softmax are decomposed: float32 rounding in another order
    input = input_of(8)
    assert_close(run(call, model, input, compiled), run(call, model, input), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    names = libqat.dequantize(libqat.freeze(compiled)).keys()
    assert names == libqat.dequantize(libqat.freeze(model)).keys()


def test_sequence_lengths_become_dynamic_after_the_second():
    model, input_of, call = prepared("llama")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in (8, 12, 31):
        input = input_of(size)
        assert_close(run(call, model, input, compiled), run(call, model, input), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2


def test_the_layers_of_a_stack_share_one_graph():
    """Regional compilation: an operator that named its tensor would need a graph for each layer."""
    model = make_llama(num_hidden_layers=10)
    libqat.prepare(model, "gguf-q4_0")
    eager = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    # ten layers of float32 rounding
    assert_close(run(logits, model, tokens(8)), run(logits, eager, tokens(8)), rtol=1e-3, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_autocast_inside_the_graph():
    model, input_of, call = prepared("llama")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = run(call, model, input_of(8), compiled, autocast=True)
    # the same bfloat16 products; decomposed norms round once more or once less to 8 bits
    assert_close(got, run(call, model, input_of(8), autocast=True), rtol=2e-2, atol=2e-2)
    assert {gradient.dtype for gradient in got[1].values()} == {torch.float32}


def test_switching_off_recompiles_once_and_back_not_at_all():
    model, input_of, call = prepared("llama")
    compiled, view = torch.compile(model, backend="aot_eager", fullgraph=True), libqat.PreparedModel(model)
    for enabled in (True, False, True, False):
        with view.enabled(enabled):
            torch.testing.assert_close(call(compiled, input_of(8)), call(model, input_of(8)))
    assert counters["stats"]["unique_graphs"] == 2


def test_training_moves_the_compiled_weights():
    model, input_of, call = prepared("llama")
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for net in (compiled, eager):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for _ in range(3):
            call(net, input_of(8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    # float32 rounding of three steps
    torch.testing.assert_close(call(compiled, input_of(8)), call(eager, input_of(8)), rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_inductor(autocast):
    """The default backend, with code that the C++ compiler builds; one block keeps that short."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(64, 64), nn.LayerNorm(64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)
    )
    libqat.prepare(model, ALL_Q4)
    compiled, ids = torch.compile(model, fullgraph=True), torch.arange(24).view(2, 12)
    results = [run(lambda net, x: net(x), model, ids, net, autocast) for net in (compiled, None)]
    # fused code keeps bfloat16 intermediates in float32, and has another approximation of erf
    assert_close(*results, rtol=2e-2 if autocast else 1e-4, atol=1e-2 if autocast else 1e-5)


def test_bad_weights_are_refused_in_a_graph_too():
    model, input_of, call = prepared("llama")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
        # without the tensor's name, which would cost each layer a graph of its own
        with pytest.raises(libqat.NumericError, match="row 3 is not finite"):
            call(compiled, input_of(8))
