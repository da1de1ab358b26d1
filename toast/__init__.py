"""TOAST, top-down attention steering of frozen pre-trained transformers, as a PEFT method.

"Refocusing Is Key to Transfer Learning", Shi, Gai, Darrell, Wang, arXiv 2305.15542.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toast import registration
from toast.lazy import lazily
from toast.version import __version__ as __version__

# Public name -> module that defines it, imported by `__getattr__` when the name is first used. All of them
# need torch, which takes seconds to import, and `import toast` is part of every start of the command. The
# imports under TYPE_CHECKING say the same to type checkers.
_EXPORTS = {
    "AttentionMaps": "toast.visual.attention_maps",
    "Comparison": "toast.visual.comparing",
    "FirstPass": "toast.stored_pass",
    "LoadedRun": "toast.training.loaded",
    "PretrainingTrainer": "toast.trainer",
    "Probe": "toast.probing",
    "RunConfig": "toast.training.run_config",
    "TextAttentionMaps": "toast.visual.text.looking",
    "ToastConfig": "toast.config",
    "ToastModel": "toast.model",
    "Trace": "toast.tracing",
    "attend_to": "toast.attending",
    "calibrate": "toast.calibrating",
    "compare": "toast.visual.comparing",
    "first_pass": "toast.reusing",
    "fuse": "toast.fusing",
    "given_first_pass": "toast.reusing",
    "import_official": "toast.official.importing",
    "input_sizes": "toast.sizing",
    "load_official": "toast.official.models",
    "load_run": "toast.training.loaded",
    "look": "toast.visual.maps",
    "look_at_text": "toast.visual.text.looking",
    "make_config": "toast.training.config_files",
    "parameter_groups": "toast.rates",
    "pretraining_loss": "toast.objectives",
    "probe": "toast.probing",
    "reconstruction_loss": "toast.objectives",
    "register_family": "toast.families.table",
    "run": "toast.training.run",
    "run_adapters": "toast.several",
    "running_pass": "toast.thread_state",
    "save_adapter": "toast.saving.contents",
    "select_weights": "toast.weight_selection",
    "trace": "toast.tracing",
    "unfuse": "toast.fusing",
    "visualize": "toast.visual.visualizing",
    "visualize_text": "toast.visual.text.exporting",
    "wrap": "toast.wrapping",
}

__all__ = [*sorted(_EXPORTS), "__version__"]

if TYPE_CHECKING:
    from toast.attending import attend_to as attend_to
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
    from toast.several import run_adapters as run_adapters
    from toast.sizing import input_sizes as input_sizes
    from toast.stored_pass import FirstPass as FirstPass
    from toast.thread_state import running_pass as running_pass
    from toast.tracing import Trace as Trace
    from toast.tracing import trace as trace
    from toast.trainer import PretrainingTrainer as PretrainingTrainer
    from toast.training.config_files import make_config as make_config
    from toast.training.loaded import LoadedRun as LoadedRun
    from toast.training.loaded import load_run as load_run
    from toast.training.run import run as run
    from toast.training.run_config import RunConfig as RunConfig
    from toast.visual.attention_maps import AttentionMaps as AttentionMaps
    from toast.visual.comparing import Comparison as Comparison
    from toast.visual.comparing import compare as compare
    from toast.visual.maps import look as look
    from toast.visual.text.exporting import visualize_text as visualize_text
    from toast.visual.text.looking import TextAttentionMaps as TextAttentionMaps
    from toast.visual.text.looking import look_at_text as look_at_text
    from toast.visual.visualizing import visualize as visualize
    from toast.weight_selection import select_weights as select_weights
    from toast.wrapping import wrap as wrap


__getattr__, __dir__ = lazily(__name__, _EXPORTS, first="toast.model")

registration.install()
