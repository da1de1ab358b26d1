"""Settings of the measurement of generated answers."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, Field, field_validator

from toast.training.method_table import METHODS
from toast.training.setting_types import SECTION, Integer


class FormatConfig(BaseModel):
    r"""A format that generated answers have to keep; measured on the test split.

    Args:
        pattern: Regular expression that a whole answer has to match, such as `- .+(\n- .+)+` for a list.
        max_new_tokens: Where an answer is cut off; one that has not ended by then does not keep the format.
        limit: Only so many answers, spread over the split; None takes all.
    """

    model_config = SECTION

    pattern: str
    max_new_tokens: Annotated[Integer, Field(gt=0)] = 128
    limit: Annotated[Integer, Field(gt=0)] | None = 100

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, given: str) -> str:
        try:
            re.compile(given)
        except re.error as error:
            raise ValueError(f"needs a regular expression; {given!r} is none: {error}") from error
        return given


def refuse_unanswered(task: str, source: str, packing: str, method: str) -> None:
    """Refuses settings with which no answers can be generated.

    Raises:
        ValueError: If the task is not language, rows have no prompt of their own, or the method's `generate`
            is refused.
    """
    if task != "language":
        raise ValueError("evaluation.format: for language; the task is vision")
    if source == "text" or packing != "none":
        raise ValueError(
            "evaluation.format: needs rows of one prompt and its answer: data.packing none, and a source of "
            f"instructions or conversations; got packing {packing} and source {source}"
        )
    if not METHODS[method].generates:
        raise ValueError(f"evaluation.format: PEFT generates wrongly from the prompts of {method}")
