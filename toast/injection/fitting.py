"""What is refused before an adapter goes into a model: another backbone, other tensors, damaged values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from toast.config import ToastConfig
from toast.families.anatomy import Anatomy
from toast.families.layouts import is_plain, is_transposed
from toast.files.adapter_folder import PREFIX
from toast.files.shapes import refuse_misfits
from toast.injection.shares import PLACES, block_of, place_shares
from toast.layer import ToastLayer
from toast.saving.initial import whole_shapes
from toast.saving.names import FACTORS, as_written, is_frozen, is_of_adapter, without_adapter_name

Shapes = dict[str, tuple[int, ...]]

# What PEFT puts into the names of the modules that it keeps beside an adapter.
_WRAPPED = re.compile(r"(?<=\.)(original_module|modules_to_save\.[^.]+)\.")


def check_config(config: ToastConfig, anatomy: Anatomy) -> None:
    """Fills in what a configuration leaves to the model, and checks what it was made for.

    Raises:
        ValueError: If the adapter was made for another backbone, or reads a block that is not there.
    """
    blocks = len(anatomy.blocks)
    if not anatomy.is_plain:
        _refuse_places(config, anatomy)
        place_shares(config, blocks)
    for name in PLACES:  # a field may have been set since the configuration was made
        block = getattr(config, name)
        is_open = name == "select_from" and block is None
        if not is_open and not (isinstance(block, int) and 0 <= block < blocks):
            raise ValueError(f"{name}: needs a block from 0 to {blocks - 1}; got {block!r}.")
    config.select_features = config.select_features or anatomy.family.select_features  # type: ignore[assignment]
    config.family = anatomy.family.name
    here = fingerprint(anatomy)
    if config.backbone is not None:
        check_backbone("this adapter", config.backbone, here)
    config.backbone = here


def _refuse_places(config: ToastConfig, anatomy: Anatomy) -> None:
    last = len(anatomy.blocks) - 1
    why = f"the blocks of {type(anatomy.trunk).__name__} differ in tokens or width, so"
    if block_of(config.select_from, last + 1) not in (None, last):
        raise ValueError(
            f"select_from: {why} the features of another block than the last ({last}) do not fit; "
            f"got {config.select_from}."
        )
    if block_of(config.steer_from, last + 1):
        raise ValueError(f"steer_from: {why} all are steered; got {config.steer_from}.")


def check_backbone(what: str, saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuses a model that something was not made for.

    Args:
        what: What was made, for messages.
        saved: The fingerprint of the backbone that it was made for.
        here: That of the model.
    """
    for name in ("family", "blocks", "width", "value_width"):
        if name in saved and saved[name] != here[name]:
            raise ValueError(
                f"{what} was made for another backbone: its {name.replace('_', ' ')} is {saved[name]}, "
                f"this model's {here[name]}."
            )
    if not _alike(saved.get("weights"), here["weights"]):
        raise ValueError(
            f"{what} was made for a backbone with other weights (a few values of its value projections "
            "differ). Load the backbone that it was trained on, or, if the weights were changed on purpose, "
            "load the configuration with ToastConfig.from_pretrained, set backbone=None, pass it as config."
        )


def fingerprint(anatomy: Anatomy) -> dict[str, Any]:
    """Says what an adapter is made for: family, blocks, widths, and 16 weights of the value projections.

    The weights are compared with a wide tolerance, so a base in another precision is still the same base.
    """
    weights: list[float] = []
    for projection in (anatomy.values[0], anatomy.values[-1]):
        weight = next(p for p in projection.parameters() if p.ndim > 1)
        if weight.is_meta or not weight.dtype.is_floating_point or not is_plain(weight):
            return _shapes(anatomy) | {"weights": None}
        rows = weight.detach().T if is_transposed(projection) else weight.detach()
        row = rows[anatomy.units[0].layout.start].flatten()
        picked = row[:: max(1, len(row) // 8)][:8].float()
        weights += [round(value, 6) for value in picked.tolist()]
    return _shapes(anatomy) | {"weights": weights}


def _shapes(anatomy: Anatomy) -> dict[str, Any]:
    return {
        "family": anatomy.family.name,
        "blocks": len(anatomy.units),
        "width": anatomy.width,
        "value_width": anatomy.units[0].layout.value_width,
    }


def _alike(saved: list[float] | None, here: list[float] | None) -> bool:
    if saved is None or here is None or len(saved) != len(here):
        return True
    a, b = torch.tensor(saved), torch.tensor(here)
    return bool((a - b).abs().max() <= 0.25 * a.std() + 1e-4)


def check_file(
    model: nn.Module, config: ToastConfig, anatomy: Anatomy, what: str, shapes: Shapes, resized: bool = False
) -> None:
    """Checks names and shapes of a saved adapter, while the model is untouched.

    Args:
        model: The model without the adapter.
        config: The adapter's configuration.
        anatomy: The part of the model that is steered.
        what: Where the tensors are, for messages.
        shapes: The shapes of the saved tensors.
        resized: Whether modules beside the adapter, such as a head, may have another size than the saved ones
            (`ignore_mismatched_sizes`).

    Raises:
        ValueError: If tensors are missing, unexpected or of another shape; it lists them.
    """
    given = {as_written(name.removeprefix(PREFIX)): shape for name, shape in whole_shapes(shapes).items()}
    beside: Shapes = {}
    for name, module in model.named_modules():
        if any(name.endswith(saved) for saved in config.modules_to_save or ()):
            module = getattr(module, "original_module", module)
            beside |= {as_written(f"{name}.{key}"): tuple(t.shape) for key, t in module.state_dict().items()}
    _compare(what, shapes_of_adapter(config, anatomy), beside, embeddings(model), given, resized)


def check_live(
    model: nn.Module, config: ToastConfig, adapter: str, what: str, shapes: Shapes, resized: bool = False
) -> None:
    """Checks names and shapes of a saved adapter against one of a model, as `check_file` does.

    Args:
        model: The model, with or without PEFT's class around it.
        config: The adapter's configuration.
        adapter: Its name.
        what: Where the tensors are, for messages.
        shapes: The shapes of the saved tensors.
        resized: As in `check_file`.
    """
    beside: Shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            own = module.state_dict()
            for saved, key in module.adapter_state_dict_load_map(adapter).items():
                beside[as_written(f"{name}.{saved}").removeprefix(PREFIX)] = tuple(own[key].shape)
    given = {as_written(name.removeprefix(PREFIX)): shape for name, shape in whole_shapes(shapes).items()}
    _compare(what, _live_shapes(model, config, adapter), beside, embeddings(model), given, resized)


def check_tensors(model: nn.Module, config: ToastConfig, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Checks the tensors that PEFT is about to put into a model that has the adapter already.

    Args:
        model: The model, with or without PEFT's class around it.
        config: The adapter's configuration.
        adapter: Its name.
        tensors: The tensors by saved names; PEFT has given those of `modules_to_save` the model's names.

    Raises:
        ValueError: If tensors are missing, unexpected or of another shape; it lists them.
    """
    given = {name.removeprefix(PREFIX): tuple(tensor.shape) for name, tensor in tensors.items()}
    beside = {
        f"{name}.{key}".removeprefix(PREFIX)
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for pair in module.adapter_state_dict_load_map(adapter).items()
        for key in pair
    }
    beside |= embeddings(model).keys()
    # PEFT compares the shapes of what is no part of the method, or leaves out what differs if it is told to.
    own = {name: shape for name, shape in given.items() if name not in beside}
    refuse_misfits("the saved adapter", _live_shapes(model, config, adapter), own)


def saved_checksums(saved: Any) -> dict[str, str]:
    """Returns the checksums in a saved configuration, by the names in the file beside it."""
    known = saved if isinstance(saved, dict) else {}
    return {key: value for name, value in known.items() for key in (name, PREFIX + name)}


def floating(model: nn.Module) -> Callable[[str], bool]:
    """Returns what says by name whether a saved tensor has to hold floating-point numbers.

    All have to, but what a module beside the adapter counts or looks up.
    """
    whole = {
        _plain(name)
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and not tensor.is_floating_point()
    }
    return lambda name: _plain(name) not in whole


def _plain(name: str) -> str:
    return _WRAPPED.sub("", name.removeprefix(PREFIX))


def embeddings(model: nn.Module) -> Shapes:
    """Returns the tensors of the vocabulary, which PEFT saves with an adapter where it was resized."""
    wrapped: Any = model
    base: Any = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        tables = [base.get_input_embeddings(), base.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return {}
    return {
        f"{name}.{key}": tuple(tensor.shape)
        for name, module in base.named_modules()
        if isinstance(module, nn.Embedding | nn.Linear) and any(module is table for table in tables)
        for key, tensor in module.state_dict().items()
    }


def _compare(what: str, own: Shapes, beside: Shapes, optional: Shapes, given: Shapes, resized: bool) -> None:
    if resized:  # PEFT leaves out what has another size, and says so
        optional = {n: given.get(n, shape) for n, shape in optional.items()}
        beside = {n: given.get(n, shape) for n, shape in beside.items()}
    try:
        refuse_misfits(what, own | beside | {n: s for n, s in optional.items() if n in given}, given)
    except ValueError as error:
        if any(given.get(name, shape) != shape for name, shape in optional.items() if name not in beside):
            raise ValueError(
                f"{error} The adapter was saved with a resized vocabulary: call resize_token_embeddings on "
                "the model first."
            ) from None
        raise


def _live_shapes(model: nn.Module, config: ToastConfig, adapter: str) -> Shapes:
    """Returns the shapes of an adapter's parameters by their saved names."""
    return {
        without_adapter_name(f"{layer_name}.{name}", adapter).removeprefix(PREFIX): tuple(parameter.shape)
        for layer_name, layer in model.named_modules()
        if isinstance(layer, ToastLayer)
        for name, parameter in layer.named_parameters()
        if is_of_adapter(name) and name.split(".")[1] == adapter
        if config.save_frozen or not is_frozen(f".{name}")
    }


def shapes_of_adapter(config: ToastConfig, anatomy: Anatomy) -> Shapes:
    """Returns the shapes of the tensors that a saved adapter holds beside `modules_to_save`."""
    selector = f"{as_written(anatomy.norm_name)}.toast_"
    shapes: Shapes = {
        f"{selector}task_embedding": (anatomy.width,),
        f"{selector}channel_transform": (anatomy.width, anatomy.width),
    }
    for unit in anatomy.units:
        for kind, (out, width) in (
            ("to_state", unit.to_state_shape),
            ("to_signal", (unit.width, unit.width)),
        ):
            parts: Shapes = {"weight": (out, width)}
            if config.is_lite:
                rank = config.lora_rank
                parts = {
                    f"lora_A.{FACTORS}.weight": (rank, width),
                    f"lora_B.{FACTORS}.weight": (out, rank),
                }
                parts |= {"base_layer.weight": (out, width)} if config.save_frozen else {}
            shapes |= {f"{as_written(unit.name)}.toast_{kind}.{part}": shape for part, shape in parts.items()}
    return shapes
