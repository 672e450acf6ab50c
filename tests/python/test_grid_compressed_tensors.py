"""The integer grids against the compressed-tensors package: scales, codes, weights and packed bytes."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from libqat.grids import grids
from safetensors.numpy import load_file

import libqat
from libqat import _core

NAMES = [name for name in grids() if name.startswith("int")]
WIDTH = 768


def weights():
    """Normal rows of many magnitudes, one with outliers, one of ties, one zero group."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal((48, WIDTH)) * np.exp2(rng.integers(-40, 40, (48, 1)))
    w[1, ::97] *= 50
    w[2] = rng.integers(-15, 16, WIDTH) / 2
    w[3, 256:512] = 0
    return torch.from_numpy(w.astype(np.float32))


def arguments(name):
    grid = grids()[name]
    strategy = (
        {"strategy": "channel"} if grid.block is None else {"strategy": "group", "group_size": grid.block}
    )
    return QuantizationArgs(num_bits=grid.bits, type="int", symmetric=True, **strategy)


def theirs(name, w):
    """(scale [rows, groups], codes int8, weights) as the package computes them."""
    args = arguments(name)
    groups = w.unflatten(1, (-1, args.group_size or WIDTH))
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), args)
    codes = quantize(w, scale, zero, args, dtype=torch.int8)
    return scale, codes, dequantize(codes, scale, zero, args)


@pytest.mark.parametrize("name", NAMES)
def test_scales_codes_and_weights_are_the_packages_own(name):
    w = weights()
    scale, codes, w_hat = theirs(name, w)
    s = _core.grid_choose(name, w.numpy())
    np.testing.assert_array_equal(s[..., 0], scale.numpy())
    np.testing.assert_array_equal(_core.grid_encode(name, w.numpy(), s), codes.numpy())
    np.testing.assert_array_equal(_core.grid_fake_quantize(name, w.numpy()), w_hat.numpy())


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_packs_codes_as_the_package_does(name, tmp_path):
    w = weights()
    libqat.save(_core.freeze_tensors([("w", w)], {"w": name}), tmp_path / "w.qat.safetensors")
    stored = load_file(tmp_path / "w.qat.safetensors")
    scale, codes, _ = theirs(name, w)
    packed = pack_to_int32(codes, grids()[name].bits)
    np.testing.assert_array_equal(stored["w.codes"], packed.numpy().view(np.uint8))
    np.testing.assert_array_equal(stored["w.scales"], scale.numpy())
