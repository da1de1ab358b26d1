"""The pre-tuned adapter that another one starts from, or stands on: read, compared, put in."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from toast.config import ToastConfig
from toast.families.anatomy import Anatomy, unwrapped
from toast.files.adapter_folder import PREFIX, weights_of
from toast.files.json_files import read_json
from toast.files.shapes import refuse_misfits
from toast.files.tensors import TensorFile, refuse_values
from toast.injection.fitting import check_backbone, saved_checksums, shapes_of_adapter
from toast.injection.shares import placed
from toast.layer import ToastLayer
from toast.saving.initial import whole_shapes, with_initial
from toast.saving.names import CONTAINER, as_written, is_frozen, without_adapter_name

# The feedback maps in the names of a saved adapter: with factors of TOAST-Lite beside it, it is `base_layer`.
_FEEDBACK = re.compile(r"(?P<map>.*\.toast_to_(?:state|signal))(?:\.base_layer)?\.weight$")


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
    path = weights_of(Path(config.pretrained))
    if not path.exists():
        raise ValueError(f"pretrained: {path} does not exist. {_HOW_TO_MOVE}")
    file = TensorFile(path)
    made_with = _settings(config.pretrained, backbone["blocks"])
    if not any(_FEEDBACK.match(name) for name in whole_shapes(file.shapes)):
        raise ValueError(_NOT_FULL.format(path, len(anatomy.values), 0))
    refuse_values(
        f"pretrained: {path}", file.tensors(), checksums=saved_checksums(made_with.get("checksums"))
    )
    read = with_initial(dict(file.tensors()))
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in read.items() if CONTAINER.search(name)}
    feedback = {name: tensor for name, tensor in tensors.items() if _FEEDBACK.match(name)}
    if any("lora_" in name for name in tensors):
        raise ValueError(_NOT_FULL.format(path, len(anatomy.values), len(feedback)))
    made_for = made_with.get("backbone")
    if made_for is not None:
        check_backbone(f"pretrained: the adapter in {config.pretrained}", made_for, backbone)
    names = set(shapes_of_adapter(ToastConfig(), anatomy))
    if made_with.get("steer_from", 0) < config.steer_from:
        # Feedback comes from the top, so that of the lower blocks can be left out.
        tensors = {name: tensor for name, tensor in tensors.items() if name in names}
        feedback = {name: tensor for name, tensor in feedback.items() if name in names}
    refuse_misfits(
        f"pretrained: {path}",
        shapes_of_adapter(ToastConfig(), anatomy),
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
    )
    digest = checksum(feedback)
    if config.feedback_checksum not in (None, digest):
        raise ValueError(
            f"pretrained: {path} is not the adapter that this one builds on: its feedback has checksum "
            f"{digest}, expected is {config.feedback_checksum}. {_HOW_TO_MOVE}"
        )
    config.feedback_checksum = digest
    return tensors


_NOT_FULL = (
    "pretrained: {} needs the full feedback of {} blocks (a TOAST adapter that is not Lite); it holds {} "
    "feedback maps."
)

_HOW_TO_MOVE = (
    "If the pre-tuned adapter is elsewhere now, load the configuration with ToastConfig.from_pretrained, set "
    "its `pretrained` to the folder and pass it as config."
)


def follow_pretrained(config: ToastConfig, blocks: int) -> None:
    """Takes over how a pre-tuned module was used: feedback learnt on some features is no use on others.

    Raises:
        ValueError: If the configuration asks for something else than the pre-tuned adapter's.
    """
    made_with = {} if config.pretrained is None else _settings(config.pretrained, blocks)
    if not made_with:
        return
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


def _settings(folder: str, blocks: int) -> dict[str, Any]:
    """Reads how a pre-tuned adapter was made; nothing if its configuration is not there."""
    path = Path(folder, CONFIG_NAME)
    if not path.exists():
        return {}
    made_with = placed(read_json(path), blocks)
    for name, kinds in (("steer_from", int), ("backbone", dict | None)):
        if name in made_with and not isinstance(made_with[name], kinds):  # type: ignore[arg-type]
            raise ValueError(f"{path}: {name} is {made_with[name]!r}; the file is damaged.")
    return made_with


def checksum(feedback: dict[str, Tensor]) -> str:
    """Returns the SHA-256 over the feedback maps in float32, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(feedback):
        match = _FEEDBACK.match(name)
        assert match is not None
        digest.update(match["map"].encode())
        digest.update(feedback[name].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def frozen_tensors(model: nn.Module, config: ToastConfig, adapter: str) -> dict[str, Tensor]:
    """Returns the frozen feedback that is in the model already because the saved adapter leaves it out.

    PEFT would take it for missing.
    """
    if config.save_frozen:
        return {}
    state = model.state_dict()
    return {
        n: t for n, t in state.items() if is_frozen(n) and without_adapter_name(n, adapter) != as_written(n)
    }


def load_pretrained(model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> None:
    """Starts an adapter from the tensors of a pre-tuned one; under Lite the feedback is the frozen part."""
    if not tensors:
        return
    by_place = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.rpartition(".toast_")
        by_place[layer, "toast_" + rest.removesuffix(".weight")] = tensor
    for layer_name, layer in model.named_modules():
        if not isinstance(layer, ToastLayer) or adapter not in layer.configs:
            continue
        containers: tuple[str, ...] = layer.adapter_layer_names  # type: ignore[assignment]
        for container in containers:
            held: Any = getattr(layer, container)
            tensor = by_place[as_written(layer_name), container]
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
