"""Generation keeps two key-value caches, one a pass, as one `Cache` object of transformers.

The layers of the first pass stand behind those of the second in the same object's list. Whatever generation
does to a cache (reordering for beams, cropping for assisted decoding, repeating, resetting), it does to every
layer of the list, and so to both passes alike. Blocks that run once have one layer for both passes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import Cache

    from toast.steering import Steering

_MARK = "_toast_adapter"


@dataclass
class PassInputs:
    """Inputs of a trunk for each of the two passes.

    Args:
        first: Inputs of the first pass.
        second: Inputs of the second pass.
        cache: The cache of the call, where the second pass gets a part of it.
    """

    first: dict[str, Any]
    second: dict[str, Any]
    cache: Cache | None = None

    def hand_back(self, output: Any) -> Any:
        """Puts the cache of the call into the second pass's output."""
        if self.cache is None:
            return output
        part = self.second["past_key_values"]
        if isinstance(output, tuple):
            return tuple(self.cache if each is part else each for each in output)
        if getattr(output, "past_key_values", None) is part:
            output.past_key_values = self.cache
        return output


def pass_caches(steering: Steering, inputs: dict[str, Any], once: int) -> PassInputs:
    """Splits the inputs of a trunk into those of the first and those of the second pass.

    The first pass gets a cache of its own, asks for no extra outputs and only takes what its method knows.

    Args:
        steering: The wrapped model's parts.
        inputs: Inputs of the call by name.
        once: How many of the lowest blocks run once, and so have one cache.

    Raises:
        TypeError: If `past_key_values` is no cache of transformers.
        ValueError: If the cache cannot serve two passes, or was filled by another model or adapter.
    """
    trunk = steering.trunk
    method = steering.methods[steering.family.methods[0]]
    known = method.__signature__.parameters
    takes_more = any(p.kind is p.VAR_KEYWORD for p in known.values())
    first = {name: value for name, value in inputs.items() if takes_more or name in known}
    first = {name: value for name, value in first.items() if not name.startswith("output_")}
    config: Any = getattr(trunk, "config", None)
    if "past_key_values" not in known or not _decodes(steering.family.kind, config):
        return PassInputs(first, inputs)
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
            return PassInputs(first | {"use_cache": False}, inputs | {"use_cache": False})
        from transformers import DynamicCache

        cache = DynamicCache(config=config)
        inputs = inputs | {"past_key_values": cache}
    layers = first_pass_layers(cache, steering, once)
    first["past_key_values"] = _part_of(cache, layers)
    if not once:
        return PassInputs(first, inputs)
    # Layers of blocks that run once are full already when the second pass asks how much there is.
    before = [_as_it_is(layer) for layer in cache.layers[:once]]
    part = _part_of(cache, before + cache.layers[once : len(steering.block_names)])
    return PassInputs(first, inputs | {"past_key_values": part}, cache)


def without_cache(method: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns the inputs of a call that runs one of the passes alone, and so keeps no cache.

    Raises:
        ValueError: If it is asked to.
    """
    if inputs.get("past_key_values") is not None or inputs.get("use_cache"):
        raise ValueError(
            "a first pass that is stored is that of a whole input; it cannot be used or made with a "
            "key-value cache. Pass use_cache=False."
        )
    return inputs | {"use_cache": False} if "past_key_values" in method.__signature__.parameters else inputs


def wants_all_blocks(steering: Steering, inputs: dict[str, Any]) -> bool:
    """Whether a call asks for something of every block.

    Raises:
        ValueError: If it also keeps a cache, of which the blocks below the steered ones have one part.
    """
    config: Any = getattr(steering.trunk, "config", None)
    names = ("output_attentions", "output_hidden_states")
    asked = [name for name in names if inputs.get(name, getattr(config, name, False))]
    if asked and (inputs.get("past_key_values") is not None or inputs.get("use_cache")):
        raise ValueError(
            f"{asked[0]} with a cache needs all blocks to run in both passes; with steer_from="
            f"{steering.selector.config.steer_from} the lower ones run once. Pass use_cache=False."
        )
    return bool(asked)


def _part_of(cache: Cache, layers: list[Any]) -> Cache:
    from transformers import Cache

    return Cache(layers=layers)


def _as_it_is(layer: Any) -> Any:
    """Returns a layer of a cache that keeps its length when the layer is filled further."""
    kept = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            setattr(kept, name, value.clone())
    return kept


def _decodes(kind: str, config: Any) -> bool:
    """Whether a trunk attends to what came before only; some encoders do if configured to."""
    return kind == "decoder" or bool(getattr(config, "is_decoder", False))


def first_pass_layers(cache: Cache, steering: Steering, once: int) -> list[Any]:
    """Returns the first pass's layers of a cache, which are made at the cache's first use.

    Args:
        cache: Cache of the call; keeps the second pass's layers first, then the first pass's own.
        steering: The wrapped model's parts.
        once: How many of the lowest blocks run once; their layers serve both passes.

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
    mark: str | None = getattr(cache, _MARK, None)
    # Looked at only for a new cache: an accelerator may keep the length, and the host would wait for it.
    filled = mark != adapter and cache.get_seq_length() > 0
    if mark is None and filled:
        raise ValueError(
            "past_key_values: this cache was filled without steering, so the first pass has none of it. "
            "Start with an empty cache, or disable the adapter for the whole generation."
        )
    if filled:
        raise ValueError(
            f"past_key_values: this cache was filled with adapter {mark!r}; the active one is "
            f"{adapter!r}. Start with an empty cache."
        )
    if mark != adapter:
        _add_first_pass(cache, blocks, range(once, steering.last_read + 1), fresh=mark is None)
        setattr(cache, _MARK, adapter)
    first: list[Any] = cache.layers[:once] + cache.layers[blocks:]
    _check_lengths(cache.layers[:blocks], first)
    return first


def _add_first_pass(cache: Cache, blocks: int, reached: range, fresh: bool) -> None:
    """Puts empty layers for the first pass behind those of the second, one for each block that it repeats."""
    make = cache.layer_class_to_replicate
    if fresh and make is not None:  # made without a configuration, it adds its layers as they are used
        cache.layers.extend(make() for _ in range(blocks - len(cache.layers)))
    if fresh and len(cache.layers) != blocks:
        raise ValueError(
            f"past_key_values: this cache has {len(cache.layers)} layers, the model has {blocks} blocks. "
            "Make the cache from the model's own configuration."
        )
    cache.layers[blocks:] = copy.deepcopy([cache.layers[block] for block in reached])


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
