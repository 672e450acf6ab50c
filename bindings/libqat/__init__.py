"""libqat: quantization-aware training whose exported file holds exactly the trained numbers."""

import torch as _torch  # noqa: F401  (loads LibTorch before the extension that links to it)

from . import _core as _core
from . import ops as ops
from ._core import ArgumentError, Error, FileError, NumericError, UnsupportedError
from ._core import Decoder as Decoder
from ._core import LoadedModel as LoadedModel
from ._core import Policy as Policy
from ._core import QuantizedCheckpoint as QuantizedCheckpoint
from ._core import QuantizedTensor as QuantizedTensor
from ._core import dequantize as dequantize
from ._core import export as export
from ._core import export_targets as export_targets
from ._core import load as load
from ._core import load_checkpoint as load_checkpoint
from ._core import load_model as load_model
from ._core import save as save
from ._core import verify as verify
from .tokenizer import load_tokenizer as load_tokenizer

__version__ = "0.1.0"

__all__ = ["ArgumentError", "Error", "FileError", "NumericError", "UnsupportedError"]
