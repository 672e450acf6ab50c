"""The integer grids against the compressed-tensors package: parameters, codes, weights and packed bytes."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from libqat.grids import grids
from safetensors.numpy import load_file

import libqat
from libqat import _core

NAMES = [name for name in grids() if name.startswith("int") and not grids()[name].whole_tensor]
WIDTH = 768
OPTIONS = {"": None, "@bf16:bf16": torch.bfloat16, "@fp16:fp16": torch.float16}


def weights(dtype=None):
    """Normal rows of many magnitudes, one with outliers, one of ties, one zero group, rows of one sign."""
    rng = np.random.default_rng(3)
    span = 40 if dtype != torch.float16 else 10  # float16's scales reach from 2^-24 to 2^16
    w = rng.standard_normal((48, WIDTH)) * np.exp2(rng.integers(-span, span, (48, 1)))
    w[1, ::97] *= 50
    w[2] = rng.integers(-15, 16, WIDTH) / 2
    w[3, 256:512] = 0
    w[4] = np.abs(w[4])
    w[5] = -np.abs(w[5]) - 1
    w[6] = rng.integers(0, 2, WIDTH) * 2.0**-149  # a range whose step underflows
    w[7] = -w[6]
    w[8] = 2.0**-27  # float16 stores the scale as 0
    w[9] = 0
    return torch.from_numpy(w.astype(np.float32))


def arguments(name, dtype=None):
    grid = grids()[name]
    strategy = (
        {"strategy": "channel"} if grid.block is None else {"strategy": "group", "group_size": grid.block}
    )
    symmetric = not name.endswith("_asym")
    return QuantizationArgs(
        num_bits=grid.bits, type="int", symmetric=symmetric, scale_dtype=dtype, **strategy
    )


def theirs(name, w, dtype=None):
    """(scale [rows, groups], zero points, codes int8, weights) as the package computes them.

    With a dtype: scales of that dtype, as a model of that dtype holds them, whose weights come out in it.
    """
    args = arguments(name, dtype)
    groups = w.unflatten(1, (-1, args.group_size or WIDTH))
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), args)
    scale = scale.to(dtype or torch.float32)
    codes = quantize(w, scale, zero, args, dtype=torch.int8)
    return scale, zero, codes, dequantize(codes, scale, zero, args)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_scales_codes_and_weights_are_the_packages_own(name, options):
    dtype = OPTIONS[options]
    w = weights(dtype)
    scale, zero, codes, w_hat = theirs(name, w, dtype)
    assert w_hat.dtype == (dtype or torch.float32)
    s = _core.grid_choose(name + options, w.numpy())
    stored = _core.grid_store(name + options, s, WIDTH)
    np.testing.assert_array_equal(stored[..., 0], scale.float().numpy())
    if name.endswith("_asym"):
        np.testing.assert_array_equal(stored[..., 1], zero.numpy())
    ours = _core.grid_encode(name + options, w.numpy(), s)
    np.testing.assert_array_equal(ours, codes.numpy())
    for reference in (False, True):
        ours = _core.grid_fake_quantize(name + options, w.numpy(), reference=reference)
        np.testing.assert_array_equal(ours, w_hat.float().numpy())


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_packs_codes_as_the_package_does(name, tmp_path):
    w = weights()
    libqat.save(_core.freeze_tensors([("w", w)], {"w": name}), tmp_path / "w.qat.safetensors")
    stored = load_file(tmp_path / "w.qat.safetensors")
    scale, zero, codes, _ = theirs(name, w)
    packed = pack_to_int32(codes, grids()[name].bits)
    np.testing.assert_array_equal(stored["w.codes"], packed.numpy().view(np.uint8))
    np.testing.assert_array_equal(stored["w.scales"], scale.numpy())
    if name.endswith("_asym"):
        np.testing.assert_array_equal(stored["w.zero_points"], zero.numpy())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", [name for name in NAMES if "_g32" in name or "_channel" in name])
def test_a_compressed_module_decompresses_to_our_weights(name, options):
    dtype = OPTIONS[options]
    w = weights(dtype)
    scale, zero, _, _ = theirs(name, w, dtype)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments(name))
    state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    compressed = compressor.compress(state, scheme)
    w_hat = compressor.decompress(compressed, scheme)["weight"]
    assert w_hat.dtype == (dtype or torch.float32)
    np.testing.assert_array_equal(_core.grid_fake_quantize(name + options, w.numpy()), w_hat.float().numpy())
