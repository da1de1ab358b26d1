"""Generation keeps two key-value caches, one a pass, as one `Cache` object of transformers.

The layers of the first pass stand behind those of the second in the same object's list. Whatever generation
does to a cache (reordering for beams, cropping for assisted decoding, repeating, resetting), it does to every
layer of the list, and so to both passes alike. Blocks that run once have one layer for both passes.

A cache that comes under no known name (`toast.calls.arguments`) is refused: both passes would write into it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache

from toast.adapter import Adapter
from toast.calls.arguments import CACHE_NAMES
from toast.calls.stand_ins import SteeredMethod
from toast.calls.wrapped import WrappedModel
from toast.generation.continuous_batching import check_pages, is_paged
from toast.stored_pass import main_input

_MARK = "_toast_adapter"


@dataclass
class PassInputs:
    """Inputs of a trunk for each of the two passes.

    Args:
        first: Inputs of the first pass.
        second: Inputs of the second pass.
        cache: The cache of the call, where the second pass gets a part of it.
        part: That part.
    """

    first: dict[str, Any]
    second: dict[str, Any]
    cache: Cache | None = None
    part: Cache | None = None

    def hand_back(self, output: Any) -> Any:
        """Puts the cache of the call into the second pass's output."""
        if self.cache is None:
            return output
        if isinstance(output, tuple):
            return tuple(self.cache if each is self.part else each for each in output)
        # The field may have another name than the argument: transformers renames it in outputs of old code.
        field = next((name for name in CACHE_NAMES if getattr(output, name, None) is self.part), None)
        if field is not None:
            setattr(output, field, self.cache)
        return output


def pass_caches(steering: WrappedModel, adapter: Adapter, inputs: dict[str, Any], once: int) -> PassInputs:
    """Splits the inputs of a trunk into those of the first and those of the second pass.

    The first pass gets a cache of its own, asks for no extra outputs and only takes what its method knows.

    Args:
        steering: The wrapped model's parts.
        adapter: The adapter of the call.
        inputs: Inputs of the call by name.
        once: How many of the lowest blocks run once, and so have one cache.

    Raises:
        TypeError: If what is given as a cache is none of transformers.
        ValueError: If the cache cannot serve two passes, was filled by another model or adapter, or is none
            that the trunk is known to take.
    """
    trunk = steering.trunk
    method = steering.methods[steering.family.methods[0]]
    first = {each: value for each, value in inputs.items() if _takes(method, each)}
    first = {each: value for each, value in first.items() if not each.startswith("output_")}
    config: Any = getattr(trunk, "config", None)
    no_cache = {"use_cache": False} if _takes(method, "use_cache") else {}
    name, decodes = method.cache_name, _decodes(steering.family.kind, config)
    if name is None or not decodes:
        _refuse_cache(steering, name, decodes, inputs)
        if decodes and "use_cache" in method.__signature__.parameters:
            # What it made a later call would bring, under a name that is not known.
            return PassInputs(first | no_cache, inputs | no_cache)
        return PassInputs(first, inputs)
    # Configured extra outputs would be computed for the first pass too.
    first |= {
        f"output_{each}": False
        for each in ("attentions", "hidden_states")
        if getattr(config, f"output_{each}", 0)
    }
    first |= {"return_dict": True} if _takes(method, "return_dict") else {}

    cache = inputs.get(name)
    if cache is None:
        use_cache = inputs.get("use_cache")
        if use_cache is None:
            # A cache that nobody asked for would only hold on to memory while training.
            training = trunk.training and torch.is_grad_enabled()
            use_cache = bool(no_cache) and getattr(config, "use_cache", False) and not training
            inputs = inputs | {"use_cache": use_cache} if no_cache else inputs
        if not use_cache or (trunk.training and getattr(trunk, "gradient_checkpointing", False)):
            return PassInputs(first | no_cache, inputs | no_cache)
        cache = DynamicCache(config=config)
        inputs = inputs | {name: cache}
    if is_paged(cache):
        check_pages(cache, steering, adapter, once)
        return PassInputs(first, inputs)  # it asks which pass runs
    layers = first_pass_layers(cache, steering, adapter, once)
    first[name] = _part_of(cache, layers)
    if not once:
        return PassInputs(first, inputs)
    # Layers of blocks that run once are full already when the second pass asks how much there is.
    before = [_as_it_is(layer) for layer in cache.layers[:once]]
    part = _part_of(cache, before + cache.layers[once : len(steering.block_names)])
    return PassInputs(first, inputs | {name: part}, cache, part)


def without_cache(method: SteeredMethod, inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns the inputs of a call that runs one of the passes alone, and so keeps no cache.

    Raises:
        ValueError: If it is asked to.
    """
    if _keeps_cache(method, inputs):
        raise ValueError(
            "a stored first pass is that of a whole input; it cannot be used or made with a "
            "key-value cache. Pass use_cache=False."
        )
    return inputs | {"use_cache": False} if method.cache_name and _takes(method, "use_cache") else inputs


def continues_prompt(method: SteeredMethod, adapter: Adapter, inputs: dict[str, Any]) -> bool:
    """Whether a call continues a text whose prompt alone is steered, and so runs once.

    The length of a static cache may be kept on an accelerator, and the host would have to wait for it: there
    it is a single token that continues.

    Args:
        method: The method of the trunk that is called.
        adapter: The adapter of the call.
        inputs: Inputs of the call by name.
    """
    cache = None if method.cache_name is None else inputs.get(method.cache_name)
    if adapter.config.steer_tokens != "prompt" or getattr(cache, _MARK, None) != adapter.name:
        return False
    assert isinstance(cache, Cache)
    length = cache.get_seq_length()
    return length > 0 if isinstance(length, int) else main_input(inputs).shape[1] == 1


def wants_all_blocks(
    steering: WrappedModel, adapter: Adapter, method: SteeredMethod, inputs: dict[str, Any]
) -> bool:
    """Whether a call asks for something of every block.

    Raises:
        ValueError: If it also keeps a cache, of which the blocks below the steered ones have one part.
    """
    config: Any = getattr(steering.trunk, "config", None)
    names = ("output_attentions", "output_hidden_states")
    asked = [name for name in names if inputs.get(name, getattr(config, name, False))]
    if asked and _keeps_cache(method, inputs):
        raise ValueError(
            f"{asked[0]} with a cache needs all blocks to run in both passes; with steer_from="
            f"{adapter.config.steer_from} the lower ones run once. Pass use_cache=False."
        )
    return bool(asked)


def _takes(method: SteeredMethod, name: str) -> bool:
    """Whether a method accepts an argument."""
    known = method.__signature__.parameters
    return name in known or any(p.kind is p.VAR_KEYWORD for p in known.values())


def _keeps_cache(method: SteeredMethod, inputs: dict[str, Any]) -> bool:
    """Whether a call goes on with a cache, or asks for one."""
    name = method.cache_name
    return bool(inputs.get("use_cache")) or (name is not None and inputs.get(name) is not None)


def _refuse_cache(steering: WrappedModel, name: str | None, decodes: bool, inputs: dict[str, Any]) -> None:
    """Refuses a cache that cannot be split between the passes, so that both would write into the one.

    Raises:
        ValueError: If the call brings a cache, or asks for one that a later call could not bring.
    """
    given = [
        each
        for each, value in inputs.items()
        if hasattr(value, "get_seq_length") or (each in CACHE_NAMES and isinstance(value, tuple))
    ]
    if decodes and not given and inputs.get("use_cache"):
        given = ["use_cache"]
    if given:
        trunk = type(steering.trunk).__name__
        reason = (
            f"{trunk} has none of the arguments {', '.join(CACHE_NAMES)}"
            if name is None
            else f"{trunk} is not a decoder"
        )
        raise ValueError(
            f"{given[0]}: each of the two passes needs a key-value cache of its own, and {reason}, so both "
            "would write into one. Pass no cache and use_cache=False."
        )


def _part_of(cache: Cache, layers: list[Any]) -> Cache:
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


def first_pass_layers(cache: Cache, steering: WrappedModel, adapter: Adapter, once: int) -> list[Any]:
    """Returns the first pass's layers of a cache, which are made at the cache's first use.

    Args:
        cache: Cache of the call; keeps the second pass's layers first, then the first pass's own.
        steering: The wrapped model's parts.
        adapter: The adapter of the call.
        once: How many of the lowest blocks run once; their layers serve both passes.

    Raises:
        TypeError: See `pass_caches`.
        ValueError: See `pass_caches`.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise TypeError(
            "key-value cache: TOAST needs a Cache of a decoder, such as DynamicCache or StaticCache; "
            f"got {type(cache).__name__}."
        )
    if getattr(cache, "offloading", False):
        raise ValueError(
            "key-value cache: TOAST does not work with offloaded caches, whose layers are fetched in the "
            "order of one pass. Use cache_implementation='dynamic' or 'static'."
        )
    blocks = len(steering.block_names)
    mark: str | None = getattr(cache, _MARK, None)
    # Looked at only for a new cache: an accelerator may keep the length, and the host would wait for it.
    filled = mark != adapter.name and cache.get_seq_length() > 0
    if mark is None and filled:
        raise ValueError(
            "key-value cache: this one was filled without steering, so the first pass has none of it. "
            "Start with an empty cache, or disable the adapter for the whole generation."
        )
    if filled:
        raise ValueError(
            f"key-value cache: this one was filled with adapter {mark!r}; the active one is "
            f"{adapter.name!r}. Start with an empty cache."
        )
    if mark != adapter.name:
        _add_first_pass(cache, blocks, range(once, steering.last_read(adapter) + 1), fresh=mark is None)
        setattr(cache, _MARK, adapter.name)
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
            f"key-value cache: this one has {len(cache.layers)} layers, the model has {blocks} blocks. "
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
            f"key-value cache: its first and last layers hold {lengths[0]} and {lengths[1]} "
            f"tokens of the first pass, {lengths[2]} and {lengths[3]} of the second. A call that failed in "
            "between, or ran with the adapter disabled, left it so; start with an empty cache."
        )
