"""The operators inside PyTorch: opcheck, meta, autocast, checkpointing, compilers, threads, devices."""

import pytest
import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import libqat
from libqat import ops

GRIDS = ["bf16", "q4_0", "q4_1", "q8_0", "int4_channel"]
ESTIMATORS = ["ste", "clipped_ste"]
LIBQAT = torch.ops.libqat


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaf(*shape, **options):
    return normal(*shape, **options).requires_grad_()


def operator_calls():
    """(name, operator, arguments). Backward operators refuse to be differentiated: no gradient there."""
    half = torch.bfloat16
    w, b = leaf(48, 64, seed=2), leaf(48, seed=3)
    latent, indices = w.detach(), torch.tensor([[1, 5, 1], [0, 47, 2]])
    strided, low = normal(64, 64).t().requires_grad_(), normal(3, 64, dtype=half)
    clipped = ("q4_0", "clipped_ste")
    searched = ("q4_0", "clipped_ste", "search")
    scales = 0.9 * ops.choose_scales(latent, "q4_1")
    learned = ("q4_1", "clipped_ste", "learned", "a.weight", scales.clone().requires_grad_())
    held = (scales, "q4_1", "clipped_ste")
    seq = ops.seq_start(latent, "mlx2_g32").requires_grad_()
    return [
        ("fake_quantize", LIBQAT.fake_quantize, (w, *searched, "a.weight")),
        ("fake_quantize-rank4", LIBQAT.fake_quantize, (leaf(4, 2, 4, 8), "q8_0")),
        ("fake_quantize-strided", LIBQAT.fake_quantize, (strided, "int4_channel")),
        ("fake_quantize_backward", LIBQAT.fake_quantize_backward, (normal(48, 64), latent, *searched)),
        (
            "fake_quantize_backward-ste",
            LIBQAT.fake_quantize_backward,
            (normal(48, 64), latent, "q4_0", "ste"),
        ),
        ("linear", LIBQAT.quantized_linear, (leaf(2, 3, 64), w, b, *searched, "a.weight")),
        ("linear-1d", LIBQAT.quantized_linear, (normal(64), w, None, "int4_channel")),
        ("linear-bf16", LIBQAT.quantized_linear, (leaf(3, 64, dtype=half), w, b, "q4_1")),
        ("grad_input", LIBQAT.quantized_linear_grad_input, (normal(2, 3, 48), latent, "q4_0", "search")),
        (
            "grad_weight",
            LIBQAT.quantized_linear_grad_weight,
            (normal(2, 3, 48), normal(2, 3, 64), latent, *searched),
        ),
        (
            "grad_weight-bf16",
            LIBQAT.quantized_linear_grad_weight,
            (normal(3, 48, dtype=half), low, latent, "q4_0"),
        ),
        ("embedding", LIBQAT.quantized_embedding, (indices, w, 1, *clipped)),
        (
            "embedding_backward",
            LIBQAT.quantized_embedding_backward,
            (normal(2, 3, 64, seed=4), indices, latent, 1, *searched),
        ),
        ("fake_quantize-learned", LIBQAT.fake_quantize, (w, *learned, "tensor")),
        ("linear-learned", LIBQAT.quantized_linear, (leaf(2, 3, 64), w, b, *learned)),
        ("embedding-learned", LIBQAT.quantized_embedding, (indices, w, 1, *learned)),
        (
            "backward_scales",
            LIBQAT.fake_quantize_backward_scales,
            (normal(48, 64), latent, *held, "tensor", "a.weight"),
        ),
        (
            "grad_scales",
            LIBQAT.quantized_linear_grad_scales,
            (normal(2, 3, 48), normal(2, 3, 64), latent, *held),
        ),
        (
            "grad_input-learned",
            LIBQAT.quantized_linear_grad_input,
            (normal(2, 3, 48), latent, "q4_1", "learned", "", scales),
        ),
        (
            "embedding_backward_scales",
            LIBQAT.quantized_embedding_backward_scales,
            (normal(2, 3, 64, seed=4), indices, latent, scales, 1, "q4_1", "clipped_ste"),
        ),
        ("fake_quantize-differentiated", LIBQAT.fake_quantize, (w, "q4_0", "ste", "differentiated")),
        ("choose_scales", LIBQAT.choose_scales, (w, "q4_1")),
        ("quantize-learned", LIBQAT.quantize, (w, "q4_1", "learned", "", scales)),
        ("quantize", LIBQAT.quantize, (w, "q4_1", "search")),
        ("quantize-rank3", LIBQAT.quantize, (leaf(4, 2, 4), "int8_channel")),
        (
            "activation-static",
            LIBQAT.fake_quantize_activation,
            (leaf(2, 3, 64), "int8_tensor_static", torch.tensor(0.02), "a.weight"),
        ),
        ("activation-token", LIBQAT.fake_quantize_activation, (leaf(2, 3, 64, dtype=half), "int8_token")),
        ("activation-blocks", LIBQAT.fake_quantize_activation, (leaf(3, 64), "q8_0")),
        (
            "activation_backward",
            LIBQAT.fake_quantize_activation_backward,
            (normal(2, 64), normal(2, 64, seed=1), torch.tensor(0.02)),
        ),
        (
            "activation-learned",
            LIBQAT.fake_quantize_activation,
            (leaf(2, 3, 64), "int8_tensor_static", torch.tensor(0.02, requires_grad=True)),
        ),
        (
            "activation_backward_scale",
            LIBQAT.fake_quantize_activation_backward_scale,
            (normal(2, 64), normal(2, 64, seed=1), torch.tensor(0.02)),
        ),
        ("seq_start", LIBQAT.seq_start, (latent, "mlx2_g32")),
        ("seq_tie", LIBQAT.seq_tie, (seq, "mlx2_g32")),
        ("seq_tie_backward", LIBQAT.seq_tie_backward, (normal(48, 2, 2), "mlx2_g32")),
        ("dequantize", LIBQAT.dequantize, (*ops.quantize(latent, "q4_1"), "q4_1")),
    ]


CALLS = operator_calls()


@pytest.mark.parametrize(("op", "arguments"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_opcheck(op, arguments):
    torch.library.opcheck(op.default, arguments)


def test_every_operator_is_checked():
    defined = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("libqat::")
    }
    assert defined == {op.__name__ for _, op, _ in CALLS}


@pytest.mark.parametrize(("op", "arguments"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_any_device_reference_equals_the_cpu_kernel(op, arguments):
    # A device without a kernel of its own takes the composed reference; its key is asked for by name here.
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    other = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    reference, cpu = op.default.redispatch(other, *arguments), op.default(*arguments)
    torch.testing.assert_close(reference, cpu, rtol=0, atol=0)


def test_meta_tensors_give_shapes_and_the_same_errors():
    weight = torch.empty(48, 64, device="meta")
    y = ops.quantized_linear(torch.empty(2, 5, 64, device="meta", dtype=torch.bfloat16), weight, None, "q4_0")
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 48), torch.bfloat16, "meta")
    codes, scales = ops.quantize(weight, "q4_1")
    assert (codes.shape, scales.shape) == ((48, 64), (48, 2, 2))
    with pytest.raises(libqat.ArgumentError, match="divide"):
        ops.fake_quantize(torch.empty(4, 33, device="meta"), "q4_0")
    with pytest.raises(libqat.ArgumentError, match="last dimension of 64"):
        ops.quantized_linear(torch.empty(2, 63, device="meta"), weight, None, "q4_0")
    with pytest.raises(libqat.ArgumentError, match="on the weight's device"):
        ops.quantized_linear(torch.empty(2, 64), weight, None, "q4_0")


class Net(torch.nn.Module):
    """Tokens -> embedding -> two linear layers, one of them tied to the embedding."""

    def __init__(self, grid, estimator):
        super().__init__()
        self.table, self.up, self.bias = (
            torch.nn.Parameter(normal(*shape, seed=seed))
            for seed, shape in enumerate([(16, 64), (64, 64), (64,)])
        )
        self.grid, self.estimator = grid, estimator

    def forward(self, tokens):
        x = ops.quantized_embedding(tokens, self.table, None, self.grid, self.estimator, tensor="table")
        x = torch.tanh(
            ops.quantized_linear(x / 8, self.up, self.bias, self.grid, self.estimator, tensor="up")
        )
        return ops.quantized_linear(x, self.table, None, self.grid, self.estimator, tensor="table")


TOKENS = torch.arange(10).reshape(2, 5)


def run(net, forward, autocast=False):
    """(output, gradients) of one step."""
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = forward(TOKENS)
        loss = y.float().square().mean()
    loss.backward()
    return [y.detach(), *(p.grad.clone() for p in net.parameters())]


def assert_same_bits(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_on_float32_latents(dtype):
    x, weight, bias, upstream = leaf(6, 64), leaf(48, 64, seed=1), leaf(48, seed=2), normal(6, 48, seed=3)
    with torch.autocast("cpu", dtype):
        y = ops.quantized_linear(x, weight, bias, "q4_0")
        w_hat = ops.fake_quantize(weight, "q4_0")
    assert (y.dtype, w_hat.dtype) == (dtype, torch.float32)
    low, w_low, g_low = x.detach().to(dtype), w_hat.detach().to(dtype), upstream.to(dtype)
    assert torch.equal(y, linear(low, w_low, bias.detach().to(dtype)))
    y.backward(g_low)
    # The recomputed weight is forward's, in forward's dtype; gradients return in the leaves' dtype.
    assert torch.equal(x.grad, (g_low @ w_low).float())
    assert torch.equal(weight.grad, (g_low.t() @ low).float())
    assert bias.grad.dtype == torch.float32


def test_backward_keeps_forwards_dtype_under_another_autocast_state():
    x, weight, upstream = leaf(6, 64), leaf(48, 64, seed=1), normal(6, 48, seed=3)
    y = ops.quantized_linear(x, weight, None, "q4_0", "clipped_ste")
    outside = torch.autograd.grad(y, (x, weight), upstream, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, (x, weight), upstream)
    assert_same_bits(outside, inside)


def test_a_disabled_autocast_region_computes_in_the_inputs_dtype():
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert ops.quantized_linear(normal(2, 64), normal(48, 64), None, "q4_0").dtype == torch.float32


def test_no_grad_and_inference_mode_give_the_same_numbers():
    net = Net("q4_0", "ste")
    with torch.no_grad():
        y = net(TOKENS)
    assert not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(net(TOKENS), y)
    assert torch.equal(net(TOKENS), y)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_checkpointing_changes_nothing(estimator, autocast):
    net = Net("q4_0", estimator)
    plain = run(net, net, autocast)
    checkpointed = run(net, lambda tokens: checkpoint(net, tokens, use_reentrant=False), autocast)
    assert_same_bits(plain, checkpointed)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("grid", ["q4_0", "int4_channel"])
def test_compiled_graphs_equal_eager(grid, estimator, autocast):
    torch._dynamo.reset()
    net = Net(grid, estimator)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(net, net, autocast), run(net, compiled, autocast))


def test_inductor_equals_eager():
    torch._dynamo.reset()
    net = Net("q4_0", "clipped_ste")
    eager, compiled = run(net, net), run(net, torch.compile(net, fullgraph=True))
    for a, b in zip(eager, compiled, strict=True):
        # Inductor's own tanh and mean differ from ATen's in the last places; the operators are the same code.
        # A changed code would move a weight by 1/16 of its block's maximum.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_compiled_graph_raises_the_same_error():
    torch._dynamo.reset()
    net = Net("q4_0", "ste")
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    compiled(TOKENS)
    with torch.no_grad():
        net.up[3, 4] = float("nan")
    with pytest.raises(libqat.NumericError, match=r"^quantized_linear: up: row 3 is not finite$"):
        compiled(TOKENS)


def test_double_backward_is_refused():
    x, weight = leaf(2, 64), leaf(48, 64)
    functions = {
        "fake_quantize_backward": lambda: ops.fake_quantize(weight, "q4_0"),
        "quantized_linear_grad_weight": lambda: ops.quantized_linear(x.detach(), weight, None, "q4_0"),
        "quantized_embedding_backward": lambda: ops.quantized_embedding(
            torch.tensor([1]), weight, None, "q4_0"
        ),
    }
    for name, function in functions.items():
        (grad,) = torch.autograd.grad(function().square().sum(), weight, create_graph=True)
        with pytest.raises(RuntimeError, match=f"derivative for libqat::{name} is not implemented"):
            grad.sum().backward()


def test_a_latent_that_changes_before_backward_is_refused():
    # Backward would recompute another weight than forward used.
    x, weight = leaf(2, 64), leaf(48, 64)
    y = ops.quantized_linear(x, weight, None, "q4_0")
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("grid", GRIDS)
def test_bits_do_not_depend_on_the_thread_count(grid):
    weight, grad, indices = normal(1024, 256), normal(1024, 256, seed=1), torch.arange(900).flip(0)

    def everything():
        x = normal(4, 256)
        w_hat = ops.fake_quantize(weight, grid)
        y = ops.quantized_linear(x, weight, None, grid)
        # ATen's own product may split its sum by threads; the weight it is given may not differ.
        assert torch.equal(y, linear(x, w_hat))
        stored = ops.quantize(weight, grid) if grid != "bf16" else ()
        return [
            w_hat,
            LIBQAT.fake_quantize_backward(grad, weight, grid, "clipped_ste"),
            ops.quantized_embedding(indices, weight, None, grid),
            LIBQAT.quantized_embedding_backward(grad[:900], indices, weight, 3, grid, "clipped_ste"),
            *stored,
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(4)
        assert_same_bits(one, everything())
    finally:
        torch.set_num_threads(threads)


def test_the_lowest_bad_row_is_named_whatever_the_threads():
    weight = normal(4096, 256)
    weight[[701, 2900, 4095], 17] = float("nan")
    threads = torch.get_num_threads()
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            with pytest.raises(libqat.NumericError, match="row 701 is not finite"):
                ops.fake_quantize(weight, "q4_0")
    finally:
        torch.set_num_threads(threads)
