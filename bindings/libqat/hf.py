"""Hugging Face's `Trainer` with libqat's default objective. Needs `transformers` and `accelerate`.

A prepared model trains unchanged in an ordinary `Trainer` too, then with the model's own loss.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own spelling)
from transformers import Trainer

from ._core import ArgumentError, UnsupportedError, objective_loss
from .nn import FLOAT

__all__ = ["DistillationTrainer"]

_IGNORED = -100
"""The label of tokens that are no target, by Hugging Face's convention."""


class DistillationTrainer(Trainer):
    """A `Trainer` of causal language models that minimises KL to a float teacher instead of cross-entropy.

    loss = kl * temperature^2 * KL(teacher || student at `temperature`) + ce * cross-entropy: the mean over
    the tokens that `labels` does not mask (-100), over the whole accumulated batch when there are several
    micro-batches. `evaluate()` reports the same loss, on the evaluation data.

    teacher: the float model, which is not trained: a deepcopy made before `prepare`, or the folder loaded
    twice. A prepared model with quantization off is none, because its latents move. It is set to eval mode,
    moved to the trainer's device, and runs under the trainer's mixed precision.
    The other arguments are Trainer's. `labels` must be in each batch; the model is called without them.

    >>> teacher = copy.deepcopy(model)
    >>> libqat.prepare(model, "gguf-q4_0")
    >>> DistillationTrainer(model, args, train_dataset=data, teacher=teacher).train()
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module,
        kl: float = 1.0,
        ce: float = 0.0,
        temperature: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._check(teacher)
        self.objective = {"kl": kl, "ce": ce, "temperature": temperature}
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)

    def _check(self, teacher: nn.Module) -> None:
        if self.compute_loss_func is not None or self.label_smoother is not None:
            raise ArgumentError(
                "DistillationTrainer: expected no compute_loss_func and no label_smoothing_factor: the loss "
                "is set by kl, ce and temperature"
            )
        if self.args.n_gpu > 1:
            raise UnsupportedError(
                f"DistillationTrainer: expected one device per process, got {self.args.n_gpu} in "
                "nn.DataParallel: start it with torchrun or accelerate launch"
            )
        trained = {id(parameter) for parameter in self.model.parameters()}
        for name, module in teacher.named_modules():
            if type(module) in FLOAT or any(id(p) in trained for p in module.parameters(recurse=False)):
                raise ArgumentError(
                    f"DistillationTrainer: teacher: {name or 'model'}: expected a float model of its own, "
                    "got a prepared one or the student's own weights: copy the model before prepare"
                )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The objective of one micro-batch; see Trainer.compute_loss."""
        if "labels" not in inputs:
            raise ArgumentError(
                f"DistillationTrainer: expected labels in each batch, got {', '.join(inputs)}: use "
                "DataCollatorForLanguageModeling(tokenizer, mlm=False)"
            )
        labels = inputs["labels"]
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**inputs)
        with torch.no_grad(), self.accelerator.autocast():
            expected = self.teacher(**inputs, use_cache=False).logits
        loss, count = self._mean_loss(outputs.logits, expected, labels)
        if num_items_in_batch is not None:
            loss = loss * (count / num_items_in_batch)
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _mean_loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """The mean over the predicted tokens and their number. Logits [B, T, V], labels int64[B, T]."""
        targets = labels[:, 1:]
        predicted = targets != _IGNORED
        count = int(predicted.sum())
        if count == 0:
            return 0.0 * student.sum(), 0
        tokens = labels.clamp_min(0)
        if count < predicted.numel():
            # the predicted positions as one sequence; its last position predicts nothing
            position = F.pad(predicted, (0, 1)).flatten().nonzero().flatten()
            position = torch.cat([position, position[-1:]])
            student = student.flatten(0, 1).index_select(0, position)[None]
            teacher = teacher.flatten(0, 1).index_select(0, position)[None]
            tokens = F.pad(targets[predicted], (1, 0))[None]
        return objective_loss(
            student, teacher if self.objective["kl"] else None, tokens, **self.objective
        ), count
