"""Where a steered language model looks, over text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toast.lazy import lazily

_EXPORTS = {
    "TextAttentionMaps": "toast.visual.text.looking",
    "as_terminal": "toast.visual.text.terminal",
    "look_at_text": "toast.visual.text.looking",
}

__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from toast.visual.text.looking import TextAttentionMaps as TextAttentionMaps
    from toast.visual.text.looking import look_at_text as look_at_text
    from toast.visual.text.terminal import as_terminal as as_terminal

__getattr__, __dir__ = lazily(__name__, _EXPORTS)
