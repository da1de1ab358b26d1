"""Which argument of a method holds its key-value cache.

It is `cache` from transformers 5.24 on, `past_key_values` before and in models that bring their own code.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

#: What transformers calls the argument that holds a cache, and the field that returns it; newest first.
CACHE_NAMES = ("cache", "past_key_values")


def cache_name(parameters: Collection[str]) -> str | None:
    """Returns which parameter of a method holds its cache; None if it takes none."""
    return next((name for name in CACHE_NAMES if name in parameters), None)


def under_name(name: str | None, inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns the inputs of a call with the cache under the name that the method gives it.

    Args:
        name: `cache_name` of the method that gets them.
        inputs: Inputs by name; the cache may have any of `CACHE_NAMES`.

    Raises:
        ValueError: If two caches came.
    """
    others = [other for other in CACHE_NAMES if other != name and other in inputs]
    if name is None or not others:
        return inputs
    given = [inputs[each] for each in CACHE_NAMES if inputs.get(each) is not None]
    if any(each is not given[0] for each in given):
        raise ValueError(f"{name}: needs one cache; another came as {', '.join(others)}. Pass {name} alone.")
    rest = {each: value for each, value in inputs.items() if each not in CACHE_NAMES}
    return rest | {name: given[0] if given else None}
