"""The names of an adapter's tensors, in a model and in a file."""

from __future__ import annotations

import re

from toast.compiled import COMPILED

#: Stands in the names of the tensors of TOAST-Lite's factors, which PEFT's LoRA layer gave them in older
#: adapters.
FACTORS = "low_rank"

#: What holds an adapter's tensors, in names of a model and of a file. Behind `modules_to_save` stands the
#: name of an adapter, whatever it is.
CONTAINER = re.compile(
    r"(?<!\.modules_to_save)\.toast_(task_embedding|channel_transform|to_state|to_signal)(?=\.|$)"
)


def is_of_adapter(name: str) -> bool:
    """Whether a parameter or module is a TOAST adapter's own, by its name in a model, a layer or a file."""
    return CONTAINER.search(f".{name}") is not None


def is_frozen(name: str) -> bool:
    """Whether a tensor is frozen feedback of TOAST-Lite."""
    return CONTAINER.search(name) is not None and name.endswith(".base_layer.weight")


def without_adapter_name(key: str, adapter: str) -> str:
    """Returns a model's key without the adapter's name, which stands behind each container of adapters.

    From the keys of other modules, such as a head, PEFT has removed it before.
    """
    container = CONTAINER.search(key)  # the first: the adapter may be named like one
    if container is None:
        return as_written(key)
    name, behind = as_written(key[: container.end()]), key[container.end() :].split(".")
    return name + ".".join(["", *behind[2:]] if behind[1:2] == [adapter] else behind)


def as_written(name: str) -> str:
    """Returns the name that a module or tensor has where no module is compiled by itself."""
    return ".".join(part for part in name.split(".") if part != COMPILED)
