"""Stage one in the `Trainer` of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from toast.objectives import pretraining_loss


class PretrainingTrainer(Trainer):
    """A `Trainer` that minimises `toast.pretraining_loss`: the task loss of both passes + reconstruction.

    Evaluation reports the task loss of the model as it is used, that of the second pass. The parts of the
    training loss are logged beside it.

    Args:
        *args: As of `Trainer`; the model is a wrapped one.
        task_loss: Maps outputs and labels (`labels` of the batch) to a scalar loss, the batch's mean. None
            takes the model's own loss.
        **kwargs: As of `Trainer`.
    """

    def __init__(
        self, *args: Any, task_loss: Callable[[Any, Tensor], Tensor] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.task_loss = task_loss
        if task_loss is not None:
            self.label_names = ["labels"]  # which the Trainer finds in the signatures of its own models alone
        self.parts: dict[str, Tensor] = {}
        # The loss is a mean of the batch, which the Trainer divides by the number of accumulated ones.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Returns the loss of a batch; in evaluation mode that of the task alone, with outputs if wanted."""
        inputs, loss_of = dict(inputs), self.task_loss
        labels: Any = None if loss_of is None else inputs.pop("labels")

        def task_loss(outputs: Any) -> Any:
            return outputs.loss if loss_of is None else loss_of(outputs, labels)

        if model.training:
            loss, self.parts = pretraining_loss(model, task_loss=task_loss, **inputs)
            return loss
        outputs = model(**inputs)
        loss = task_loss(outputs)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs the parts of the last batch's loss, too."""
        if "loss" in logs:
            logs = logs | {name: float(part) for name, part in self.parts.items()}
        super().log(logs, *args, **kwargs)
