"""What a saved adapter holds, and what is checked before one is loaded."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from toast.anatomy import Anatomy, unwrapped
from toast.config import ToastConfig
from toast.layer import ToastLayer
from toast.layouts import is_plain, is_transposed
from toast.value import FACTORS

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"

# What PEFT puts before the names of the model.
_PREFIX = "base_model.model."

# The feedback maps in the names of a saved adapter: with factors of TOAST-Lite beside it, it is `base_layer`.
_FEEDBACK = re.compile(r"(?P<map>.*\.toast_to_(?:state|signal))(?:\.base_layer)?\.weight$")
# Behind `modules_to_save` stands the name of an adapter, whatever it is.
_CONTAINER = re.compile(
    r"(?<!\.modules_to_save)\.toast_(task_embedding|channel_transform|to_state|to_signal)(?=\.|$)"
)


def save_adapter(model: PeftModel, folder: str | Path, **options: Any) -> Path:
    """Saves an adapter as `PeftModel.save_pretrained` does, but written beside the folder and then renamed.

    Args:
        model: The wrapped model.
        folder: Where the adapter goes. Its files replace those of an earlier one, each at once and only when
            all are written; other files there stay.
        **options: Further options of `save_pretrained`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        model.save_pretrained(beside, **options)
        written = [path for path in Path(beside).rglob("*") if path.is_file()]
        # The configuration comes last: until it is there, nothing loads what is not complete.
        for path in sorted(written, key=lambda path: path.name == CONFIG_NAME):
            target = folder / path.relative_to(beside)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    return folder


def tensors_to_save(config: ToastConfig, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of one adapter; without the frozen feedback if its source is named."""
    own = {name: tensor for name, tensor in state_dict.items() if _CONTAINER.search(name)}
    return own if config.save_frozen else {n: t for n, t in own.items() if not _is_frozen(n)}


def _is_frozen(name: str) -> bool:
    return _CONTAINER.search(name) is not None and name.endswith(".base_layer.weight")


def without_adapter_name(key: str, adapter: str) -> str:
    """Returns a model's key without the adapter's name, which stands behind each container of adapters.

    From the keys of other modules, such as a head, PEFT has removed it before.
    """
    container = _CONTAINER.search(key)  # the first: the adapter may be named like one
    if container is None:
        return key
    name, behind = key[: container.end()], key[container.end() :].split(".")
    return name + ".".join(["", *behind[2:]] if behind[1:2] == [adapter] else behind)


def check_config(config: ToastConfig, anatomy: Anatomy) -> None:
    """Fills in what a configuration leaves to the model, and checks what it was made for.

    Raises:
        ValueError: If the adapter was made for another backbone, or reads a block that is not there.
    """
    blocks = len(anatomy.blocks)
    if config.select_from is not None and not 0 <= config.select_from < blocks:
        raise ValueError(f"select_from: needs a block from 0 to {blocks - 1}; got {config.select_from}.")
    if config.select_from not in (None, blocks - 1) and not anatomy.is_plain:
        raise ValueError(
            f"select_from: the blocks of {type(anatomy.trunk).__name__} differ in tokens or width, so the "
            f"features of another block than the last ({blocks - 1}) do not fit; got {config.select_from}."
        )
    if config.steer_from and not anatomy.is_plain:
        raise ValueError(
            f"steer_from: the blocks of {type(anatomy.trunk).__name__} differ in tokens or width, so all are "
            f"steered; got {config.steer_from}."
        )
    if config.steer_from >= blocks:
        raise ValueError(f"steer_from: needs a block from 0 to {blocks - 1}; got {config.steer_from}.")
    config.select_features = config.select_features or anatomy.family.select_features  # type: ignore[assignment]
    config.family = anatomy.family.name
    here = fingerprint(anatomy)
    if config.backbone is not None:
        _check_backbone("this adapter", config.backbone, here)
    config.backbone = here


def _check_backbone(what: str, saved: dict[str, Any], here: dict[str, Any]) -> None:
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


def check_tensors(model: nn.Module, config: ToastConfig, adapter: str, tensors: dict[str, Tensor]) -> None:
    """Checks the tensors of a saved adapter against the model, before any is loaded.

    Raises:
        ValueError: If tensors are missing, unexpected or of another shape; it lists them.
    """
    expected = {
        f"{layer_name}.{name}": tuple(parameter.shape)
        for layer_name, layer in model.named_modules()
        if isinstance(layer, ToastLayer)
        for name, parameter in layer.named_parameters()
        if name.startswith("toast_") and name.split(".")[1] == adapter
    }
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items() if _CONTAINER.search(name)}
    if not config.save_frozen:
        expected = {name: shape for name, shape in expected.items() if not _is_frozen(name)}
    _refuse_misfits("the saved adapter", expected, given)


def frozen_tensors(model: nn.Module, config: ToastConfig, adapter: str) -> dict[str, Tensor]:
    """Returns the frozen feedback that is in the model already because the saved adapter leaves it out.

    PEFT would take it for missing.
    """
    if config.save_frozen:
        return {}
    state = model.state_dict()
    return {n: t for n, t in state.items() if _is_frozen(n) and without_adapter_name(n, adapter) != n}


def check_saved(model: nn.Module, config: ToastConfig, anatomy: Anatomy) -> None:
    """Checks the file beside a configuration that was read from a folder, while the model is untouched.

    Only the file's header is read. A folder on a hub is checked when its tensors have come (`check_tensors`).

    Raises:
        ValueError: If the file is damaged, or its tensors are missing, unexpected or of another shape.
    """
    if config.folder is None or not Path(config.folder, WEIGHTS).is_file():
        return
    path = Path(config.folder, WEIGHTS)
    given = {name.removeprefix(_PREFIX): shape for name, shape in _read_shapes(path).items()}
    expected = _shapes_of_adapter(config, anatomy)
    for name, module in model.named_modules():
        if any(name.endswith(saved) for saved in config.modules_to_save or ()):
            module = getattr(module, "original_module", module)
            expected |= {f"{name}.{key}": tuple(t.shape) for key, t in module.state_dict().items()}
            if config.leaves_misfits:  # PEFT leaves out what does not fit, with a warning
                expected |= {n: given[n] for n in expected if n.startswith(f"{name}.") and n in given}
    _refuse_misfits(str(path), expected, {n: s for n, s in given.items() if n in expected or ".toast_" in n})


def _shapes_of_adapter(config: ToastConfig, anatomy: Anatomy) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that a saved adapter holds beside `modules_to_save`."""
    selector = f"{anatomy.norm_name}.toast_"
    shapes: dict[str, tuple[int, ...]] = {
        f"{selector}task_embedding": (anatomy.width,),
        f"{selector}channel_transform": (anatomy.width, anatomy.width),
    }
    for unit in anatomy.units:
        for kind, (out, width) in (
            ("to_state", unit.to_state_shape),
            ("to_signal", (unit.width, unit.width)),
        ):
            parts: dict[str, tuple[int, ...]] = {"weight": (out, width)}
            if config.is_lite:
                rank = config.lora_rank
                parts = {
                    f"lora_A.{FACTORS}.weight": (rank, width),
                    f"lora_B.{FACTORS}.weight": (out, rank),
                }
                parts |= {"base_layer.weight": (out, width)} if config.save_frozen else {}
            shapes |= {f"{unit.name}.toast_{kind}.{part}": shape for part, shape in parts.items()}
    return shapes


def _refuse_misfits(
    what: str, expected: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]]
) -> None:
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    misshapen = [
        f"{name} is {given[name]}, needs {shape}"
        for name, shape in expected.items()
        if given.get(name, shape) != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    found = [f"{len(names)} {what}: {_few(names)}" for what, names in problems.items() if names]
    if found:
        raise ValueError(f"{what} does not fit this model; of its tensors are {'; '.join(found)}.")


def _few(names: list[str], limit: int = 6) -> str:
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def pretrained_tensors(config: ToastConfig, anatomy: Anatomy, backbone: dict[str, Any]) -> dict[str, Tensor]:
    """Reads the pre-tuned adapter that a configuration stands on.

    Args:
        config: Its `pretrained` names the folder; the checksum is compared, or filled in if there is none.
        anatomy: The part of the model that it has to fit.
        backbone: The model's fingerprint.

    Returns:
        Tensors by their saved names; empty if nothing has to be read.

    Raises:
        ValueError: If the adapter is missing, damaged, of another shape, or not the one that was named.
    """
    if config.pretrained is None or (config.feedback_checksum is not None and config.save_frozen):
        return {}
    path = Path(config.pretrained, WEIGHTS)
    if not path.is_file():
        raise ValueError(f"pretrained: {path} is not there. {_HOW_TO_MOVE}")
    read = read_safetensors(path)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in read.items() if _CONTAINER.search(name)}
    feedback = {name: tensor for name, tensor in tensors.items() if _FEEDBACK.match(name)}
    if not feedback or any("lora_" in name for name in tensors):
        raise ValueError(
            f"pretrained: {path} needs the full feedback of {len(anatomy.values)} blocks (a TOAST adapter "
            f"that is not Lite); it holds {len(feedback)} feedback maps."
        )
    config_file = path.with_name(CONFIG_NAME)
    made_for = json.loads(config_file.read_text()).get("backbone") if config_file.is_file() else None
    if made_for is not None:
        _check_backbone(f"pretrained: the adapter in {config.pretrained}", made_for, backbone)
    names = set(_shapes_of_adapter(ToastConfig(), anatomy))
    lower = json.loads(config_file.read_text()).get("steer_from", 0) if config_file.is_file() else 0
    if lower < config.steer_from:  # feedback comes from the top, so that of the lower blocks can be left out
        tensors = {name: tensor for name, tensor in tensors.items() if name in names}
        feedback = {name: tensor for name, tensor in feedback.items() if name in names}
    _refuse_misfits(
        f"pretrained: {path}",
        _shapes_of_adapter(ToastConfig(), anatomy),
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
    )
    digest = checksum(feedback)
    if config.feedback_checksum not in (None, digest):
        raise ValueError(
            f"pretrained: {path} is not the adapter that this one stands on: its feedback has checksum "
            f"{digest}, needed is {config.feedback_checksum}. {_HOW_TO_MOVE}"
        )
    config.feedback_checksum = digest
    return tensors


_HOW_TO_MOVE = (
    "If the pre-tuned adapter is elsewhere now, load the configuration with ToastConfig.from_pretrained, set "
    "its `pretrained` to the folder and pass it as config."
)


def follow_pretrained(config: ToastConfig) -> None:
    """Takes over how a pre-tuned module was used: feedback learnt on some features is no use on others.

    Raises:
        ValueError: If the configuration asks for something else than the pre-tuned adapter's.
    """
    place = None if config.pretrained is None else Path(config.pretrained, CONFIG_NAME)
    if place is None or not place.is_file():
        return
    made_with = json.loads(place.read_text())
    lowest = made_with.get("steer_from", 0)
    if lowest > config.steer_from:
        raise ValueError(
            f"steer_from: the pre-tuned adapter in {config.pretrained} has no feedback below block {lowest}, "
            f"this configuration steers from {config.steer_from}. Pass steer_from={lowest}, or a higher one."
        )
    for name in ("select_from", "select_features", "value_bias"):
        own, saved = getattr(config, name), made_with.get(name)
        if own is None:
            setattr(config, name, saved)
        elif name in made_with and own != saved:
            raise ValueError(
                f"{name}: the pre-tuned adapter in {config.pretrained} was made with {saved!r}, this "
                f"configuration says {own!r}. Pass {name}={saved!r}, or pre-tune again."
            )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        ValueError: If it is not there, cut off, or something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there.")
    try:
        return load_file(path)  # type: ignore[no-any-return]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}.") from error


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}.") from error


def checksum(feedback: dict[str, Tensor]) -> str:
    """Returns the SHA-256 over the feedback maps in float32, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(feedback):
        match = _FEEDBACK.match(name)
        assert match is not None
        digest.update(match["map"].encode())
        digest.update(feedback[name].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_pretrained(model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> None:
    """Starts an adapter from the tensors of a pre-tuned one; under Lite the feedback is the frozen part."""
    if not tensors:
        return
    by_place = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.rpartition(".toast_")
        by_place[layer, "toast_" + rest.removesuffix(".weight")] = tensor
    for layer_name, layer in model.named_modules():
        if not isinstance(layer, ToastLayer):
            continue
        containers: tuple[str, ...] = layer.adapter_layer_names  # type: ignore[assignment]
        for container in containers:
            held: Any = getattr(layer, container)
            tensor = by_place[layer_name, container]
            if isinstance(held, nn.ParameterDict):
                _put(held, adapter, tensor)
            else:
                _put(unwrapped(held[adapter]), "weight", tensor)


def put_back(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives parameters whose values Accelerate has lost the ones that were loaded into them."""
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and name in tensors:
            holder, _, leaf = name.rpartition(".")
            _put(model.get_submodule(holder), leaf, tensors[name])


def _put(holder: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces a parameter, also where the new ones are made without storage (`low_cpu_mem_usage`)."""
    old = holder._parameters[name]
    assert old is not None
    device = "cpu" if old.is_meta else old.device
    new = nn.Parameter(tensor.to(device, old.dtype, copy=True), requires_grad=old.requires_grad)
    # Otherwise transformers draws anew what it does not find in the adapter's own file.
    new._is_hf_initialized = True  # type: ignore[attr-defined]
    # Not by assignment, which moves the parameter back to the meta device while PEFT makes an empty adapter.
    holder._parameters[name] = new
