"""What the tests of prepared models share."""

import copy

import torch
from conftest import VOCABULARY

import libqat
from libqat import ops

ALL_Q4 = {"rules": [{"match": ".*", "weight": "q4_0"}]}


def tokens(batch=2, length=12, seed=0):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def quantized_copy(model, prepared):
    """The reference: an ordinary model whose weights were replaced by what ships."""
    reference = libqat.unprepare(copy.deepcopy(model))
    with torch.no_grad():
        for name, quantizer in prepared.quantizers().items():
            weight = reference.get_parameter(name)
            weight.copy_(ops.fake_quantize(weight.float(), quantizer.grid))
    return reference
