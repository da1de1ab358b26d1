"""Generation keeps two key-value caches, one a pass, as one `Cache` object of transformers.

The layers of the first pass stand behind those of the second in the same object's list. Whatever generation
does to a cache (reordering for beams, cropping for assisted decoding, repeating, resetting), it does to every
layer of the list, and so to both passes alike.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import Cache

    from toast.steering import Steering

_MARK = "_toast_adapter"


def pass_caches(steering: Steering, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits the inputs of a trunk into those of the first and those of the second pass.

    The first pass gets a cache of its own, asks for no extra outputs and only takes what its method knows.

    Args:
        steering: The wrapped model's parts.
        inputs: Inputs of the call by name.

    Returns:
        The inputs of the first and of the second pass.

    Raises:
        TypeError: If `past_key_values` is no cache of transformers.
        ValueError: If the cache cannot serve two passes, or was filled by another model or adapter.
    """
    trunk = steering.trunk
    method = trunk.__dict__[steering.family.methods[0]]
    known = method.__signature__.parameters
    takes_more = any(p.kind is p.VAR_KEYWORD for p in known.values())
    first = {name: value for name, value in inputs.items() if takes_more or name in known}
    first = {name: value for name, value in first.items() if not name.startswith("output_")}
    config: Any = getattr(trunk, "config", None)
    if "past_key_values" not in known or not _decodes(steering.family.kind, config):
        return first, inputs
    # Configured extra outputs would be computed for the first pass too.
    first |= {
        f"output_{name}": False
        for name in ("attentions", "hidden_states")
        if getattr(config, f"output_{name}", 0)
    }
    first["return_dict"] = True

    cache = inputs.get("past_key_values")
    if cache is None:
        use_cache = inputs.get("use_cache")
        if use_cache is None:
            # A cache that nobody asked for would only hold on to memory while training.
            use_cache = getattr(config, "use_cache", False) and not (
                trunk.training and torch.is_grad_enabled()
            )
            inputs = inputs | {"use_cache": use_cache}
        if not use_cache or (trunk.training and getattr(trunk, "gradient_checkpointing", False)):
            return first | {"use_cache": False}, inputs | {"use_cache": False}
        from transformers import DynamicCache

        cache = DynamicCache(config=config)
        inputs = inputs | {"past_key_values": cache}
    return first | {"past_key_values": first_pass_cache(cache, steering)}, inputs


def _decodes(kind: str, config: Any) -> bool:
    """Whether a trunk attends to what came before only; some encoders do if configured to."""
    return kind == "decoder" or bool(getattr(config, "is_decoder", False))


def first_pass_cache(cache: Cache, steering: Steering) -> Cache:
    """Returns the first pass's part of a cache, which is made at the cache's first use.

    Args:
        cache: Cache of the call; keeps the second pass's layers first, then the first pass's.
        steering: The wrapped model's parts.

    Raises:
        TypeError: See `pass_caches`.
        ValueError: See `pass_caches`.
    """
    from transformers import Cache, EncoderDecoderCache

    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise TypeError(
            "past_key_values: TOAST needs a Cache of a decoder, such as DynamicCache or StaticCache; "
            f"got {type(cache).__name__}."
        )
    if getattr(cache, "offloading", False):
        raise ValueError(
            "past_key_values: TOAST does not work with offloaded caches, whose layers are fetched in the "
            "order of one pass. Use cache_implementation='dynamic' or 'static'."
        )
    blocks = len(steering.block_names)
    adapter = steering.selector.adapter
    filled = cache.get_seq_length() > 0
    mark: str | None = getattr(cache, _MARK, None)
    if mark is None and filled:
        raise ValueError(
            "past_key_values: this cache was filled without steering, so the first pass has none of it. "
            "Start with an empty cache, or disable the adapter for the whole generation."
        )
    if filled and mark != adapter:
        raise ValueError(
            f"past_key_values: this cache was filled with adapter {mark!r}; the active one is "
            f"{adapter!r}. Start with an empty cache."
        )
    if mark != adapter:
        _add_first_pass(cache, blocks, steering.selector.config.select_from, fresh=mark is None)
        setattr(cache, _MARK, adapter)
    first = Cache(layers=cache.layers[blocks:])
    _check_lengths(cache.layers[:blocks], first.layers)
    return first


def _add_first_pass(cache: Cache, blocks: int, select_from: int | None, fresh: bool) -> None:
    """Puts empty layers for the first pass behind those of the second, one for each block that it runs."""
    make = cache.layer_class_to_replicate
    if fresh and make is not None:  # made without a configuration, it adds its layers as they are used
        cache.layers.extend(make() for _ in range(blocks - len(cache.layers)))
    if fresh and len(cache.layers) != blocks:
        raise ValueError(
            f"past_key_values: this cache has {len(cache.layers)} layers, the model has {blocks} blocks. "
            "Make the cache from the model's own configuration."
        )
    reached = blocks if select_from is None else select_from + 1
    cache.layers[blocks:] = copy.deepcopy(cache.layers[:reached])


def _check_lengths(second: Sequence[Any], first: Sequence[Any]) -> None:
    """Refuses a cache that a call left half filled: its ends, in the order in which a call fills them."""
    if torch.compiler.is_compiling():
        return
    lengths = [layer.get_seq_length() for layer in (first[0], first[-1], second[0], second[-1])]
    if any(isinstance(length, torch.Tensor) and not length.is_cpu for length in lengths):
        return  # reading a counter that an accelerator keeps would make the host wait at every step
    lengths = [int(length) for length in lengths]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"past_key_values: the first and last layers of this cache hold {lengths[0]} and {lengths[1]} "
            f"tokens of the first pass, {lengths[2]} and {lengths[3]} of the second. A call that failed in "
            "between, or ran with the adapter disabled, left it so; start with an empty cache."
        )
