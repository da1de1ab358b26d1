"""Names of a package that are imported when they are first used, so that importing the package is quick."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazily(
    package: str, exports: Mapping[str, str], first: str | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__getattr__` and `__dir__` of a package.

    Imports under `TYPE_CHECKING` say the same to type checkers.

    Args:
        package: Name of the package.
        exports: By public name, the module that defines it.
        first: A module that is imported before any of them.
    """

    def get(name: str) -> Any:
        if name not in exports:
            known = ", ".join(sorted(exports))
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {known}")
        if first is not None:
            importlib.import_module(first)
        return getattr(importlib.import_module(exports[name]), name)

    return get, lambda: sorted(exports)
