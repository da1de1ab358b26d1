"""Messages of other libraries about which a user of the command can do nothing."""

from __future__ import annotations

import logging
import warnings


def silence() -> None:
    """Drops PyTorch's warnings about enums of torchao, and transformers' about a method that PEFT calls.

    PEFT imports torchao wherever it is installed. The filter is on the logger of one module of PyTorch, by
    name, so that PyTorch is not imported for it.
    """
    logging.getLogger("torch.utils._pytree").addFilter(_is_not_about_torchao)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def _is_not_about_torchao(record: logging.LogRecord) -> bool:
    about = record.args[0] if isinstance(record.args, tuple) and record.args else None
    return not getattr(about, "__module__", "").startswith("torchao.")
