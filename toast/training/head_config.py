"""Settings of one head: what kind of target it has, and what its loss counts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from toast.training.setting_types import SECTION, Positive


class HeadConfig(BaseModel):
    """A head, under the name that its figures have.

    Args:
        kind: A key of `toast.training.answer_kinds.KINDS`.
        columns: Where its targets stand in the data: columns of a list, fields of a row. None is the column
            of the head's name. Of `regression` several make a vector.
        weight: Factor of its loss.
        loss: Of `regression`: `mse` or `huber`, of targets in standard deviations of the training split.
    """

    model_config = SECTION

    kind: Literal["classes", "regression", "multilabel"]
    columns: Annotated[list[str], Field(min_length=1)] | None = None
    weight: Positive = 1.0
    loss: Literal["mse", "huber"] | None = None
