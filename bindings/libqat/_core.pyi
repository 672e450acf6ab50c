"""
The compiled part of libqat. Use the names in `libqat`; this module is its implementation.
"""

from __future__ import annotations

import collections.abc
import os
import typing

import numpy
import numpy.typing
import torch

__all__: list[str] = [
    "ArgumentError",
    "AwqFold",
    "CacheCheck",
    "CachePlan",
    "CacheProgress",
    "ChoiceScore",
    "Decoder",
    "Difference",
    "Error",
    "Estimator",
    "FileError",
    "FileTensor",
    "InputDrift",
    "InputMoments",
    "KvCache",
    "Lattice",
    "LayerSensitivity",
    "LoadedModel",
    "NumericError",
    "Obstacle",
    "Policy",
    "PreparedDecoder",
    "QuantizedCheckpoint",
    "QuantizedTensor",
    "Recipe",
    "Requantization",
    "RoundedTensor",
    "Score",
    "StepReport",
    "TeacherCache",
    "TensorReport",
    "TokenData",
    "Trainer",
    "UnsupportedError",
    "activation_bytes",
    "apply_awq",
    "apply_gptq",
    "apply_guided",
    "apply_lattice",
    "apply_weighted_search",
    "awq_scale",
    "can_export",
    "cautions",
    "check_options",
    "compare",
    "compute_dtype",
    "convert_tensor",
    "convert_tensors",
    "default_options",
    "dequantize",
    "expected_kl",
    "export_checkpoint",
    "export_targets",
    "find_lattice",
    "fingerprint",
    "freeze_tensors",
    "generate",
    "ggml_pack",
    "ggml_unpack",
    "gptq_tensor",
    "grid_backward",
    "grid_choose",
    "grid_choose_backward",
    "grid_decode",
    "grid_encode",
    "grid_fake_quantize",
    "grid_fake_quantize_bf16",
    "grid_fake_quantize_with",
    "grid_holds_seq",
    "grid_in_range",
    "grid_info",
    "grid_names",
    "grid_row_bytes",
    "grid_store",
    "grid_tensor_bytes",
    "has_lattice",
    "head_loss",
    "import_checkpoint",
    "input_correction",
    "learning_rate_at",
    "left_out",
    "load",
    "load_checkpoint",
    "load_model",
    "log_likelihoods",
    "loss_rows",
    "mean_interval",
    "mixed",
    "needs_teacher",
    "objective_loss",
    "outline",
    "parameter_shapes",
    "plan_export",
    "prepare_decoder",
    "read_gguf_header",
    "read_safetensors_header",
    "recommended",
    "removed",
    "report_tensor",
    "requantization_report",
    "resampled_means",
    "sample",
    "save",
    "score_choices",
    "score_intervals",
    "sensitivity",
    "seq_untie",
    "share_removed",
    "take_up",
    "verify",
    "weighted_search_tensor",
    "write_tokens",
]

class Error(Exception):
    """Base of every exception that libqat raises on purpose."""

class ArgumentError(Error, ValueError):
    """A bad argument, policy or configuration."""

class FileError(Error, OSError):
    """A file that cannot be read, is malformed, or cannot be written."""

class NumericError(Error, ArithmeticError):
    """A value that has no place on a grid."""

class UnsupportedError(Error, NotImplementedError):
    """Legal input that cannot be represented."""

class Estimator:
    """
    How the gradient of one weight passes the rounding, and where its scales come from.
    """

    def __eq__(self, arg0: object) -> bool: ...
    def __hash__(self) -> int: ...
    def __init__(self, kind: str = "ste", scale: str = "", scale_gradient: str = "lsq") -> None:
        """
        An estimator from the words of a policy; see docs/policy.md.

        Args:
            kind: "ste", "clipped_ste", "trust_mask", "stable_qat"; "lsq": clipped_ste with learned scales; "seq":
                clipped_ste with the scale "seq".
            scale: "reference" (the default), "search", "differentiated", "learned", or "seq": learned, and tied to
                ParetoQ's balanced levels.
            scale_gradient: "lsq", "tensor" or "plain": what the gradient of learned scales is multiplied with.

        ArgumentError lists the legal names.
        """

    def __repr__(self) -> str: ...
    @property
    def kind(self) -> str:
        """
        'ste', 'clipped_ste', 'trust_mask' or 'stable_qat'.
        """

    @property
    def scale(self) -> str:
        """
        'reference', 'search', 'differentiated', 'learned' or 'seq'.
        """

    @property
    def scale_gradient(self) -> str:
        """
        'lsq', 'tensor' or 'plain'.
        """

class Policy:
    """
    Which tensor goes to which grid: ordered rules, first match wins. See docs/policy.md.
    """

    @staticmethod
    def from_file(path: os.PathLike | str | bytes) -> Policy:
        """
        A policy from a JSON file. FileError when it cannot be read.
        """

    @staticmethod
    def from_json(json: str) -> Policy:
        """
        A policy from JSON text. ArgumentError naming the JSON path of whatever is wrong.
        """

    @staticmethod
    def load(name_or_path: str) -> Policy:
        """
        A preset by name, or a file: anything that contains '/' or ends in '.json'.
        """

    @staticmethod
    def preset(name: str) -> Policy:
        """
        A policy that ships with libqat, see `presets`. ArgumentError lists the names.
        """

    @staticmethod
    def preset_summary(name: str) -> str:
        """
        What a preset is for, in a line. ArgumentError lists the names.
        """

    @staticmethod
    def presets() -> list[str]:
        """
        The names of all presets.
        """

    def __eq__(self, arg0: object) -> bool: ...
    def __getstate__(self) -> str: ...
    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, arg0: str) -> None: ...
    def activations(
        self,
        tensors: collections.abc.Sequence[tuple[str, str, collections.abc.Sequence[typing.SupportsIndex]]],
    ) -> list[tuple[str, str]]:
        """
        (input, output) of each tensor, parallel to `resolve`: how the product with it rounds activations.

        Formats of `libqat.ops.fake_quantize_activation`, "" where nothing is rounded.
        """

    def estimators(
        self,
        tensors: collections.abc.Sequence[tuple[str, str, collections.abc.Sequence[typing.SupportsIndex]]],
    ) -> list[Estimator]:
        """
        One Estimator per tensor, parallel to `resolve`: its rule's own, or the policy's.
        """

    def resolve(
        self,
        tensors: collections.abc.Sequence[tuple[str, str, collections.abc.Sequence[typing.SupportsIndex]]],
    ) -> list[str]:
        """
        One grid per tensor, "f32" where no rule matches.

        Args:
            tensors: (parameter name, "linear" | "embedding" | "conv" | "other", shape) of each; a row is everything
                after dimension 0.

        ArgumentError for a rule that matches nothing and is not optional, and for a width that the grid's block does
        not divide, naming the tensor.
        """

    def to_json(self) -> str:
        """
        Canonical JSON: sorted keys, defaults left out. from_json(to_json()) is the same policy.
        """

    def with_estimator(self, estimator: Estimator) -> Policy:
        """
        The same policy with that Estimator for every rule; rules lose their own.
        """

    def with_scale(self, scale: str) -> Policy:
        """
        The same policy with that scale rule, in its rules' own estimators too.
        """

    @property
    def activation_scales(self) -> tuple[str, int]:
        """
        How static activation scales are found: ('observed' or 'learned', batches of calibration).
        """

    @property
    def estimator(self) -> str:
        """
        How gradients pass through the rounding, where a rule does not say otherwise: see Estimator.
        """

    @property
    def kv_cache(self) -> str:
        """
        Format of the keys and values that attention keeps; '' for as they are.
        """

    @property
    def name(self) -> str:
        """
        Preset name or file path; '' when built from JSON.
        """

    @property
    def scale(self) -> str:
        """
        Where scales come from, where a rule does not say otherwise: see Estimator.
        """

class Recipe:
    """
    How to train on a policy's grids; see `recommended`.
    """

    @property
    def final_learning_rate(self) -> float:
        """
        The share of the peak at which the cosine ends.
        """

    @property
    def learning_rate(self) -> float:
        """
        Of the latents.
        """

    @property
    def policy(self) -> Policy:
        """
        The policy, with the estimator that its rules train with.
        """

    @property
    def scale_learning_rate(self) -> float:
        """
        Of learned scales, relative to their size.
        """

    @property
    def start(self) -> str:
        """
        'guided', 'gptq': at that PTQ method's solution; 'none': at the model as it is.
        """

    @property
    def start_generated(self) -> float:
        """
        Share of them that the float model writes itself, see `libqat.generate`.
        """

    @property
    def start_tokens(self) -> int:
        """
        Tokens that a start looks at, at most.
        """

class QuantizedTensor:
    """
    One tensor on a grid.
    """

    @property
    def codes(self) -> torch.Tensor:
        """
        int8 [R, N], unpacked.
        """

    @property
    def grid(self) -> str:
        """
        Name of the grid.
        """

    @property
    def nbytes(self) -> int:
        """
        Bytes of packed codes and stored scales in the consumer's file.
        """

    @property
    def scales(self) -> torch.Tensor:
        """
        float32 [R, G, P], the stored values.
        """

    @property
    def shape(self) -> list[int]:
        """
        Of the weight: [R, ...].
        """

class QuantizedCheckpoint:
    """
    What ships: codes, scales and grid of each quantized tensor, all other tensors as they are, and the model's configuration.
    """

    def weight(self, key: str) -> torch.Tensor:
        """
        The float32 weight of one key, aliases followed. ArgumentError when there is none.
        """

    @property
    def aliases(self) -> dict[str, str]:
        """
        Tied key -> the key that holds the data.
        """

    @property
    def config(self) -> str:
        """
        The model's configuration as JSON, or ''.
        """

    @property
    def floats(self) -> dict[str, torch.Tensor]:
        """
        state_dict key -> tensor, as it is stored.
        """

    @property
    def grids(self) -> dict[str, str]:
        """
        state_dict key -> grid, of the quantized tensors.
        """

    @property
    def policy(self) -> str:
        """
        The policy as JSON, or ''.
        """

    @property
    def quantized(self) -> dict[str, QuantizedTensor]:
        """
        state_dict key -> QuantizedTensor.
        """

    @property
    def tokenizer(self) -> str:
        """
        Path of a tokenizer.json, a Hugging Face folder or a GGUF, or ''.
        """

class Difference:
    """
    One difference between a file and a checkpoint.
    """

    def __repr__(self) -> str: ...
    @property
    def count(self) -> int:
        """
        How many differ.
        """

    @property
    def first(self) -> str:
        """
        The first of them in words.
        """

    @property
    def tensor(self) -> str:
        """
        State_dict key, or the file's own name of what is surplus.
        """

    @property
    def what(self) -> str:
        """
        'codes', 'scales', 'values', 'rounded' (nothing but rounding to the file's float type), 'missing', 'extra', 'type', 'shape', 'alias' or 'metadata'.
        """

class Obstacle:
    """
    Why a target cannot hold a tensor exactly.
    """

    def __repr__(self) -> str: ...
    @property
    def grid(self) -> str:
        """
        Name of its grid.
        """

    @property
    def reason(self) -> str:
        """
        In words.
        """

    @property
    def tensor(self) -> str:
        """
        State_dict key; '' when it is the model that has no place in the format.
        """

class FileTensor:
    """
    One tensor of an exported file.
    """

    @property
    def bytes(self) -> int:
        """
        Without padding.
        """

    @property
    def key(self) -> str:
        """
        State_dict key of the tensor that it is, or is a part of; the name again for what is derived.
        """

    @property
    def name(self) -> str:
        """
        In the file.
        """

    @property
    def shape(self) -> list[int]:
        """
        In torch's order.
        """

    @property
    def type(self) -> str:
        """
        The file's own name of its type: 'Q4_0', 'U8', ...
        """

class Requantization:
    """
    What becomes of one tensor that is dequantized, written in a float type and quantized again by its grid's own rule.
    """

    def __repr__(self) -> str: ...
    @property
    def blocks(self) -> int:
        """
        Groups of weights that share their scales.
        """

    @property
    def changed_blocks(self) -> int:
        """
        Blocks whose codes or stored scales come out differently.
        """

    @property
    def exact(self) -> bool:
        """
        Whether no block changes.
        """

    @property
    def grid(self) -> str:
        """
        Name of its grid.
        """

    @property
    def rounded_weights(self) -> int:
        """
        Weights that the float type does not hold exactly.
        """

    @property
    def tensor(self) -> str:
        """
        State_dict key.
        """

    @property
    def weights(self) -> int:
        """
        How many weights it has.
        """

class KvCache:
    """
    Keys and values of the tokens that a Decoder has seen.
    """

    def clear(self) -> None:
        """
        Forgets all tokens.
        """

    @property
    def length(self) -> int:
        """
        Tokens of each sequence that passed so far.
        """

    @property
    def nbytes(self) -> int:
        """
        Bytes of the tensors held.
        """

class Decoder:
    """
    libqat's own decoder. Runs in autocast's dtype when autocast is on, else in the weights'.
    """

    def __call__(self, tokens: torch.Tensor, cache: KvCache | None = None) -> torch.Tensor: ...
    def buffers(self) -> dict:
        """
        name -> tensor of the state that is not trained ("...layer_scalar").
        """

    def forward(self, tokens: torch.Tensor, cache: KvCache | None = None) -> torch.Tensor:
        """
        tokens: int64[B, T] -> logits [B, T, V]. With a cache, of tokens that follow those in it, without gradients: a prompt first, then one token at a time. ArgumentError for ids outside the vocabulary.
        """

    def frozen_copy(self, dtype: torch.dtype) -> Decoder:
        """
        A copy without gradients and quantizers, matrices stored in `dtype`: a teacher.
        """

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        hidden: [..., h] -> logits [..., V].
        """

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """
        tokens: int64[B, T] -> [B, T, h] after the final norm; `head` makes logits of it.
        """

    def new_cache(self) -> KvCache:
        """
        An empty KvCache for this decoder.
        """

    def parameters(self) -> dict:
        """
        name -> parameter, with Hugging Face's names. The tensors are the latents themselves, not copies.
        """

    def set_trainable(self, trainable: bool) -> None:
        """
        Whether every parameter asks for a gradient; single ones by `parameters()[name].requires_grad_()`.
        """

class LoadedModel:
    """
    A model as it was found on disk.
    """

    @property
    def config(self) -> str:
        """
        JSON in Hugging Face's spelling.
        """

    @property
    def decoder(self) -> Decoder:
        """
        The Decoder, with float32 latents.
        """

    @property
    def tokenizer(self) -> str:
        """
        Path to take the tokenizer from: the GGUF itself, or the Hugging Face folder.
        """

class TensorReport:
    """
    How one tensor ships.
    """

    @property
    def bits_per_weight(self) -> float:
        """
        Scales included.
        """

    @property
    def bytes(self) -> int:
        """
        Codes and scales.
        """

    @property
    def grid(self) -> str:
        """
        Name of the grid, or the tensor's own type.
        """

    @property
    def input(self) -> str:
        """
        Format of what goes into the product with it, or ''.
        """

    @property
    def kind(self) -> str:
        """
        'linear', 'embedding', 'conv' or 'other'.
        """

    @property
    def name(self) -> str:
        """
        state_dict key.
        """

    @property
    def output(self) -> str:
        """
        Format of what comes out of it, or ''.
        """

    @property
    def relative_error(self) -> float:
        """
        RMS(w_hat - w) / RMS(w); 0 for tensors kept as they are.
        """

    @property
    def shape(self) -> tuple:
        """
        Of the weight: (R, ...).
        """

class PreparedDecoder:
    """
    A Decoder with a policy attached. Its parameters are the latents.
    """

    def activation_scales(self) -> dict[str, float]:
        """
        Name in checkpoints -> static activation scale; 0: not calibrated yet.
        """

    def freeze(self, config: str = "", tokenizer: str = "") -> QuantizedCheckpoint:
        """
        The QuantizedCheckpoint of the present latents. config: JSON in Hugging Face's spelling; tokenizer: a path, see QuantizedCheckpoint.
        """

    def initialize_scales(self, scale: str = "search") -> None:
        """
        Sets all learned scales to those that a rule gives to the present latents, as `prepare` did.
        """

    def report(self) -> typing.Any:
        """
        A `libqat.Report`: a TensorReport of each parameter; printable.
        """

    def scale_parameters(self) -> list[tuple[str, torch.Tensor]]:
        """
        (name, float32 [R, G, P]) of each learned scale, in model order: '<weight's key>_scales'.
        """

    def set_calibrating(self, calibrating: bool) -> None:
        """
        While on, every forward pass widens the static activation scales to its activations.
        """

    def set_enabled(self, enabled: bool) -> None:
        """
        Whether forward sees the quantized weights or the float latents.
        """

    @property
    def decoder(self) -> Decoder:
        """
        The Decoder itself.
        """

    @property
    def policy(self) -> Policy:
        """
        Its Policy.
        """

class RoundedTensor:
    """
    What a method that looks at a layer's inputs made of one weight.
    """

    def __init__(
        self, name: str, grid: str, output_error: float, expected_kl: float | None = None
    ) -> None: ...
    def __repr__(self) -> str: ...
    @property
    def expected_kl(self) -> float | None:
        """
        What its error alone is expected to add to the KL divergence to the float model, nats per token; None of tables, and of methods without gradients.
        """

    @property
    def grid(self) -> str:
        """
        Name of its grid.
        """

    @property
    def name(self) -> str:
        """
        state_dict key.
        """

    @property
    def output_error(self) -> float:
        """
        RMS of the error of the layer's outputs over the RMS of its outputs, on the calibration text.
        """

class AwqFold:
    """
    Where AWQ folded a scale of input channels.
    """

    def __repr__(self) -> str: ...
    @property
    def alpha(self) -> float:
        """
        The exponent that was chosen; 0 scales nothing.
        """

    @property
    def error(self) -> float:
        """
        Squared error of the layers' outputs over that without scaling, on the rows measured.
        """

    @property
    def producers(self) -> list[str]:
        """
        Parameters that were divided by it.
        """

    @property
    def weights(self) -> list[str]:
        """
        Weights whose columns were multiplied by it.
        """

class InputMoments:
    """
    Moments of a layer's inputs, summed over calls; N^2 float64 of memory.
    """

    def __init__(self, width: typing.SupportsIndex) -> None: ...
    def add(self, input: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """
        input: floats [..., N]; each of its vectors counts once, or weights[...] times. ArgumentError for another width.
        """

    def magnitude(self) -> torch.Tensor:
        """
        E[|x|], float64[N].
        """

    def second(self) -> torch.Tensor:
        """
        E[x x^T], float64[N, N].
        """

    @property
    def count(self) -> int:
        """
        Vectors added so far.
        """

class InputDrift:
    """
    How far a layer's inputs are from the float model's; N^2 float64 of memory.
    """

    def __init__(self, width: typing.SupportsIndex) -> None: ...
    def add(self, reference: torch.Tensor, input: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """
        reference, input: floats [..., N], the same vectors x* of the float and x of the rounded model; each counts once, or weights[...] times. ArgumentError for another width.
        """

    def mean(self) -> torch.Tensor:
        """
        E[(x* - x) x^T], float64[N, N].
        """

class LayerSensitivity:
    """
    What gradients say of one weight, summed over calls of its layer.
    """

    def __init__(self, tensor: str) -> None: ...
    def add(self, place: typing.SupportsIndex, gradient: torch.Tensor) -> None:
        """
        gradient: floats [..., O] at the outputs of the call at that place. ArgumentError for another count of tokens or outputs.
        """

    def add_lookups(self, gradient: torch.Tensor) -> None:
        """
        gradient: floats [..., N] at the rows of the weight that a call looked up.
        """

    def counts(self) -> bool:
        """
        Whether the loss depends on the layer. NumericError for gradients that are not finite.
        """

    def expect(self, tokens: typing.SupportsIndex) -> int:
        """
        The place of a call with that many tokens, which count for nothing until a gradient is added.
        """

    def lookups(self) -> torch.Tensor | None:
        """
        float64[N, N], what looked-up rows add to E[s x x^T]; None where none were.
        """

    def outputs(self) -> torch.Tensor | None:
        """
        float32[K, S, S], E[g g^T] of groups of outputs; None where rows were looked up, and above 32,768 outputs.
        """

    def tokens(self) -> torch.Tensor:
        """
        float32[tokens] of mean 1, call by call: mean squared gradients over the outputs, clipped at 8 means.
        """

class Lattice:
    """
    The lattice that a tensor's weights lie on; see `libqat.lattice`.
    """

    def __repr__(self) -> str: ...
    @property
    def blocks(self) -> int:
        """
        Blocks in all.
        """

    @property
    def exact(self) -> int:
        """
        Blocks whose weights are exactly code * scale, rounded to the file's type.
        """

    @property
    def rule(self) -> str:
        """
        'consumer': the grid's own rule gives the scales; 'fitted': they were found by fitting; 'none': most blocks lie on no lattice of this grid, and scales are by the rule.
        """

    @property
    def scales(self) -> torch.Tensor:
        """
        float32 [R, G, 1], as learned scales.
        """

    @property
    def worst(self) -> float:
        """
        The largest error of a weight in the other blocks, in steps of its scale.
        """

class Score:
    """
    Means over the predicted tokens of a text.
    """

    def __repr__(self) -> str: ...
    @property
    def kl(self) -> float:
        """
        KL(reference || candidate), nats per token.
        """

    @property
    def nll(self) -> float:
        """
        Negative log-likelihood, nats per token.
        """

    @property
    def perplexity(self) -> float:
        """
        exp(nll).
        """

    @property
    def tokens(self) -> int:
        """
        Predicted tokens.
        """

    @property
    def top1(self) -> float:
        """
        Share of positions whose argmax equals the reference's.
        """

    @property
    def window_kl(self) -> list[float]:
        """
        Mean of each window, for intervals.
        """

    @property
    def window_nll(self) -> list[float]:
        """
        Mean of each window, for intervals.
        """

    @property
    def window_tokens(self) -> list[int]:
        """
        Predicted tokens of each window.
        """

    @property
    def window_top1(self) -> list[float]:
        """
        Mean of each window, for intervals.
        """

class ChoiceScore:
    """
    What one model chose in a multiple-choice test.
    """

    @property
    def accuracy(self) -> float:
        """
        Share of `chosen` that are the answer.
        """

    @property
    def accuracy_norm(self) -> float:
        """
        The same for `chosen_per_byte`.
        """

    @property
    def chosen(self) -> list[int]:
        """
        Per question: index of the greatest log-likelihood.
        """

    @property
    def chosen_per_byte(self) -> list[int]:
        """
        The same after division by the choice's bytes.
        """

    @property
    def log_likelihoods(self) -> list[list[float]]:
        """
        [question][choice], nats.
        """

class TokenData:
    """
    A tokenised text, memory-mapped or in memory.
    """

    @staticmethod
    def from_tensor(tokens: torch.Tensor, vocabulary: typing.SupportsIndex) -> TokenData:
        """
        tokens: int64[n], ids in [0, vocabulary). Copies.
        """

    @staticmethod
    def open(path: os.PathLike | str | bytes) -> TokenData:
        """
        Maps a *.tokens file. FileError naming what is malformed, or the position of an id beyond the vocabulary.
        """

    def __len__(self) -> int: ...
    def batch(
        self,
        index: typing.SupportsIndex,
        batch_size: typing.SupportsIndex,
        length: typing.SupportsIndex,
        seed: typing.SupportsIndex = 0,
    ) -> torch.Tensor:
        """
        The index-th micro-batch of a run, int64[batch_size, length]: windows without replacement within an epoch, in an order that `seed` and the epoch decide.
        """

    def first_windows(
        self,
        batches: typing.SupportsIndex,
        batch_size: typing.SupportsIndex,
        length: typing.SupportsIndex,
        seed: typing.SupportsIndex = 0,
        *,
        most: typing.SupportsIndex,
    ) -> list[int]:
        """
        The windows that the first `batches` micro-batches read, each once, in their order; at most `most`.
        """

    def read(
        self, windows: collections.abc.Sequence[typing.SupportsIndex], length: typing.SupportsIndex
    ) -> torch.Tensor:
        """
        Windows of the text, int64[n, length].
        """

    def tokens(self) -> torch.Tensor:
        """
        All tokens, int64[n].
        """

    def windows(
        self,
        index: typing.SupportsIndex,
        batch_size: typing.SupportsIndex,
        length: typing.SupportsIndex,
        seed: typing.SupportsIndex = 0,
    ) -> list[int]:
        """
        The windows of the text that make up `batch` of the same arguments.
        """

    @property
    def fingerprint(self) -> int:
        """
        64-bit hash of vocabulary and ids.
        """

    @property
    def vocabulary(self) -> int:
        """
        Ids are below it.
        """

class StepReport:
    """
    What one training step did; -1 where nothing was measured.
    """

    def to_json(self) -> str:
        """
        The line of telemetry.jsonl.
        """

    @property
    def clip_rate(self) -> float:
        """
        Share of weights beyond the range of their scale.
        """

    @property
    def dead_codes(self) -> dict[str, float]:
        """
        Grid -> share of its codes that no weight of a tensor has; {} when not measured.
        """

    @property
    def distance_to_grid(self) -> float:
        """
        RMS(w_hat - w) / RMS(w) of the trained quantized weights.
        """

    @property
    def evaluation(self) -> list[Score]:
        """
        Scores of teacher (if any) and student, or nothing when not evaluated.
        """

    @property
    def flip_rate(self) -> float:
        """
        Share of trained codes that differ from the last measurement.
        """

    @property
    def gradient_norm(self) -> float:
        """
        Global, before clipping.
        """

    @property
    def learning_rate(self) -> float:
        """
        Of this step.
        """

    @property
    def loss(self) -> float:
        """
        Mean over the step's predicted tokens, nats.
        """

    @property
    def oscillation(self) -> float:
        """
        Share of codes that also changed the other way than the last time.
        """

    @property
    def probe_kl(self) -> float:
        """
        KL to the teacher, of what would ship, on the first batch that the run does not train on.
        """

    @property
    def probe_kl_start(self) -> float:
        """
        The same before the first step.
        """

    @property
    def scale_drift(self) -> float:
        """
        RMS change of the scales since the start, in units of their field's mean.
        """

    @property
    def seconds_left(self) -> float:
        """
        Until the last step, at the present speed.
        """

    @property
    def step(self) -> int:
        """
        1-based.
        """

    @property
    def steps(self) -> int:
        """
        In all.
        """

    @property
    def tokens_per_second(self) -> float:
        """
        Since `run` began.
        """

class Trainer:
    """
    Trains a PreparedDecoder on token data, resumable bit for bit.

    Args:
        student: a PreparedDecoder; its parameters are trained in place.
        teacher: a Decoder or a function int64[B, T] -> logits; None when the objective needs none. A cheap one is
            `decoder.frozen_copy(torch.bfloat16)`, made before training. Or a TeacherCache.
        data: TokenData.
        run_folder: holds run.json, state.safetensors and telemetry.jsonl; "" keeps everything in memory.
        **options: see `default_options()`, for example steps=100, learning_rate=1e-4,
            objective={"kl": 0.5, "ce": 0.5}, frozen=["model\\\\.embed_tokens"].

    ArgumentError naming the option, or what does not fit together.
    """

    def __init__(
        self,
        student: PreparedDecoder,
        teacher: typing.Any,
        data: TokenData,
        run_folder: os.PathLike | str | bytes = "",
        **kwargs,
    ) -> None: ...
    def request_stop(self) -> None:
        """
        Ends `run` after the step under way, from any thread; the state is saved.
        """

    def resume(self) -> None:
        """
        Continues from the run folder's state. FileError when there is none or it is another run's.
        """

    def run(self, progress: typing.Any = None) -> bool:
        """
        Trains to `steps`. True when finished, False when stopped.

        progress: called with a StepReport after each step; returning False stops. On Ctrl-C, or when progress raises, the
        state is saved and the exception raised. NumericError naming the step for a loss that is not finite.
        """

    def set_evaluation(
        self, tokens: torch.Tensor, *, window: typing.SupportsIndex = 256, batch: typing.SupportsIndex = 4
    ) -> None:
        """
        Held-out tokens int64[n], scored every `eval_every` steps; see `compare`.
        """

    @property
    def step(self) -> int:
        """
        Optimizer steps done.
        """

    @property
    def warnings(self) -> list[str]:
        """
        That the run made the model worse on the probe, and what in telemetry explains it; [] when it did not.
        """

class CacheProgress:
    """
    How far the building of a TeacherCache is.
    """

    @property
    def done(self) -> int:
        """
        Windows that are there.
        """

    @property
    def seconds_left(self) -> float:
        """
        At that speed.
        """

    @property
    def tokens_per_second(self) -> float:
        """
        Of what this call computed.
        """

    @property
    def total(self) -> int:
        """
        Windows that the run needs.
        """

class CacheCheck:
    """
    A cached teacher against the live one.
    """

    @property
    def cached(self) -> float:
        """
        KL to its cached answers: a lower bound.
        """

    @property
    def cosine(self) -> float:
        """
        Between the gradients by the hidden states.
        """

    @property
    def live(self) -> float:
        """
        KL to the teacher itself, nats.
        """

    @property
    def tokens(self) -> int:
        """
        Predicted tokens compared.
        """

class CachePlan:
    """
    The answers that one run needs, and whose they are.

    Args:
        data: TokenData.
        top_k: tokens per position whose log-probability is kept.
        teacher: `fingerprint` of the model that answers.
        **options: of the run, see `default_options()`.
    """

    def __init__(
        self, data: TokenData, top_k: typing.SupportsIndex, teacher: typing.SupportsIndex, **kwargs
    ) -> None: ...
    @property
    def bytes(self) -> int:
        """
        Of a file that holds these answers and no others.
        """

    @property
    def windows(self) -> list[int]:
        """
        Of the text, ascending.
        """

class TeacherCache:
    """
    A teacher's top-k answers on disk, memory-mapped.
    """

    @staticmethod
    def build(
        path: os.PathLike | str | bytes,
        plan: CachePlan,
        teacher: typing.Any,
        data: TokenData,
        progress: typing.Any = None,
        **kwargs,
    ) -> bool:
        """
        Computes what is missing. True when the plan is complete, False when `progress` returned False.

        What was computed stays, also after Ctrl-C or a kill; building again goes on from there.
        """

    @staticmethod
    def missing(path: os.PathLike | str | bytes, plan: CachePlan) -> int:
        """
        Windows of the plan that the file lacks. FileError for a file of another key or kind.
        """

    @staticmethod
    def open(path: os.PathLike | str | bytes, plan: CachePlan) -> TeacherCache:
        """
        Maps the file. FileError when it is malformed, another's, or lacks windows of the plan.
        """

    def answer(
        self, windows: collections.abc.Sequence[typing.SupportsIndex]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        (ids int64[B, T - 1, k], log_p float32[B, T - 1, k + 1]) of windows of the text.
        """

    def check(
        self,
        student: PreparedDecoder,
        teacher: typing.Any,
        data: TokenData,
        batches: typing.SupportsIndex = 2,
        **kwargs,
    ) -> CacheCheck:
        """
        A CacheCheck: the loss of the run's first batches with the live teacher and with this cache.
        """

def activation_bytes(
    config: str,
    sequences: typing.SupportsIndex,
    tokens: typing.SupportsIndex,
    compute_bytes: typing.SupportsIndex,
    fused: bool,
) -> tuple[float, list[float]]:
    """
    Bytes that the decoder of `config` (the text of a config.json) keeps between forward and backward: (outside the layers, [of each layer]). fused: by libqat's row kernels, on a CPU, or by LibTorch's operators.
    """

def apply_awq(
    prepared: PreparedDecoder,
    windows: torch.Tensor,
    *,
    steps: typing.SupportsIndex = 20,
    scale: str = "weighted",
    rows: typing.SupportsIndex = 128,
    batch: typing.SupportsIndex = 8,
    compute_dtype: str = "auto",
    progress: typing.Any = None,
) -> list[AwqFold]:
    """
    AWQ on a prepared decoder; use `libqat.awq`.
    """

def apply_gptq(
    prepared: PreparedDecoder,
    windows: torch.Tensor,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    static_scales: bool = False,
    block: typing.SupportsIndex = 128,
    scale: str = "weighted",
    sweeps: typing.SupportsIndex = 0,
    tokens: collections.abc.Mapping[str, torch.Tensor] = {},
    lookups: collections.abc.Mapping[str, torch.Tensor] = {},
    outputs: collections.abc.Mapping[str, torch.Tensor] = {},
    input_correction: float = 0.0,
    batch: typing.SupportsIndex = 8,
    compute_dtype: str = "auto",
    progress: typing.Any = None,
) -> list[RoundedTensor]:
    """
    GPTQ on a prepared decoder; use `libqat.gptq`.
    """

def apply_guided(
    prepared: PreparedDecoder,
    windows: torch.Tensor,
    *,
    damping: float = 0.1,
    sweeps: typing.SupportsIndex = 4,
    scale: str = "weighted",
    input_correction: float = 0.5,
    seed: typing.SupportsIndex = 0,
    batch: typing.SupportsIndex = 8,
    compute_dtype: str = "auto",
    progress: typing.Any = None,
) -> list[RoundedTensor]:
    """
    Guided rounding of a prepared decoder; use `libqat.guided`.
    """

def apply_lattice(prepared: PreparedDecoder, progress: typing.Any = None) -> list[tuple[str, str, Lattice]]:
    """
    (name, grid, Lattice) of each tensor of a prepared decoder; use `libqat.lattice`.
    """

def apply_weighted_search(
    prepared: PreparedDecoder,
    windows: torch.Tensor,
    *,
    batch: typing.SupportsIndex = 8,
    compute_dtype: str = "auto",
    progress: typing.Any = None,
) -> list[RoundedTensor]:
    """
    Weighted scale search on a prepared decoder; use `libqat.weighted_search`.
    """

def awq_scale(
    weights: collections.abc.Sequence[torch.Tensor],
    grids: collections.abc.Sequence[str],
    hessian: torch.Tensor,
    magnitude: torch.Tensor,
    *,
    steps: typing.SupportsIndex = 20,
    scale: str = "weighted",
    rows: typing.SupportsIndex = 128,
    producer_rows: collections.abc.Sequence[typing.SupportsIndex] = [],
    tensor: str = "",
) -> tuple[torch.Tensor, float, float]:
    """
    AWQ's scale of input channels (arXiv:2306.00978) for weights that read the same input.

    weights: float32[R, N] each, on `grids`; hessian: float[N, N], E[x x^T]; magnitude: float[N], E[|x|].
    producer_rows: [N], inputs of the same row get the same scale. Returns (s float32[N], alpha, squared error of the
    outputs over that without scaling). rows: measured of each weight, 0 for all.
    """

def can_export(
    checkpoint: QuantizedCheckpoint, target: str, *, dtype: str = "", require_exact: bool = False
) -> list[Obstacle]:
    """
    Can the target hold the checkpoint with exactly its numbers?

    Args:
        checkpoint: what `freeze` or `load` returned.
        target: one of `export_targets()`.
        dtype, require_exact: as `export` takes them.

    Returns:
        Every tensor in the way as an `Obstacle`; empty when there is none.

    Raises:
        ArgumentError: unknown target, or a checkpoint that is incomplete.
    """

def cautions(checkpoint: QuantizedCheckpoint, target: str) -> list[Obstacle]:
    """
    What to know of a file before it is written, as Obstacles, by the first tensor that each concerns.

    Tensors that the target's format holds exactly, and that a consumer, in the version that libqat is tested with, does
    not open by itself; and experts that stay float because the format has no place for packed ones. They are written all
    the same. ArgumentError for an unknown target and for a checkpoint that is incomplete.
    """

def check_options(**kwargs) -> typing.Any:
    """
    The options completed by the defaults. ArgumentError naming an unknown or illegal one.
    """

def compare(
    reference: typing.Any,
    candidates: collections.abc.Sequence[typing.Any],
    tokens: torch.Tensor,
    *,
    window: typing.SupportsIndex = 256,
    batch: typing.SupportsIndex = 4,
    progress: typing.Any = None,
) -> list[Score]:
    """
    Scores of a reference model (its own kl 0, top1 1) and of candidates, on the same text in one pass.

    Args:
        reference, candidates: a Decoder, a PreparedDecoder (scored with its quantized weights), or any function
            int64[B, T] -> float logits [B, T, V]. Decoders run without the GIL. Under torch.autocast they compute in its
            dtype; log-probabilities are float32 and sums float64 always.
        tokens: int64[n], n >= 2, cut into windows; each predicts its tokens but the first. The shorter rest counts too.
        window: tokens per window.
        batch: windows per call.
        progress: called with (predicted tokens done, in all) after each batch; returning False stops early.

    Returns 1 + len(candidates) scores, the reference's first. ArgumentError for bad tokens and for logits of another
    shape.
    """

def compute_dtype(name: str = "auto") -> str:
    """
    'float32' or 'bfloat16': what the option compute_dtype means on this CPU. Best for a teacher, too.
    """

def convert_tensor(key: str, tensor: QuantizedTensor, grid: str) -> tuple[QuantizedTensor | None, str]:
    """
    The same weights, bit for bit, on another grid: (tensor, "") or (None, the reason in words).

    Nothing is quantized again; 0 and -0 count as the same number. ArgumentError naming the key for an unknown grid.
    """

def convert_tensors(
    checkpoint: QuantizedCheckpoint, grids: collections.abc.Mapping[str, str]
) -> tuple[QuantizedCheckpoint, dict[str, str]]:
    """
    A checkpoint with some tensors on other grids, the same numbers as before.

    Args:
        checkpoint: what `freeze`, `load` or `import_checkpoint` returned.
        grids: state_dict key -> grid.

    Returns:
        The checkpoint, and for each tensor that its grid cannot hold (it stays as it was) the reason by key.
    """

def default_options() -> typing.Any:
    """
    Every option of `Trainer` with its default, as a dict.
    """

def dequantize(checkpoint: QuantizedCheckpoint) -> dict[str, torch.Tensor]:
    """
    state_dict key -> float32 tensor: what the consumer of the file computes, aliases included.
    """

def expected_kl(errors: torch.Tensor, hessian: torch.Tensor, outputs: torch.Tensor) -> float:
    """
    1/2 sum_k tr(G_k E_k H E_k^T): nats per token that an error of a weight is expected to add to KL.

    errors: float32[R, N], W - W^; hessian: float[N, N], E[u x x^T]; outputs: float32[K, S, S], E[g g^T] of groups of rows.
    """

def export_checkpoint(
    checkpoint: QuantizedCheckpoint,
    path: os.PathLike | str | bytes,
    *,
    target: str,
    tokenizer_from: os.PathLike | str | bytes | None,
    name: str,
    progress: collections.abc.Callable[[int, int], None] | None,
    dtype: str,
    max_shard_bytes: typing.SupportsIndex,
    require_exact: bool,
    overwrite: bool,
) -> None:
    """
    The writer behind `libqat.export`.
    """

def export_targets() -> list[str]:
    """
    The targets that `export` knows.
    """

def find_lattice(weight: torch.Tensor, grid: str, tensor: str = "") -> Lattice:
    """
    The scales for which a tensor's weights are whole steps of a grid, as a Lattice.

    weight: float32 [R, ...] with values of a narrower type, the narrowest of bfloat16, float16 and float32 that holds
    them all: its products are rounded to that type. ArgumentError for a grid without a lattice; NumericError for
    weights that are not finite.
    """

def fingerprint(decoder: Decoder, also: str = "") -> int:
    """
    64-bit hash of all weights, and of what else decides a model's answers.
    """

def freeze_tensors(
    tensors: collections.abc.Sequence[tuple[str, torch.Tensor]],
    grids: collections.abc.Mapping[str, str],
    *,
    scale: str = "reference",
    scale_rules: collections.abc.Mapping[str, str] = {},
    scales: collections.abc.Mapping[str, torch.Tensor] = {},
    config: str = "",
    tokenizer: str = "",
    policy: str = "",
) -> QuantizedCheckpoint:
    """
    A checkpoint of latent tensors.

    Args:
        tensors: (state_dict key, tensor) pairs; a tensor given under several names is stored once, under the first.
        grids: key -> grid; tensors without one stay as they are. Latents on a grid are float32 [R, ...].
        scale: 'reference' or 'search', as in ops.quantize.
        scale_rules: key -> the rule of that tensor, where it is another one.
        scales: key -> its learned scales, where the rule is 'learned'.
        config, tokenizer, policy: see QuantizedCheckpoint.
    """

def generate(
    decoder: Decoder,
    count: typing.SupportsIndex,
    window: typing.SupportsIndex,
    first: torch.Tensor,
    *,
    beginning: typing.SupportsIndex | None = None,
    seed: typing.SupportsIndex = 0,
    progress: typing.Any = None,
) -> torch.Tensor:
    """
    `count` texts that the decoder writes, each a sample at temperature 1: int64[count, window].

    first: int64[n], ids of which each text's first token is drawn evenly, so that the texts are not all of the
    likeliest kind. beginning: a token that stands before it, see `libqat.beginning_of_text`. The same seed gives the
    same text where the logits are the same bits. Computes in autocast's dtype or the decoder's own. progress: called with
    (tokens, of tokens, "writing text").

    ArgumentError unless count and window are positive and there are ids in `first`; NumericError for logits that are not
    finite.
    """

def ggml_pack(
    name: str, codes: numpy.typing.NDArray[numpy.int8], stored: numpy.typing.NDArray[numpy.float32]
) -> numpy.typing.NDArray[numpy.uint8]:
    """
    codes int8[rows, n], stored float32[rows, n / B, P] -> ggml blocks uint8[rows, bytes].
    """

def ggml_unpack(
    name: str, bytes: numpy.typing.NDArray[numpy.uint8]
) -> tuple[numpy.typing.NDArray[numpy.int8], numpy.typing.NDArray[numpy.float32]]:
    """
    The reverse of `ggml_pack`: (codes, stored).
    """

def gptq_tensor(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: str,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    static_scales: bool = False,
    block: typing.SupportsIndex = 128,
    scale: str = "weighted",
    sweeps: typing.SupportsIndex = 0,
    outputs: torch.Tensor | None = None,
    tensor: str = "",
    seq: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rounds a matrix so that its layer errs least on its own inputs (GPTQ, arXiv:2210.17323).

    weight: float32[R, ...] of N weights a row; hessian: float32 or float64[N, N], E[x x^T] of the layer's inputs.
    Returns (latent, scales): encoding `latent`, float32 in the weight's shape, with `scales`, float32[R, G, P], gives
    the method's codes. scale: "reference", "search" or "weighted" (by the hessian's diagonal). act_order: columns
    by falling diagonal; whole blocks of a grid with block scales, unless static_scales takes those from the weights
    as they were. sweeps: of coordinate descent over codes and scales afterwards, in which the errors of rows count
    together where outputs, float32[K, S, S] for groups of S rows, says how. seq: scales tied as the scale rule "seq"
    ties them. NumericError for a hessian that is not positive definite with that damping.
    """

def grid_backward(
    name: str,
    w: numpy.typing.NDArray[numpy.float32],
    s: numpy.typing.NDArray[numpy.float32],
    g: numpy.typing.NDArray[numpy.float32],
    estimator: str,
) -> tuple[numpy.typing.NDArray[numpy.float32], numpy.typing.NDArray[numpy.float32]]:
    """
    (grad_w float32[rows, n], grad_s float32[rows, n / B, P]) of grid_fake_quantize_with, from g = dL/dw_hat.
    """

def grid_choose(
    name: str, w: numpy.typing.NDArray[numpy.float32], scale: str = "reference"
) -> numpy.typing.NDArray[numpy.float32]:
    """
    The consumer's scale rule, or a search. w float32[rows, n] -> s float32[rows, n / B, P].
    """

def grid_choose_backward(
    name: str, w: numpy.typing.NDArray[numpy.float32], grad_s: numpy.typing.NDArray[numpy.float32]
) -> numpy.typing.NDArray[numpy.float32]:
    """
    grad_w float32[rows, n] of grid_choose, from grad_s float32[rows, n / B, P]; UnsupportedError where the rule is a search or rounds.
    """

def grid_decode(
    name: str, codes: numpy.typing.NDArray[numpy.int8], stored: numpy.typing.NDArray[numpy.float32]
) -> numpy.typing.NDArray[numpy.float32]:
    """
    What the consumer computes. codes int8[rows, n], stored -> w_hat float32[rows, n].
    """

def grid_encode(
    name: str, w: numpy.typing.NDArray[numpy.float32], s: numpy.typing.NDArray[numpy.float32]
) -> numpy.typing.NDArray[numpy.int8]:
    """
    The consumer's rounding. w float32[rows, n], s unstored scales -> codes int8[rows, n].
    """

def grid_fake_quantize(
    name: str, w: numpy.typing.NDArray[numpy.float32], reference: bool = False, scale: str = "reference"
) -> numpy.typing.NDArray[numpy.float32]:
    """
    w float32[rows, n] -> w_hat float32[rows, n]; `reference` forces the scalar path.
    """

def grid_fake_quantize_bf16(
    name: str, w: numpy.typing.NDArray[numpy.float32], reference: bool = False, scale: str = "reference"
) -> numpy.typing.NDArray[numpy.uint16]:
    """
    w float32[rows, n] -> bfloat16 bits uint16[rows, n].
    """

def grid_fake_quantize_with(
    name: str,
    w: numpy.typing.NDArray[numpy.float32],
    s: numpy.typing.NDArray[numpy.float32],
    reference: bool = False,
) -> numpy.typing.NDArray[numpy.float32]:
    """
    grid_fake_quantize with unstored scales s float32[rows, n / B, P] that the caller holds.
    """

def grid_holds_seq(name: str) -> bool:
    """
    Whether the scale rule 'seq' is possible: its levels are exact in the grid.
    """

def grid_in_range(
    name: str, w: numpy.typing.NDArray[numpy.float32], s: numpy.typing.NDArray[numpy.float32]
) -> numpy.typing.NDArray[numpy.uint8]:
    """
    1 where w lies inside the code range of scales s. -> uint8[rows, n].
    """

def grid_info(name: str) -> dict:
    """
    What a grid is: name, bits, block (None: a row, or the tensor where whole_tensor), code_min, code_max, fields as (name, count per block, dtype), scale_grids and dequant_dtypes (the values that options behind this name may have), is_float, dtype (float grids).
    """

def grid_names() -> list[str]:
    """
    Every grid's name, float grids first.
    """

def grid_row_bytes(name: str, n: typing.SupportsIndex) -> int:
    """
    Bytes of one row of n weights: packed codes and stored scales.
    """

def grid_store(
    name: str, s: numpy.typing.NDArray[numpy.float32], n: typing.SupportsIndex
) -> numpy.typing.NDArray[numpy.float32]:
    """
    What a file holds of s float32[rows, n / B, P]; NumericError where that is not finite.
    """

def grid_tensor_bytes(name: str, rows: typing.SupportsIndex, n: typing.SupportsIndex) -> int:
    """
    Bytes of a tensor of that many rows of n weights, a scale that they all share included.
    """

def has_lattice(grid: str) -> bool:
    """
    Whether the grid has one scale per block and levels code * scale around 0.
    """

def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    grid: str = "f32",
    estimator: str = "ste",
    scale: str = "reference",
    teacher: tuple[torch.Tensor, torch.Tensor] | None = None,
    kl: float = 1.0,
    ce: float = 0.0,
    temperature: float = 1.0,
    reverse_kl: float = 0.0,
    jsd: float = 0.0,
    jsd_alpha: float = 0.5,
    cakld: float = 0.0,
    cakld_beta: float = -1.0,
    chunk: typing.SupportsIndex = 0,
) -> torch.Tensor:
    """
    objective_loss of the logits hidden @ W_hat^T + bias, which never exist in full.

    Args:
        hidden: float [B, T, h], what goes into the head.
        weight: float [V, h], the head's latent; `grid`, `estimator` and `scale` say how it is quantized.
        tokens: int64[B, T], T >= 2.
        teacher: (hidden [B, T, h'], weight [V, h']), constant, or None when no term needs it.
        chunk: positions whose logits exist at a time; 0 = equal pieces of at most 2^24 logits.

    The terms of the loss are those of `objective_loss`. The gradients of hidden, weight and bias are formed in the forward pass.
    """

def import_checkpoint(path: os.PathLike | str | bytes) -> QuantizedCheckpoint:
    """
    Reads an exported file or folder, or a checkpoint file, as a checkpoint.

    The codes and scales are exactly those of the file, so that training can take them up again; the configuration
    is kept, and the tokenizer that the file holds.

    Raises:
        UnsupportedError: a kind of file that holds no codes or cannot be read back.
        FileError: a malformed file; the message names file and tensor.
    """

def input_correction(
    hessian: torch.Tensor, drift: torch.Tensor, *, share: float, damping: float, tensor: str = ""
) -> torch.Tensor:
    """
    share * E[(x* - x) x^T] (H + damping)^-1, float32[N, N]: added to the identity, what rows of a weight are multiplied by so that they make up for their inputs' drift.
    """

def learning_rate_at(step: typing.SupportsIndex, **kwargs) -> float:
    """
    The learning rate of step 1, 2, ... under the given options.
    """

def left_out(checkpoint: QuantizedCheckpoint, target: str) -> list[str]:
    """
    Static activation scales that the target has no place for, so that its files lack them.

    What the consumer does with activations is then its own affair. ArgumentError for an unknown target.
    """

def load(path: os.PathLike | str | bytes) -> QuantizedCheckpoint:
    """
    Reads and validates a *.qat.safetensors file. FileError naming file and tensor.
    """

def load_checkpoint(path: os.PathLike | str | bytes) -> LoadedModel:
    """
    The decoder with the dequantized numbers of a *.qat.safetensors, for scoring what ships.
    """

def load_model(path: os.PathLike | str | bytes) -> LoadedModel:
    """
    Reads a Hugging Face folder (config.json and safetensors) or a GGUF file into a LoadedModel. FileError listing every missing, unknown or misshapen tensor; UnsupportedError for what the decoder lacks.
    """

def log_likelihoods(
    model: typing.Any,
    continuations: collections.abc.Sequence[
        tuple[collections.abc.Sequence[typing.SupportsIndex], typing.SupportsIndex]
    ],
    *,
    max_length: typing.SupportsIndex = 2048,
    batch_tokens: typing.SupportsIndex = 1024,
    progress: typing.Any = None,
) -> list[float]:
    """
    log p(continuation | context), nats, of token ids.

    Args:
        model: a Decoder, a PreparedDecoder (with its quantized weights), or any function int64[B, T] -> float
            logits [B, T, V] of a causal model. For decoders logits exist only at scored positions.
        continuations: (tokens, context) pairs: the first `context` tokens are given, the others scored.
        max_length: longest input; longer contexts lose their beginning.
        batch_tokens: B * T of a call at most, padding included; a single long row may exceed it.
        progress: called with continuations done and in all.

    ArgumentError for an empty context or continuation, for ids out of range, and for logits of another shape.
    """

def loss_rows(
    chunk: typing.SupportsIndex, rows: typing.SupportsIndex, vocabulary: typing.SupportsIndex
) -> int:
    """
    Rows of logits that `head_loss` makes at a time, for `rows` predicted positions; chunk: its own.
    """

def mean_interval(
    values: collections.abc.Sequence[float],
    weights: collections.abc.Sequence[float] | None = None,
    *,
    resamples: typing.SupportsIndex = 10000,
    seed: typing.SupportsIndex = 0,
) -> tuple:
    """
    (low, high): the 95 % percentile bootstrap interval of a weighted mean; NaN for a single value.

    For the difference of two models pass the differences of their values, item by item.
    """

def mixed(parts: collections.abc.Sequence[torch.Tensor], seed: typing.SupportsIndex = 0) -> torch.Tensor:
    """
    Windows of several sources, each int64[n, T], in one order without a pattern, so that each batch has some of all. A single source stays as it is.
    """

def needs_teacher(**kwargs) -> bool:
    """
    Whether the objective of these options compares with a teacher.
    """

def objective_loss(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    tokens: torch.Tensor,
    *,
    kl: float = 1.0,
    ce: float = 0.0,
    temperature: float = 1.0,
    reverse_kl: float = 0.0,
    jsd: float = 0.0,
    jsd_alpha: float = 0.5,
    cakld: float = 0.0,
    cakld_beta: float = -1.0,
) -> torch.Tensor:
    """
    The trainer's loss, differentiable, for loops of your own: a scalar over predicted positions.

    Args:
        student: float logits [B, T, V]; its gradient is computed in the forward pass, without a float32 copy of the logits.
        teacher: float logits [B, T, V], constant, or None when no term needs it.
        tokens: int64[B, T], T >= 2.
        kl: weight of temperature^2 * KL(teacher || student) at `temperature`.
        ce: weight of the cross-entropy with the next token.
        reverse_kl: weight of temperature^2 * KL(student || teacher).
        jsd: weight of the divergence from the mix jsd_alpha * teacher + (1 - jsd_alpha) * student.
        cakld: weight of cakld_beta * reverse + (1 - cakld_beta) * forward KL; a cakld_beta of -1 is the teacher's mean probability of the next tokens.
    """

def outline(
    tensors: collections.abc.Sequence[tuple[str, str, collections.abc.Sequence[typing.SupportsIndex]]],
    policy: Policy,
    dtype: torch.dtype,
    config: str = "",
) -> QuantizedCheckpoint:
    """
    The checkpoint of a model that is not in memory: shapes, and no numbers.

    Args:
        tensors: as `Policy.resolve` takes them, names with their trailing ".weight"; those of kind "other" stay float.
        policy: what is on which grid.
        dtype: torch dtype of what stays float.
        config: the model's configuration as JSON.

    Errors as `Policy.resolve`; ArgumentError for a name given twice.
    """

def parameter_shapes(config: str) -> list:
    """
    config: the text of a config.json -> (name, shape, kind of layer, whether a buffer) of each tensor of its decoder, without memory for any.
    """

def plan_export(
    checkpoint: QuantizedCheckpoint, target: str, dtype: str = "bfloat16"
) -> tuple[list[FileTensor], list[Obstacle]]:
    """
    What `export` would write, from shapes alone: the checkpoint may come from `outline`.

    Args:
        checkpoint: with or without numbers.
        target: one of `export_targets()`.
        dtype: of the folders' unquantized tensors.

    Returns:
        (FileTensor of each tensor, Obstacle of each that the target refuses). A tensor on a grid of another consumer is
        planned on the target's first grid for it.

    Raises:
        ArgumentError: unknown target or dtype, or a model that is incomplete.
    """

def prepare_decoder(decoder: Decoder, policy: Policy) -> PreparedDecoder:
    """
    Attaches a Policy to a Decoder, in place. ArgumentError for a rule that matches nothing and for widths that a grid's block does not divide, naming the tensor.
    """

def read_gguf_header(path: os.PathLike | str | bytes, *, full: bool = False) -> dict:
    """
    What a GGUF file declares: {"version", "alignment", "metadata": {key: value}, "types": {key: type},
    "tensors": [{"name", "type", "shape", "offset", "bytes"}]}, in file order.

    Shapes are in torch's order (outermost first), offsets in bytes from the start of the file. An array of more than 8
    elements is given as {"length", "first"} unless `full`. Raises FileError when the file is missing or malformed.
    """

def read_safetensors_header(path: os.PathLike | str | bytes) -> dict:
    """
    What a safetensors file declares: {"metadata": {key: text}, "tensors": [{"name", "dtype", "shape",
    "offset", "bytes"}]}, in the order of the data.

    Offsets are in bytes from the start of the file. Raises FileError when the file is missing or malformed.
    """

def recommended(policy: Policy) -> Recipe:
    """
    The settings that came out best for the policy's grids, see docs/quality.md.

    `libqat.finetune.start` and `libqat finetune` use them for what they are not told. A policy of the user's own that
    names an estimator keeps it, and starts from "none" unless its scales are learned.
    """

def removed(
    reference: Score,
    quantized: Score,
    trained: Score,
    *,
    resamples: typing.SupportsIndex = 10000,
    seed: typing.SupportsIndex = 0,
) -> dict:
    """
    {"kl", "kl_interval", "nll", "nll_interval"}: shares of the cost of quantization that training removed.

    1 - cost(trained) / cost(quantized), for the KL and for the loss above the reference's, from three Scores of
    one `compare`. Numerator and denominator share their resampled windows. An interval is NaN when the quantized
    model's cost is not positive in every resample.
    """

def report_tensor(
    name: str,
    kind: str,
    latent: torch.Tensor,
    grid: str,
    scale: str = "reference",
    scales: torch.Tensor | None = None,
    input: str = "",
    output: str = "",
) -> TensorReport:
    """
    The TensorReport of one tensor; grid 'f32' keeps it. scales: the learned ones, for the rule 'learned'. input, output: formats of activations.
    """

def requantization_report(checkpoint: QuantizedCheckpoint, dtype: str = "float32") -> list[Requantization]:
    """
    Does quantizing the dequantized weights again give back the trained codes and scales?

    Programs that take float weights and quantize them by themselves find each block's scale from its weights. They
    find the trained one only if, for example, a Q4_0 block uses its code -8.

    Args:
        checkpoint: what `freeze` or `load` returned.
        dtype: "float32", "float16" or "bfloat16": the type in which the weights are handed over.

    Returns:
        One `Requantization` for each quantized tensor, by key.

    Raises:
        ArgumentError: another dtype.
        NumericError: a weight beyond the dtype's range; the message names tensor and row.
    """

def resampled_means(
    series: collections.abc.Sequence[collections.abc.Sequence[float]],
    weights: collections.abc.Sequence[float] | None = None,
    *,
    resamples: typing.SupportsIndex = 10000,
    seed: typing.SupportsIndex = 0,
) -> torch.Tensor:
    """
    Paired bootstrap: weighted means of several series over the same items, for statistics of your own.

    Args:
        series: S sequences of n values; item i of each belongs to the same window, question or image.
        weights: n positive numbers, by default all 1.
        resamples: how often n items are drawn with replacement, the same ones for each series.
        seed: the same seed gives the same draws on each machine.

    Returns float64 [S, resamples].
    """

def sample(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """
    An id for each row of logits[n, V] with its probability, int64[n].

    uniform: float64[n], evenly drawn from [0, 1): one number a row, where multinomial draws one for each id. ArgumentError
    for other shapes and dtypes; NumericError for logits that are not finite.
    """

def save(checkpoint: QuantizedCheckpoint, path: os.PathLike | str | bytes) -> None:
    """
    Writes a *.qat.safetensors file; it appears whole or not at all. The same checkpoint gives the same bytes.
    """

def score_choices(
    model: typing.Any,
    questions: collections.abc.Sequence[
        tuple[
            collections.abc.Sequence[
                tuple[collections.abc.Sequence[typing.SupportsIndex], typing.SupportsIndex]
            ],
            collections.abc.Sequence[typing.SupportsIndex],
            typing.SupportsIndex,
        ]
    ],
    *,
    max_length: typing.SupportsIndex = 2048,
    batch_tokens: typing.SupportsIndex = 1024,
    progress: typing.Any = None,
) -> ChoiceScore:
    """
    A ChoiceScore of token ids; `libqat.compare_choices` takes text.

    Args:
        model, max_length, batch_tokens, progress: as `log_likelihoods`.
        questions: (choices, bytes, answer) each: the choices as (tokens, context) pairs, the UTF-8 length of each
            choice's text, and the index of the right one.
    """

def score_intervals(
    scores: collections.abc.Sequence[Score],
    *,
    resamples: typing.SupportsIndex = 10000,
    seed: typing.SupportsIndex = 0,
) -> list:
    """
    {"ppl", "nll", "kl", "top1": (low, high)} per Score of one `compare`.

    95 % bootstrap intervals over windows weighted by their tokens; NaN for a text of a single window.
    """

def sensitivity(
    prepared: PreparedDecoder,
    windows: torch.Tensor,
    *,
    seed: typing.SupportsIndex = 0,
    batch: typing.SupportsIndex = 2,
    compute_dtype: str = "auto",
    progress: typing.Any = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    How much each token of a calibration text counts for each linear layer of a prepared decoder.

    windows: int64[n, T]. Returns three dicts. The first: weight name -> float32[n, T] of mean 1, the mean over the layer's
    outputs of their squared gradients, under the float model's cross-entropy with labels that it draws itself, clipped at
    8 means. The second: name of a table that is also the head -> float64[N, N], the curvature of the place where its rows
    are looked up, as it adds to E[s x x^T] of the head's inputs x. The third: weight name -> float32[K, S, S], the mean
    product of the gradients at outputs k S .. k S + S - 1.
    """

def seq_untie(scales: torch.Tensor, grid: str, tensor: str = "") -> torch.Tensor:
    """
    The free parameters float32[R, G, F] that `libqat.ops.seq_tie` takes to scales float32[R, G, P]. ArgumentError for scales that it cannot give.
    """

def share_removed(quantized: float, trained: float) -> float:
    """
    Share of a quantization loss that training won back: 1 - trained / quantized; NaN when `quantized` is not positive.
    """

def take_up(prepared: PreparedDecoder, checkpoint: QuantizedCheckpoint) -> None:
    """
    A checkpoint's numbers as those of a prepared decoder; use `libqat.take_up`.
    """

def verify(path: os.PathLike | str | bytes, checkpoint: QuantizedCheckpoint) -> list[Difference]:
    """
    Reads an exported file or folder (or a checkpoint file) by its consumer's rule, and compares it bit for bit.

    Returns:
        A list of `Difference`; empty when the file holds exactly the checkpoint's numbers.
    """

def weighted_search_tensor(
    weight: torch.Tensor, importance: torch.Tensor, grid: str, *, tensor: str = "", seq: bool = False
) -> torch.Tensor:
    """
    Scales float32[R, G, P] of least squared error, each weight counted by its column's importance[N]. seq: tied as the scale rule 'seq' ties them.
    """

def write_tokens(
    path: os.PathLike | str | bytes, tokens: torch.Tensor, vocabulary: typing.SupportsIndex
) -> None:
    """
    Writes a *.tokens file; it appears whole or not at all. tokens: int64[n], ids in [0, vocabulary).
    """

__version__: str = "0.1.0"
