"""The operators' numbers: forward values, and gradients against closed formulas in float64."""

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError, gradcheck
from torch.nn.functional import embedding, linear

import libqat
from libqat import ops

FLOAT_GRIDS = ["f32", "f16", "bf16"]
INTEGER_GRIDS = ["int8_channel", "int4_channel", "int2_channel", "int4_g32", "int3_g32"]
CODED_GRIDS = ["q4_0", "q4_1", "q8_0", "q2_0", "mxfp4", *INTEGER_GRIDS]
GRIDS = FLOAT_GRIDS + CODED_GRIDS
ESTIMATORS = ["ste", "clipped_ste"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inside(weight, grid, estimator):
    """Where the gradient passes, from the formats' own scale rules in float64.

    Only q4_0 (d = signed maximum / -8, codes to 7), mxfp4 (s = a power of two, values to 6 s) and intN
    (s = max / ((2^N - 1) / 2) of a row or group, codes to 2^(N-1) - 1) clip with their own scale; the widened
    border keeps the extremes, which lie on it, inside.
    """
    w = weight.double()
    everything = torch.ones_like(w)
    if estimator == "ste" or grid not in ("q4_0", "mxfp4", *INTEGER_GRIDS):
        return everything
    if grid == "q4_0":
        blocks = w.reshape(-1, 32)
        signed = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        low, high, codes = -8, 7, (blocks / (signed / -8)).reshape(w.shape)
    elif grid == "mxfp4":
        blocks = w.reshape(-1, 32)
        scales = (blocks.abs().amax(1, keepdim=True).log2().floor() - 2).exp2()
        low, high, codes = -6, 6, (blocks / scales).reshape(w.shape)
    else:
        bits = int(grid[3])
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        rows = w.flatten(1) if grid.endswith("channel") else w.reshape(-1, int(grid.partition("_g")[2]))
        codes = (rows / (rows.abs().amax(1, keepdim=True) / ((2**bits - 1) / 2))).reshape(w.shape)
    return everything * (codes >= low - 1e-5) * (codes <= high + 1e-5)


def assert_product(actual, left, right, mask=1.0):
    """actual = mask * (left @ right), both matrices as they stand in the compute dtype.

    Bound: K terms accumulated in float32 in any order err by at most K * 2^-23 times the sum of magnitudes;
    one rounding of the result to the compute dtype adds half a unit in the last place (float16's subnormals
    are 2^-24 apart).
    """
    expected = left.double() @ right.double()
    magnitudes = left.double().abs() @ right.double().abs()
    bound = left.shape[1] * 2.0**-23 * magnitudes + torch.finfo(left.dtype).eps * expected.abs() + 2.0**-24
    assert ((actual.double() - mask * expected).abs() <= bound).all()


@pytest.mark.parametrize("grid", CODED_GRIDS)
@pytest.mark.parametrize("shape", [(6, 64), (5, 4, 16), (3, 2, 4, 8), (1, 128)])
def test_forward_is_what_the_stored_form_decodes_to(grid, shape):
    weight = normal(*shape)
    codes, scales = ops.quantize(weight, grid)
    assert codes.dtype == torch.int8
    assert codes.shape == (shape[0], weight[0].numel())
    assert scales.dtype == torch.float32
    assert scales.shape[0] == shape[0]
    decoded = ops.dequantize(codes, scales, grid)
    assert torch.equal(ops.fake_quantize(weight, grid), decoded.reshape(shape))
    assert not torch.equal(decoded.reshape(shape), weight)


@pytest.mark.parametrize("grid", FLOAT_GRIDS)
def test_float_grids_round_each_value(grid):
    weight = normal(4, 7)
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[grid]
    assert torch.equal(ops.fake_quantize(weight, grid), weight.to(dtype).float())


@pytest.mark.parametrize("grid", GRIDS)
def test_strided_weights_are_their_contiguous_copies(grid):
    weight = normal(64, 64).t()
    assert not weight.is_contiguous()
    assert torch.equal(ops.fake_quantize(weight, grid), ops.fake_quantize(weight.contiguous(), grid))
    x = normal(3, 64)
    assert torch.equal(
        ops.quantized_linear(x, weight, None, grid), ops.quantized_linear(x, weight.contiguous(), None, grid)
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("grid", GRIDS)
def test_fake_quantize_gradient(grid, estimator):
    weight = normal(6, 64).requires_grad_()
    upstream = normal(6, 64, seed=1)
    ops.fake_quantize(weight, grid, estimator).backward(upstream)
    mask = inside(weight.detach(), grid, estimator)
    if estimator == "clipped_ste" and grid in (
        "q4_0",
        "int4_channel",
        "int2_channel",
        "int4_g32",
        "int3_g32",
    ):
        assert 0 < mask.mean() < 1, "the sample must exercise both sides"
    assert torch.equal(weight.grad.double(), mask * upstream.double())


def test_a_gradient_that_is_masked_away_is_zero_even_when_it_is_not_finite():
    weight = torch.full((1, 32), 0.1)
    weight[0, :2] = torch.tensor([-1.0, 0.99])  # d = 1/8, so 0.99 / d = 7.92 lies beyond code 7
    upstream = torch.full((1, 32), float("inf"))
    grad = torch.ops.libqat.fake_quantize_backward(upstream, weight, "q4_0", "clipped_ste")
    assert grad[0, 1] == 0
    assert grad[0, 0] == float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_quantized_linear_is_linear_of_the_fake_quantized_weight(grid, dtype):
    x, weight, bias = normal(3, 5, 64, dtype=dtype), normal(48, 64, seed=1), normal(48, seed=2)
    w_hat = ops.fake_quantize(weight, grid).to(dtype)
    for addend in (bias, None):
        expected = linear(x, w_hat, None if addend is None else addend.to(dtype))
        actual = ops.quantized_linear(x, weight, addend, grid)
        assert actual.dtype == dtype
        # The same matrix product of the same bits: no tolerance.
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_quantized_linear_gradients(grid, dtype, estimator):
    x = normal(2, 5, 64, dtype=dtype).requires_grad_()
    weight, bias = normal(48, 64, seed=1).requires_grad_(), normal(48, seed=2).requires_grad_()
    upstream = normal(2, 5, 48, seed=3, dtype=dtype)
    ops.quantized_linear(x, weight, bias, grid, estimator).backward(upstream)
    w_hat = ops.fake_quantize(weight.detach(), grid).to(dtype)
    assert (x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (dtype, torch.float32, torch.float32)
    g, inputs = upstream.reshape(10, 48), x.detach().reshape(10, 64)
    assert_product(x.grad.reshape(10, 64), g, w_hat)
    assert_product(weight.grad, g.t(), inputs, inside(weight.detach(), grid, estimator))
    # Ten float32 additions, each off by at most 2^-24 of a partial sum.
    torch.testing.assert_close(bias.grad.double(), g.double().sum(0), rtol=0, atol=10 * 2.0**-24 * 20)
    # Backward's own w_hat is forward's, bit for bit: the same product of the same matrices.
    assert torch.equal(x.grad.reshape(10, 64), g @ w_hat)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (1, 1, 1, 64)])
def test_quantized_linear_takes_any_leading_dimensions(shape):
    x, weight, bias = (
        normal(*shape).requires_grad_(),
        normal(32, 64, seed=1).requires_grad_(),
        normal(32, seed=2),
    )
    y = ops.quantized_linear(x, weight, bias.requires_grad_(), "q4_0")
    assert y.shape == (*shape[:-1], 32)
    y.sum().backward()
    assert x.grad.shape == shape
    rows = x.detach().reshape(-1, 64)
    assert_product(weight.grad, torch.ones(32, rows.shape[0]), rows)
    assert torch.equal(bias.grad, torch.full((32,), float(rows.shape[0])))


def test_only_the_gradients_asked_for_are_computed():
    x, weight = normal(4, 32), normal(8, 32, seed=1)
    y = ops.quantized_linear(x.requires_grad_(), weight, None, "q4_0")
    y.sum().backward()
    assert weight.grad is None
    y = ops.quantized_linear(x.detach(), weight.requires_grad_(), normal(8), "q4_0")
    y.sum().backward()
    assert weight.grad is not None


def test_only_input_and_weight_are_saved():
    saved = []

    def pack(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    x, weight = normal(4, 64).requires_grad_(), normal(48, 64, seed=1).requires_grad_()
    bias, table, indices = normal(48).requires_grad_(), normal(9, 64).requires_grad_(), torch.arange(4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.quantized_linear(x, weight, bias, "q4_0", "clipped_ste")
        assert sorted(saved) == sorted([x.data_ptr(), weight.data_ptr()])
        saved.clear()
        ops.fake_quantize(weight, "q4_0", "clipped_ste")
        assert saved == [weight.data_ptr()]
        saved.clear()
        ops.quantized_embedding(indices, table, None, "q4_0", "clipped_ste")
        assert sorted(saved) == sorted([indices.data_ptr(), table.data_ptr()])


def test_results_do_not_live_in_the_scratch_buffer():
    x, first, second = normal(4, 64), normal(48, 64, seed=1), normal(48, 64, seed=2)
    y = ops.quantized_linear(x, first, None, "q4_0")
    kept = y.clone()
    ops.quantized_linear(x, second, None, "q8_0")
    assert torch.equal(y, kept)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("grid", GRIDS)
def test_quantized_embedding(grid, estimator):
    weight = normal(20, 64).requires_grad_()
    indices = torch.tensor([[3, 3, 19], [0, 7, 3]])
    upstream = normal(2, 3, 64, seed=1)
    y = ops.quantized_embedding(indices, weight, 7, grid, estimator)
    assert torch.equal(y, embedding(indices, ops.fake_quantize(weight.detach(), grid)))
    y.backward(upstream)
    one_hot = torch.nn.functional.one_hot(indices.flatten(), 20).float()
    one_hot[:, 7] = 0  # the padding row learns nothing
    mask = inside(weight.detach(), grid, estimator)
    assert_product(weight.grad, one_hot.t(), upstream.reshape(6, 64), mask)


def test_quantized_embedding_reads_only_the_touched_rows():
    weight = normal(8, 32)
    weight[5] = float("nan")
    ops.quantized_embedding(torch.tensor([0, 7]), weight, None, "q4_0")
    with pytest.raises(libqat.NumericError, match=r"^quantized_embedding: emb: row 5 is not finite$"):
        ops.quantized_embedding(torch.tensor([0, 7, 5]), weight, None, "q4_0", tensor="emb")
    assert ops.quantized_embedding(torch.empty(2, 0, dtype=torch.int64), weight, None, "q4_0").shape == (
        2,
        0,
        32,
    )


def test_gradcheck_fails_on_a_straight_through_estimator():
    # Rounding is a staircase: its true derivative is 0 almost everywhere, the estimator says 1. A gradcheck
    # that passes would mean that nothing was rounded. A step of 1e-2 is wide enough for float32: the float
    # grid, which is smooth, passes the same check.
    weight = normal(2, 8).double().requires_grad_()

    def check(grid):
        function = lambda w: ops.fake_quantize(w.float(), grid).double()  # noqa: E731
        return gradcheck(function, (weight,), eps=1e-2, atol=1e-3)

    assert check("f32")
    with pytest.raises(GradcheckError):
        check("int2_channel")
