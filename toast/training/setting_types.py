"""What a setting may be: numbers and names."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field


def _number(value: Any) -> Any:
    """Refuses yes and no, which Python counts as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"needs a number; got {str(value).lower()}")  # noqa: TRY004 - pydantic's way
    return value


def as_precision(value: Any) -> Any:
    """Takes the word `no`, which YAML reads as false."""
    return "no" if value is False else value


def _file_name(value: str) -> str:
    """Refuses what names no folder within another."""
    if value in ("", ".", "..") or value.startswith("~") or any(sign in value for sign in "/\\\0\n"):
        raise ValueError(f"needs the name of a folder, without a path; got {value!r}. Paths are for out")
    if len(value.encode(errors="replace")) > 200:
        raise ValueError(f"needs a name of at most 200 bytes; got {value!r}")
    return value


Integer = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Name = Annotated[str, AfterValidator(_file_name)]

#: Of a section of settings: a name that is not there is an error.
SECTION = ConfigDict(extra="forbid", validate_default=True)
