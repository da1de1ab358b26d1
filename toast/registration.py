"""Makes TOAST a method of PEFT: mints its `PeftType` and registers the method once `peft` is there.

`import toast` must stay quick, and importing PEFT takes seconds. So TOAST is registered at the moment PEFT
itself has been imported, whoever imports it: at once when that already happened, else by an import hook.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner

METHOD = "toast"


class _RegisterAfterPeft(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that lets PEFT load as usual and registers TOAST afterwards."""

    searching = False

    loader: importlib.abc.Loader

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Wraps the loader of `peft`; says nothing about any other module."""
        if fullname != "peft" or self.searching:
            return None
        self.searching = True  # the search below comes by here again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return None
        self.loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Creates the module as PEFT's own loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Runs PEFT, gives it back its own loader, then registers TOAST.

        Only now is the hook done: libraries look for PEFT's spec to see whether it is installed.
        """
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        register_when_ready()


def install() -> None:
    """Registers TOAST with PEFT now, or as soon as PEFT is imported."""
    if "peft" in sys.modules:
        register_when_ready()
    elif not any(isinstance(finder, _RegisterAfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterPeft())


def register_when_ready(done: str = __name__) -> None:
    """Imports `toast.model`, which registers itself, unless a module of `toast` is only half imported.

    Args:
        done: Module at whose end this is called, and which therefore counts as imported.
    """
    half_imported = any(
        getattr(getattr(module, "__spec__", None), "_initializing", False)
        for name, module in list(sys.modules.items())
        if name.startswith("toast.") and name != done
    )
    if not half_imported:
        importlib.import_module("toast.model")


def mint_peft_type(name: str = METHOD.upper()) -> Any:
    """Returns the member `name` of PEFT's closed enumeration `PeftType`, made if it is not there.

    PEFT refuses method names outside of the enumeration, and a plain string in its place breaks
    `load_adapter`. The member compares, pickles and copies like the built-in ones.
    """
    from peft.utils.peft_types import PeftType

    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Registers the two classes of the method with PEFT; a second call does nothing."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    if mint_peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=METHOD, config_cls=config_cls, model_cls=model_cls)
