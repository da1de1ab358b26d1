"""Makes TOAST a method of PEFT: mints its `PeftType` and registers the method once `peft` is there.

`import toast` must stay quick, and importing PEFT takes seconds. So TOAST is registered later, by an import
hook: as soon as PEFT is there, whoever imports it, and no module of `toast` is half imported. Registering
imports `toast.model` and what that builds on: part of it may be what asked for PEFT, and still be half there.
"""

from __future__ import annotations

import enum
import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner

METHOD = "toast"

logger = logging.getLogger(__name__)


class RegisterAfterImports(importlib.abc.MetaPathFinder):
    """Import hook that registers TOAST at the end of the outermost import of PEFT or of a module of `toast`.

    It stays in `sys.meta_path`: taken out of there while another thread searches, it would make that search
    miss a finder. Once TOAST is registered it has nothing more to say.
    """

    def __init__(self) -> None:
        self.peft_is_there = False
        self.registered = False
        self._running = 0  # watched imports, in all threads: two may wait for each other's modules
        self._lock = threading.Lock()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Finds PEFT and the modules of `toast` by the finders behind this one, and wraps their loader."""
        if self.registered or not (fullname == "peft" or fullname.startswith("toast.")):
            return None
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec: importlib.machinery.ModuleSpec | None = find and find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Watched(spec.loader, self)
                return spec
        return None

    def run(self, loader: importlib.abc.Loader, module: ModuleType) -> None:
        """Runs a module; registers TOAST after it, if no other watched import goes on and PEFT is there."""
        with self._lock:
            self._running += 1
        try:
            loader.exec_module(module)
            if module.__name__ == "peft":
                self.peft_is_there = True
        finally:
            with self._lock:
                self._running -= 1
            self.register_if_ready()

    def register_if_ready(self) -> None:
        """Registers TOAST unless that is too early; a fault is logged, for it is not the importing program's.

        The next import of a module of `toast` tries again, and who uses the method gets the error itself.
        """
        if self.registered or self._running or not (self.peft_is_there or _peft_is_there()):
            return
        try:
            importlib.import_module("toast.model")  # registers at its end
        except Exception as error:
            logger.warning("PEFT does not know TOAST: importing toast.model failed with %r", error)


def _peft_is_there() -> bool:
    """Returns whether PEFT was imported, to its end, before the hook was there to see it."""
    spec = getattr(sys.modules.get("peft"), "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)


class _Watched(importlib.abc.Loader):
    """Loads a module as its own loader does, under the eyes of the hook."""

    def __init__(self, loader: importlib.abc.Loader, hook: RegisterAfterImports) -> None:
        self._loader = loader
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # what `runpy`, `inspect` and `importlib.resources` ask for

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Creates the module as its own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Gives the module back its own loader, which libraries look at, and runs it."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._hook.run(self._loader, module)


_hook = RegisterAfterImports()


def install() -> RegisterAfterImports:
    """Registers TOAST with PEFT now if that is imported, else as soon as it is; returns the hook."""
    if _hook not in sys.meta_path:
        sys.meta_path.insert(0, _hook)
    _hook.register_if_ready()
    return _hook


def mint_peft_type(name: str = METHOD.upper()) -> Any:
    """Returns the member `name` of PEFT's closed enumeration `PeftType`, made if it is not there.

    PEFT refuses method names outside of the enumeration, and a plain string in its place breaks
    `load_adapter`. The member compares, pickles and copies like the built-in ones.
    """
    from peft.utils.peft_types import PeftType

    if name not in PeftType.__members__:
        # As the enumeration's own class body does it: which tables and attributes make a member differs
        # between Python versions.
        proto: Any = enum._proto_member(name)  # type: ignore[attr-defined]
        type.__setattr__(PeftType, name, proto)
        proto.__set_name__(PeftType, name)
    return PeftType[name]


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Registers the two classes of the method with PEFT; a second call does nothing."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    if mint_peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=METHOD, config_cls=config_cls, model_cls=model_cls)
    _hook.registered = True
