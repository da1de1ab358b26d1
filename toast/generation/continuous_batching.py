"""Continuous batching (`generate_batch` of transformers): one paged cache holds both passes.

The cache is made for a configuration with more layers than the model has: those of the first pass stand
behind those of the second, as in `toast.generation.caching`. A page table of a request counts tokens and
not layers, so whatever the scheduler does to pages (sharing prefixes, copying, offloading, freeing), it does
to both passes alike.

The loop that generates runs in a thread of its own, which the adapter that a call holds does not reach. So
the cache belongs to the adapter that was active when it was made, and every step compares.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toast.adapter import Adapter
from toast.calls.preconditions import check_call
from toast.calls.stand_ins import StandIn
from toast.calls.wrapped import WrappedModel
from toast.thread_state import current_pass

_MARK = "_toast_pages"

#: What an attention hands to the paged cache; older versions of transformers do it in other ways.
_UPDATE = ["self", "key_states", "value_states", "layer_idx", "kwargs"]

_OTHERWISE = "Use generate(), or disable the adapter (model.disable_adapter())."

#: Managers of the `generate_batch` that runs.
_managers: ContextVar[list[Any] | None] = ContextVar("_managers", default=None)


class SwitchedError(ValueError):
    """The adapter is not the one that a paged cache was made for."""


@dataclass(frozen=True)
class Pages:
    """Which layers of a paged cache belong to which pass of one adapter.

    Args:
        steering: The wrapped model's parts.
        adapter: Name of the adapter.
        once: How many of the lowest blocks run once; their layers serve both passes.
        last: The highest block of the first pass.
    """

    steering: WrappedModel
    adapter: str
    once: int
    last: int

    @classmethod
    def of(cls, steering: WrappedModel, adapter: Adapter) -> Pages:
        """Returns the layers that the calls of an adapter need."""
        method = steering.methods[steering.family.methods[0]]
        once = steering.blocks_run_once(method, adapter, {"use_cache": True})
        return cls(steering, adapter.name, once, steering.last_read(adapter))

    @property
    def first(self) -> range:
        """The blocks whose layers the first pass has for itself."""
        return range(self.once, self.last + 1)

    def deepened(self, config: Any) -> Any:
        """Returns a copy of the model's configuration that counts the layers of both passes.

        Args:
            config: Configuration of the model.
        """
        config = copy.deepcopy(config)
        text = config.get_text_config()
        blocks = len(self.steering.block_names)
        kinds = getattr(text, "layer_types", None)
        if kinds is not None:
            kinds = list(kinds[:blocks])
            text.layer_types = kinds + [kinds[block] for block in self.first]
        text.num_hidden_layers = blocks + len(self.first)
        return config

    def mark(self, cache: Any) -> None:
        """Makes a paged cache keep the passes apart.

        Args:
            cache: A cache that was made for `deepened`.

        Raises:
            ValueError: If it has other layers than were asked for.
        """
        if getattr(cache, _MARK, None) is not None:
            return
        expected, found = len(self.steering.block_names) + len(self.first), len(cache.layer_to_allocator)
        if found != expected:
            raise ValueError(
                f"continuous batching: the two passes need a paged cache of {expected} layers; it was made "
                f"with {found}. {_OTHERWISE}"
            )
        setattr(cache, _MARK, self)
        cache.update = _Update(self, cache.update)

    def layer(self, number: int, block: int) -> int:
        """Returns the layer of a block in pass 1 or 2."""
        if number == 2 or block < self.once:
            return block
        return len(self.steering.block_names) + block - self.once


@dataclass(frozen=True)
class _Update:
    """Stands on a paged cache in the place of `update`, and writes to the layers of the pass that runs.

    Args:
        pages: Which they are.
        own: The cache's own method.
    """

    pages: Pages
    own: Callable[..., tuple[Tensor, Tensor]]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # as the cache's own
    def __call__(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        this = current_pass()
        # `check_pages` does not see the cache of a trunk that runs plainly.
        running = None if this is None or this.owner is not self.pages.steering else this.adapter
        if running is None or running.name != self.pages.adapter:
            raise _switched(self.pages.adapter, None if running is None else running.name)
        assert this is not None
        return self.own(key_states, value_states, self.pages.layer(this.number, layer_idx), kwargs)


def is_paged(cache: Any) -> bool:
    """Whether a cache is that of continuous batching."""
    return any(each.__name__ == "PagedAttentionCache" for each in type(cache).__mro__)


def check_pages(cache: Any, steering: WrappedModel, adapter: Adapter, once: int) -> None:
    """Refuses a paged cache that was not made for an adapter.

    Args:
        cache: The paged cache of the call.
        steering: The wrapped model's parts.
        adapter: The adapter of the call.
        once: How many of the lowest blocks run once.

    Raises:
        SwitchedError: If it was made for another adapter, or for none.
    """
    pages: Pages | None = getattr(cache, _MARK, None)
    now = (adapter.name, once, steering.last_read(adapter))
    # Not two `Pages`: Dynamo compares no objects that hold numbers which it traces.
    if pages is None or pages.steering is not steering or (pages.adapter, pages.once, pages.last) != now:
        raise _switched(None if pages is None else pages.adapter, adapter.name)


class Starting(StandIn):
    """Stands in the place of `init_continuous_batching`, which all other entry points call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns a manager whose cache is that of the adapter that is active now.

        Raises:
            ValueError: If the paged cache cannot serve two passes, or one that was kept is that of others.
        """
        steering = self.steering
        with steering.holding_adapter(generates=True) as adapter, torch.no_grad():
            pages = None if adapter is None else _pages_of_call(steering, adapter)
            kept = getattr(self.module, "_cached_continuous_batching_manager", None)
            if kept is not None:
                _check_kept(kept, pages)
            before = self.module.config._attn_implementation  # type: ignore[union-attr]
            if pages is not None:
                args, kwargs = (), self._settled(args, kwargs)
            manager = self.own(*args, **kwargs)
            if pages is not None and manager is not kept:
                try:
                    _prepare(manager, pages)
                except BaseException:
                    manager.destroy()
                    self.module.set_attn_implementation(before)  # type: ignore[operator]
                    raise
        managers = _managers.get()
        if managers is not None:
            managers.append(manager)
        return manager

    def detach(self) -> None:
        """Gives the model its own method back; a manager that was kept for an adapter goes with it."""
        kept = getattr(self.module, "_cached_continuous_batching_manager", None)
        if kept is not None and _is_steered(kept):
            self.module.destroy_cached_continuous_batching_manager()  # type: ignore[operator]
        super().detach()

    def _settled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments by name, and chooses where the library might choose what is refused."""
        given = dict(self.__signature__.bind(*args, **kwargs).arguments)
        generation = given.get("generation_config") or self.module.generation_config
        settings: Any = given.get("continuous_batching_config")
        settings = settings or getattr(generation, "continuous_batching_config", None)
        if settings is None:
            from transformers.generation.configuration_utils import ContinuousBatchingConfig

            settings = ContinuousBatchingConfig()
        settings = copy.copy(settings)
        if settings.use_cuda_graph is None:
            settings.use_cuda_graph = False
        return given | {"continuous_batching_config": settings}


class Batch(StandIn):
    """Stands in the place of `generate_batch`, which logs what ends its loop and returns what is there."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generates, and raises what ended the loop if that is steering."""
        before = _managers.set([])
        try:
            results = self.own(*args, **kwargs)
            managers = _managers.get() or []
        finally:
            _managers.reset(before)
        for manager in managers:
            status = getattr(manager, "background_thread_status", None)  # younger than the method
            error = getattr(status, "fatal_error", None)
            if error is not None and (_is_steered(manager) or isinstance(error, SwitchedError)):
                raise error
        return results


#: What stands in the place of which method of the wrapped model.
_STAND_INS: dict[str, type[Starting | Batch]] = {
    "init_continuous_batching": Starting,
    "generate_batch": Batch,
}


def unknown_parts() -> str | None:
    """Returns what is needed of transformers' paged cache and its version has in another form, or not."""
    found: list[str] = []
    try:
        from transformers.generation.continuous_batching.cache import PagedAttentionCache
        from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
    except ImportError:
        pass
    else:
        if hasattr(ContinuousBatchingManager, "_create_batch_processor"):
            found = list(inspect.signature(PagedAttentionCache.update).parameters)
    if found == _UPDATE:
        return None
    import transformers

    return (
        f"PagedAttentionCache.update({', '.join(_UPDATE[1:])}) and a manager that makes it, as in 5.24; "
        f"transformers {transformers.__version__} has another"
    )


def attach_batching(steering: WrappedModel) -> list[StandIn]:
    """Makes continuous batching of the model steered, if its class has it."""
    stand_ins: list[StandIn] = [
        kind(steering, steering.model, name)
        for name, kind in _STAND_INS.items()
        if callable(getattr(type(steering.model), name, None))
    ]
    for stand_in in stand_ins:
        stand_in.attach()
    return stand_ins


def _pages_of_call(steering: WrappedModel, adapter: Adapter) -> Pages:
    """Returns the layers that an adapter needs, after looking whether it can run in this way at all.

    Raises:
        ValueError: If it cannot.
    """
    check_call(steering, adapter)
    if adapter.attends:
        raise ValueError(
            "continuous batching: its loop runs in a thread of its own, for which toast.attend_to does not "
            "hold. Use generate()."
        )
    if adapter.config.steer_tokens == "prompt":
        raise ValueError(
            "continuous batching: with steer_tokens='prompt' a prompt takes two passes, a later token one; "
            "both are in one batch here. Set steer_tokens='all', or use generate()."
        )
    unknown = unknown_parts()
    if unknown:
        raise ValueError(
            "continuous batching: each of the two passes needs layers of its own in the paged cache, and so "
            f"{unknown}. {_OTHERWISE}"
        )
    config: Any = steering.model.config
    layers, blocks = getattr(config.get_text_config(), "num_hidden_layers", None), len(steering.block_names)
    if layers != blocks:
        raise ValueError(
            "continuous batching: the paged cache counts its layers from the configuration, which says "
            f"num_hidden_layers={layers}; the steered trunk has {blocks} blocks. {_OTHERWISE}"
        )
    return Pages.of(steering, adapter)


def _prepare(manager: Any, pages: Pages) -> None:
    """Makes a new manager's cache hold both passes, now: what is refused shall be before the loop starts.

    Raises:
        ValueError: If it would record its steps, or its cache has other layers than the passes need.
    """
    if any(manager.continuous_batching_config.cuda_graph_booleans):
        raise ValueError(
            "continuous batching: each step has to compare the adapter with that of the paged cache, which a "
            "recorded graph does not. Pass a ContinuousBatchingConfig with use_cuda_graph=False or None. "
            f"{_OTHERWISE}"
        )
    model = _With(manager.model, config=pages.deepened(manager.model.config))
    create = type(manager)._create_batch_processor

    def create_for_two_passes() -> Any:
        processor = create(_With(manager, model=model))
        pages.mark(processor.cache)
        return processor

    manager._create_batch_processor = create_for_two_passes
    with torch.inference_mode(False):  # the loop may run in another mode than this
        manager.batch_processor = create_for_two_passes()


def _is_steered(manager: Any) -> bool:
    return "_create_batch_processor" in vars(manager)


def _check_kept(manager: Any, pages: Pages | None) -> None:
    """Refuses a manager that `persistent_manager=True` kept for another adapter, or for none.

    Raises:
        SwitchedError: If it is one.
    """
    cache = getattr(getattr(manager, "batch_processor", None), "cache", None)
    kept: Pages | None = getattr(cache, _MARK, None)
    if kept != pages:
        raise _switched(None if kept is None else kept.adapter, None if pages is None else pages.adapter)


def _switched(filled: str | None, running: str | None) -> SwitchedError:
    made = "while no adapter was active" if filled is None else f"for adapter {filled!r}"
    now = "none is active" if running is None else f"{running!r} is active"
    if filled is not None and filled == running:
        now = "it has other settings"
    return SwitchedError(
        f"continuous batching: its paged cache was made {made}, and now {now}. Stop this manager "
        "(model.destroy_cached_continuous_batching_manager() if it was kept) and start another with the "
        "adapter that is to run."
    )


class _With:
    """Looks like an object with some other attributes; what is set goes to the object.

    Args:
        real: The object.
        instead: The other attributes.
    """

    def __init__(self, real: Any, **instead: Any) -> None:
        vars(self).update(instead, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)
