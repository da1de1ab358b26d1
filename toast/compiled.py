"""What is compiled of a model, and calls of it that are not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

#: Name under which `torch.compile(module)` holds the module.
COMPILED = "_orig_mod"


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled by itself, by `module.compile()` or `torch.compile(module)`."""
    return getattr(module, "_compiled_call_impl", None) is not None or COMPILED in module._modules


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Makes the calls within run as they are written: who looks into a call sees nothing of a compiled one.

    Where something of the model is compiled, nothing that is compiled runs meanwhile, in any thread.
    """
    compiled = "torch._dynamo" in sys.modules and any(map(is_compiled, model.modules()))
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


def is_transformed() -> bool:
    """Whether tensors stand for others, traced or mapped by `torch.func`, and cannot be looked at."""
    if torch.compiler.is_compiling():
        return True
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return traced or torch._C._are_functorch_transforms_active()
