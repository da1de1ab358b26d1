"""An adapter is loaded whole, or the model stays as it was, whichever library loads it.

PEFT and transformers put an adapter's layers into the model before they look for its tensors. So their
methods that load are followed (`following.py`): what a folder holds is opened first, compared with the model
before anything is changed (`ToastModel` asks for `current`), and what fails afterwards is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from toast.config import ToastConfig
from toast.families.anatomy import Anatomy
from toast.files.adapter_folder import weights_of
from toast.files.json_files import read_json
from toast.files.tensors import TensorFile, refuse_values
from toast.injection.fitting import check_file, check_live, floating, saved_checksums
from toast.saving.initial import with_initial

METHOD = "TOAST"


#: What decides how an adapter's tensors act, beside their shapes.
SETTINGS = ("select_from", "steer_from", "select_features", "value_bias", "lora_alpha")


class Loading:
    """One call that loads an adapter.

    Args:
        model: The model that it is loaded into.
        folder: Where the adapter is; None if that is on a hub, or it is in memory.
        tensors: The tensors, if they are in memory.
        resized: Whether modules beside the adapter may have another size (`ignore_mismatched_sizes`).
        renamed: Whether names are translated on the way, so that they can be compared at its end only.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path | None,
        tensors: dict[str, Tensor] | None = None,
        resized: bool = False,
        renamed: bool = False,
    ) -> None:
        self.folder = folder
        self.tensors = tensors
        self.resized = resized
        self.renamed = renamed
        self.concerns_toast = False
        self.checksums: dict[str, str] = {}
        self._file: TensorFile | None = None
        method = None if folder is None else method_of(folder)
        self._before = Snapshot(model) if method in (None, METHOD) else None
        if method == METHOD:
            self.open()

    def open(self) -> None:
        """Opens what is to be loaded: from here on, a failure is undone.

        Raises:
            ValueError: If the folder holds no tensors, or the file of them is damaged.
        """
        self.concerns_toast = True
        if self.folder is not None and self._file is None and self.tensors is None:
            path = weights_of(self.folder)
            if not path.exists():
                raise ValueError(
                    f"{path} does not exist: the folder holds an adapter's configuration but no tensors. "
                    "Save the adapter again, or copy both files."
                )
            self._file = TensorFile(path)

    def check(self, model: nn.Module, config: ToastConfig, anatomy: Anatomy) -> None:
        """Compares what is to be loaded with a model that has no layers of the adapter yet.

        Raises:
            ValueError: If it does not fit, or is damaged.
        """
        self.open()
        self.checksums = saved_checksums(config.checksums)
        if self.shapes and not self.renamed:
            check_file(model, config, anatomy, self.what, self.shapes, self.resized)
        self._check_values(model)

    def check_live(self, model: nn.Module, config: ToastConfig, adapter: str) -> None:
        """Compares what is to be loaded with an adapter that the model has already.

        Raises:
            ValueError: If it does not fit, or is damaged.
        """
        self.open()
        self._check_settings(config, adapter)
        if self.shapes and not self.renamed:
            check_live(model, config, adapter, self.what, self.shapes, self.resized)
        self._check_values(model)

    def _check_settings(self, config: ToastConfig, adapter: str) -> None:
        """Refuses tensors that were trained under other settings than the adapter's, which act otherwise."""
        place = None if self.folder is None else self.folder / CONFIG_NAME
        saved = read_json(place) if place is not None and place.is_file() else {}
        names = SETTINGS if config.save_frozen else (*SETTINGS, "feedback_checksum")
        differ = [name for name in names if name in saved and saved[name] != getattr(config, name)]
        if differ:
            name = differ[0]
            raise ValueError(
                f"{place}: {name} is {saved[name]!r}; adapter {adapter!r} of this model has "
                f"{getattr(config, name)!r}. Load it under another name, or delete that adapter first."
            )

    @property
    def what(self) -> str:
        """Where the tensors are, for messages."""
        return "the adapter's tensors" if self._file is None else str(self._file.path)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors; empty if they are on a hub."""
        if self._file is not None:
            return self._file.shapes
        return {name: tuple(tensor.shape) for name, tensor in (self.tensors or {}).items()}

    def whole(self) -> dict[str, Tensor] | None:
        """Returns all tensors, also those that the file leaves out; None if they are on a hub."""
        if self._file is not None:
            return with_initial(dict(self._file.tensors()))
        return None if self.tensors is None else with_initial(self.tensors)

    def undo(self) -> None:
        """Takes the model to where it was, if it is TOAST that has failed."""
        if self.concerns_toast and self._before is not None:
            self._before.restore()

    def _check_values(self, model: nn.Module) -> None:
        if self._file is None:
            refuse_values(self.what, (self.tensors or {}).items(), floating(model))
            return
        assert self.folder is not None
        settings = self.folder / CONFIG_NAME
        checksums = saved_checksums(read_json(settings).get("checksums")) if settings.is_file() else {}
        remedy = f" If it was changed on purpose, remove 'checksums' from {settings}."
        refuse_values(self.what, self._file.tensors(), floating(model), checksums, remedy)


_current: ContextVar[Loading | None] = ContextVar("toast_loading", default=None)


def current() -> Loading | None:
    """Returns the call that loads an adapter now; None if none does, as when one is made."""
    return _current.get()


def check_values(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Checks the values of an adapter's tensors, unless their file has been checked.

    Args:
        model: The model that has the adapter.
        tensors: The tensors by saved names.

    Raises:
        ValueError: If some are no finite numbers, or not what was saved.
    """
    call = current()
    if call is None or call.folder is None:
        checksums = None if call is None else call.checksums
        refuse_values("the saved adapter", tensors.items(), floating(model), checksums)


class Snapshot:
    """What a model is made of, so that a failure can be undone wherever it stopped.

    Parameters are compared by identity: an injection adds and replaces, it writes into none.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        attributes = [module.__dict__ for module in model.modules()]
        contents = [held for each in attributes for held in each.values() if isinstance(held, dict)]
        self.live = [*attributes, *contents]
        self.before = [dict(each) for each in self.live]
        self.trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Puts everything back."""
        for live, before in zip(self.live, self.before, strict=True):
            live.clear()
            live.update(before)
        for parameter, requires_grad in self.trainable:
            parameter.requires_grad_(requires_grad)


@contextmanager
def followed(begin: Callable[[], Loading]) -> Iterator[Loading | None]:
    """Follows a call that loads; of nested ones the outermost counts, so it gives None in an inner one."""
    if _current.get() is not None:
        yield None
        return
    loading = begin()
    token = _current.set(loading)
    try:
        yield loading
    except BaseException:
        loading.undo()
        raise
    finally:
        _current.reset(token)


def method_of(folder: Path) -> str | None:
    """Returns the method of the adapter in a folder; None if its configuration is not there.

    Raises:
        ValueError: If the configuration is damaged, or names no method.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        return None  # on a hub by that name, or a wrong folder; a configuration may have been passed
    method = read_json(path).get("peft_type")
    if not isinstance(method, str):
        raise ValueError(  # noqa: TRY004 - the file is wrong, not the type of the argument
            f"{path} names no method of PEFT: needs text at 'peft_type'; got {method!r}."
        )
    return method
