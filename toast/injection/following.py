"""Follows the methods of PEFT and transformers that load adapters, and PEFT's that writes model cards.

Neither library offers a place that knows where an adapter comes from and that its loading has failed.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn

from toast.config import ToastConfig
from toast.files.adapter_folder import PICKLED, WEIGHTS
from toast.injection.loading import METHOD, Loading, followed, method_of
from toast.saving.card import completed


def follow() -> None:
    """Follows the methods of PEFT and transformers that load adapters; a second call does nothing."""
    from transformers.integrations.peft import PeftAdapterMixin

    if PeftModel.load_adapter.__module__ == __name__:
        return
    from_pretrained = PeftModel.from_pretrained.__func__  # type: ignore[attr-defined]
    PeftModel.from_pretrained = classmethod(_from_pretrained(from_pretrained))  # type: ignore[assignment]
    PeftModel.load_adapter = _load_adapter(PeftModel.load_adapter)  # type: ignore[method-assign]
    PeftModel.create_or_update_model_card = _write_card(  # type: ignore[method-assign]
        PeftModel.create_or_update_model_card
    )
    PeftAdapterMixin.load_adapter = _load_adapter_of_transformers(PeftAdapterMixin.load_adapter)


def _follows(original: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Dresses a function as the one that it calls, but for the module that it is of."""
    return functools.wraps(original, [n for n in functools.WRAPPER_ASSIGNMENTS if n != "__module__"])


def _from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    @_follows(original)
    def from_pretrained(cls: type, model: nn.Module, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        given = _arguments(original, cls, model, model_id, *args, **kwargs)
        with followed(lambda: _begin(model, model_id, given)):
            return original(cls, model, model_id, *args, **kwargs)

    return from_pretrained


def _load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    @_follows(original)
    def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        given = _arguments(original, self, model_id, adapter_name, *args, **kwargs)
        with followed(lambda: _begin(self, model_id, given)) as loading:
            config = self.peft_config.get(adapter_name)
            if loading is not None and isinstance(config, ToastConfig):
                loading.check_live(self, config, adapter_name)
            return original(self, model_id, adapter_name, *args, **kwargs)

    return load_adapter


def _load_adapter_of_transformers(original: Callable[..., Any]) -> Callable[..., Any]:
    @_follows(original)
    def load_adapter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = _arguments(original, self, *args, **kwargs)
        kwargs = {name: value for name, value in given.items() if name != "self"}
        kwargs |= kwargs.pop("kwargs", {})
        with followed(lambda: _begin(self, given.get("peft_model_id"), given, fetch=True)) as loading:
            if loading is not None and (loading.concerns_toast or loading.tensors is not None):
                if loading.folder is not None and given.get("peft_config") is None:
                    ToastConfig.from_pretrained(str(loading.folder))  # names the file of a wrong setting
                # transformers reads the file by itself, and takes what is left out there for missing.
                kwargs["adapter_state_dict"] = loading.whole()
            return original(self, **kwargs)

    return load_adapter


def _write_card(original: Callable[..., Any]) -> Callable[..., Any]:
    @_follows(original)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        if any(isinstance(config, ToastConfig) for config in self.peft_config.values()):
            with completed(self, Path(output_dir)):
                original(self, output_dir)
        else:
            original(self, output_dir)

    return create_or_update_model_card


def _arguments(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    return dict(inspect.signature(function).bind(*args, **kwargs).arguments)


def _begin(model: nn.Module, source: Any, given: dict[str, Any], fetch: bool = False) -> Loading:
    more = given.get("kwargs", {})
    load_config: Any = given.get("load_config")  # transformers passes one when it loads the base as well
    places = [more, given.get("adapter_kwargs") or {}, getattr(load_config, "download_kwargs", {})]
    source = source or getattr(load_config, "pretrained_model_name_or_path", None)
    tensors = given.get("adapter_state_dict")
    folder = None
    if isinstance(source, str | os.PathLike) and tensors is None:
        folder = Path(source, next((place["subfolder"] for place in places if place.get("subfolder")), ""))
        if not folder.is_dir():
            folder = _fetched(str(source), places) if fetch else None
    loading = Loading(
        model,
        folder,
        tensors,
        resized=bool(
            more.get("ignore_mismatched_sizes") or getattr(load_config, "ignore_mismatched_sizes", False)
        ),
        renamed=bool(
            given.get("key_mapping")
            or more.get("key_mapping")
            or getattr(load_config, "key_mapping", None)
            or getattr(model, "_checkpoint_conversion_mapping", None)
        ),
    )
    if any(isinstance(given.get(name), ToastConfig) for name in ("config", "peft_config")):
        loading.open()
    return loading


def _fetched(repository: str, places: list[Any]) -> Path | None:
    """Returns where a TOAST adapter of a hub lies on this machine; None if it is another, or not there."""
    names = ("subfolder", "revision", "cache_dir", "token", "local_files_only")
    options = {name: place[name] for place in reversed(places) for name in names if place.get(name)}
    try:
        settings = Path(hf_hub_download(repository, CONFIG_NAME, **options))
        if method_of(settings.parent) != METHOD:
            return None
        for name in (WEIGHTS, PICKLED):
            with suppress(EntryNotFoundError):
                hf_hub_download(repository, name, **options)
                break
    except (OSError, ValueError):
        return None  # transformers says what is wrong
    return settings.parent
