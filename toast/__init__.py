"""TOAST, top-down attention steering of frozen pre-trained transformers, as a PEFT method.

"Refocusing Is Key to Transfer Learning", Shi, Gai, Darrell, Wang, arXiv 2305.15542.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from toast import registration
from toast.version import __version__ as __version__

# Public name -> module that defines it, imported by `__getattr__` when the name is first used. All of them
# need torch, which takes seconds to import, and `import toast` is part of every start of the command. The
# imports under TYPE_CHECKING say the same to type checkers.
_EXPORTS = {
    "FirstPass": "toast.stored_pass",
    "LoadedRun": "toast.training.loaded",
    "Probe": "toast.probing",
    "ToastConfig": "toast.config",
    "ToastModel": "toast.model",
    "Trace": "toast.tracing",
    "calibrate": "toast.calibrating",
    "compare": "toast.visual.comparing",
    "first_pass": "toast.reusing",
    "fuse": "toast.fusing",
    "given_first_pass": "toast.reusing",
    "import_official": "toast.official.importing",
    "load_official": "toast.official.models",
    "load_run": "toast.training.loaded",
    "look": "toast.visual.maps",
    "parameter_groups": "toast.rates",
    "pretraining_loss": "toast.objectives",
    "probe": "toast.probing",
    "reconstruction_loss": "toast.objectives",
    "register_family": "toast.families.table",
    "running_pass": "toast.thread_state",
    "save_adapter": "toast.saving.contents",
    "trace": "toast.tracing",
    "unfuse": "toast.fusing",
    "visualize": "toast.visual.visualizing",
    "visualize_text": "toast.visual.text.exporting",
    "wrap": "toast.wrapping",
}

__all__ = [*sorted(_EXPORTS), "__version__"]

if TYPE_CHECKING:
    from toast.calibrating import calibrate as calibrate
    from toast.config import ToastConfig as ToastConfig
    from toast.families.table import register_family as register_family
    from toast.fusing import fuse as fuse
    from toast.fusing import unfuse as unfuse
    from toast.model import ToastModel as ToastModel
    from toast.objectives import pretraining_loss as pretraining_loss
    from toast.objectives import reconstruction_loss as reconstruction_loss
    from toast.official.importing import import_official as import_official
    from toast.official.models import load_official as load_official
    from toast.probing import Probe as Probe
    from toast.probing import probe as probe
    from toast.rates import parameter_groups as parameter_groups
    from toast.reusing import first_pass as first_pass
    from toast.reusing import given_first_pass as given_first_pass
    from toast.saving.contents import save_adapter as save_adapter
    from toast.stored_pass import FirstPass as FirstPass
    from toast.thread_state import running_pass as running_pass
    from toast.tracing import Trace as Trace
    from toast.tracing import trace as trace
    from toast.training.loaded import LoadedRun as LoadedRun
    from toast.training.loaded import load_run as load_run
    from toast.visual.comparing import compare as compare
    from toast.visual.maps import look as look
    from toast.visual.text.exporting import visualize_text as visualize_text
    from toast.visual.visualizing import visualize as visualize
    from toast.wrapping import wrap as wrap


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _EXPORTS:
        raise AttributeError(
            f"module 'toast' has no attribute {name!r}; it has {', '.join(sorted(_EXPORTS))}"
        )
    importlib.import_module("toast.model")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    """Lists the public names."""
    return __all__


registration.install()
