"""What a row says: a text, an instruction with its answer, or the turns of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from toast.data.language.row_files import Row
from toast.files.plain_text import half_pair

Form = Literal["text", "alpaca", "sharegpt", "messages"]
Message = dict[str, str]
"""A turn as transformers' chat templates take it: `role` and `content`."""

ROLES: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Names of roles in ShareGPT files and in messages, and what templates call them."""
CONVERSATION_FIELDS: Final[dict[Form, str]] = {"sharegpt": "conversations", "messages": "messages"}
"""The field that holds the turns."""


def guess_form(row: Row, text_field: str) -> Form:
    """Returns the form of a row by the fields that it has; turns come before a text made of them.

    Raises:
        ValueError: If it has those of no form.
    """
    fields = row.fields.keys()
    for form, field in CONVERSATION_FIELDS.items():
        if field in fields:
            return form
    if {"instruction", "output"} <= fields:
        return "alpaca"
    if text_field in fields:
        return "text"
    raise ValueError(
        f"{row.place}: needs one of the fields {text_field!r}, 'messages', 'conversations', or 'instruction' "
        f"with 'output'; it has {_names(row)}. Name the text's field with text_field."
    )


def text_of(row: Row, text_field: str) -> str:
    """Returns the text of a row.

    Raises:
        ValueError: If the field is not there or no string.
    """
    return _string(row, row.fields, text_field, " Name the text's field with text_field.")


def instruction_of(row: Row) -> tuple[str, str, str]:
    """Returns instruction, input (empty if there is none) and output of a row in Alpaca's form.

    Raises:
        ValueError: If one is not there or no string.
    """
    given = row.fields.get("input")  # left out, or null, where the instruction needs none
    more = _string(row, row.fields, "input") if given is not None else ""
    return _string(row, row.fields, "instruction"), more, _string(row, row.fields, "output")


def conversation_of(row: Row, field: str) -> list[Message]:
    """Returns the turns of a conversation, as `from` and `value` or as `role` and `content`.

    A `system` field beside the turns, as some ShareGPT files have it, becomes the first turn.

    Raises:
        ValueError: If there are none, one is malformed, or the first after the system's is an answer.
    """
    turns = row.fields.get(field)
    if field not in row.fields or not isinstance(turns, list):
        came = f"a {type(turns).__name__}" if field in row.fields else f"a row with {_names(row)}"
        raise ValueError(f"{row.place}: needs a list of turns in field {field!r}; got {came}.")
    messages = [_message(row, number, turn) for number, turn in enumerate(turns, 1)]
    system = row.fields.get("system")
    if isinstance(system, str) and system and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": system})
    spoken = [message for message in messages if message["role"] != "system"]
    if not spoken:
        raise ValueError(f"{row.place}: the conversation is empty; it needs a question and an answer.")
    if spoken[0]["role"] != "user":
        raise ValueError(
            f"{row.place}: the conversation starts with an answer; its first turn must be the user's. "
            "Leave that turn out."
        )
    return messages


def _message(row: Row, number: int, turn: Any) -> Message:
    place = f"{row.place}, turn {number}"
    if not isinstance(turn, Mapping):
        raise ValueError(  # noqa: TRY004, what is wrong is a file
            f"{place}: needs an object with role and content; got {type(turn).__name__}."
        )
    role_field, content_field = ("from", "value") if turn.get("from") is not None else ("role", "content")
    at = Row(place, turn)
    role, content = _string(at, turn, role_field), _string(at, turn, content_field)
    if role not in ROLES:
        raise ValueError(f"{place}: the role must be one of {', '.join(ROLES)}; got {role!r}.")
    if turn.get("tool_calls"):
        raise ValueError(f"{place}: tool calls cannot be trained on; leave the conversation out.")
    return {"role": ROLES[role], "content": content}


def _string(row: Row, fields: Mapping[str, Any], name: str, advice: str = "") -> str:
    if name not in fields:
        raise ValueError(f"{row.place}: needs a field {name!r}; it has {_names(row)}.{advice}")
    value = fields[name]
    if not isinstance(value, str):
        raise ValueError(  # noqa: TRY004, what is wrong is a file
            f"{row.place}: field {name!r} needs a string; got {type(value).__name__}: {str(value)[:40]}"
        )
    if half := half_pair(value):
        raise ValueError(
            f"{row.place}: field {name!r} holds half of a surrogate pair, which is no character ({half}): a "
            "text was cut within an emoji, or written wrongly. Leave it out."
        )
    return value


def _names(row: Row) -> str:
    return ", ".join(map(repr, row.fields)) or "no fields"
