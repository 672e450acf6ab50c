"""libqat: quantization-aware training whose exported file holds exactly the trained numbers."""

import torch as _torch  # noqa: F401  (loads LibTorch before the extension that links to it)

from . import _core as _core
from . import ops
from ._core import (
    ArgumentError,
    Decoder,
    Error,
    FileError,
    LoadedModel,
    NumericError,
    Policy,
    PreparedDecoder,
    QuantizedCheckpoint,
    QuantizedTensor,
    Score,
    StepReport,
    TensorReport,
    TokenData,
    Trainer,
    UnsupportedError,
    check_options,
    compare,
    default_options,
    dequantize,
    export,
    export_targets,
    load,
    load_checkpoint,
    load_model,
    objective_loss,
    save,
    share_removed,
    verify,
    write_tokens,
)
from .batch_norm import FoldedBatchNorms, fold_batch_norm, fold_batch_norms, freeze_batch_norm
from .grids import Grid, grids
from .prepare import PreparedModel, freeze, prepare, unprepare
from .report import Report
from .tokenizer import load_tokenizer

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Decoder",
    "Error",
    "FileError",
    "FoldedBatchNorms",
    "Grid",
    "LoadedModel",
    "NumericError",
    "Policy",
    "PreparedDecoder",
    "PreparedModel",
    "QuantizedCheckpoint",
    "QuantizedTensor",
    "Report",
    "Score",
    "StepReport",
    "TensorReport",
    "TokenData",
    "Trainer",
    "UnsupportedError",
    "check_options",
    "compare",
    "default_options",
    "dequantize",
    "export",
    "export_targets",
    "fold_batch_norm",
    "fold_batch_norms",
    "freeze",
    "freeze_batch_norm",
    "grids",
    "load",
    "load_checkpoint",
    "load_model",
    "load_tokenizer",
    "objective_loss",
    "ops",
    "prepare",
    "save",
    "share_removed",
    "unprepare",
    "verify",
    "write_tokens",
]
