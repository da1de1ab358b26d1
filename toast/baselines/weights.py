"""What was trained and is no PEFT adapter: saved, checked against a model, and loaded into it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from toast.baselines import adaptformer, attentive, vpt
from toast.families.layouts import is_plain
from toast.files.atomic import named, replace_all
from toast.files.json_files import read_json
from toast.files.shapes import refuse_misfits
from toast.files.tensors import checksum, read_safetensors, refuse_values

WEIGHTS = "trained.safetensors"
METHOD = "method.json"

#: Format of `method.json`.
FORMAT = 1

_OPTIONS = (dict, type(None))
_ENTRIES: dict[str, Any] = {
    "parameters": dict, "base": dict, "prompts": _OPTIONS, "adapters": _OPTIONS, "probe": _OPTIONS,
}  # fmt: skip

#: Weights of the frozen base that are kept to know it again, and values of each.
_KNOWN_BY, _VALUES = 2, 8


def save_trained(
    model: nn.Module, folder: str | Path, meta: dict[str, Any], gathered: Mapping[str, Tensor] | None = None
) -> Path:
    """Saves every trained tensor that PEFT does not save, with what is needed to load it.

    These are the parameters that require gradients, and the running statistics of batch norms, which training
    moves too. The files are written beside the folder and renamed, `method.json` last.

    Args:
        model: A model, or one that PEFT wrapped; names are those of its base.
        folder: Where `trained.safetensors` and `method.json` go; other files there stay.
        meta: What to keep of the run, as JSON: at least `method`, the method's name.
        gathered: Of a sharded model, what it holds in parts, whole, by its names.

    Returns:
        The folder.

    Raises:
        ValueError: If the method is not named, or nothing is trained outside of PEFT.
    """
    if not isinstance(meta.get("method"), str):
        raise ValueError(  # noqa: TRY004 - an entry is wrong, not the type of the argument
            f"meta: needs the method's name at 'method'; got {meta.get('method')!r}."
        )
    folder = named(folder)
    base = _base(model)
    tensors = _trained(base, _of_peft(model))
    if gathered is not None:
        prefix = next(n for n, m in model.named_modules() if m is base)
        tensors = {name: gathered[f"{prefix}.{name}".lstrip(".")] for name in tensors}
    if not tensors:
        raise ValueError(
            f"{type(base).__name__} has no trained tensors beside PEFT's; choose them with train_only first."
        )
    prompts, adapters = vpt.find_prompts(base), adaptformer.find_adapters(base)
    probe = attentive.find_probe(base)
    described = {
        "format": FORMAT,
        **meta,
        "prompts": prompts.options if prompts else None,
        "adapters": adapters[0].options if adapters else None,
        "probe": probe.options if probe else None,
        "parameters": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "checksums": {name: checksum(tensor) for name, tensor in tensors.items()},
        "base": _fingerprint(base, set(tensors)),
    }
    text = json.dumps(described, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        save_file({name: t.detach().cpu().clone() for name, t in tensors.items()}, Path(beside, WEIGHTS))
        Path(beside, METHOD).write_text(text)
        replace_all([(Path(beside, name), folder / name) for name in (WEIGHTS, METHOD)])
    return folder


def read_method(folder: str | Path) -> dict[str, Any]:
    """Reads `method.json`.

    Raises:
        ValueError: If it is not there, damaged, or of another format.
    """
    path = Path(folder, METHOD)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; needs a folder that save_trained wrote.")
    method = read_json(path)
    if method.get("format") != FORMAT:
        raise ValueError(f"{path}: needs format {FORMAT}; got {method.get('format')!r}.")
    for name, kinds in _ENTRIES.items():
        if not isinstance(method.get(name), kinds):
            raise ValueError(f"{path} is damaged: {name} is {method.get(name)!r}.")  # noqa: TRY004 - a file's
    return method


def load_trained(model: nn.Module, folder: str | Path) -> dict[str, Any]:
    """Loads what `save_trained` saved, in place.

    Prompts, adapters and a probe are put in where the model has none yet; the head has to have its number of
    classes already (`reset_head`).

    Args:
        model: The base that was trained on, or one that PEFT wrapped in the same way.
        folder: The folder.

    Returns:
        What `method.json` says.

    Raises:
        ValueError: If a file is missing or damaged, a tensor does not fit, was not trained or is not finite,
            or the frozen weights are others than those of the base that was trained on; the model is
            unchanged then.
    """
    method = read_method(folder)
    path = Path(folder, WEIGHTS)
    tensors = read_safetensors(path)
    saved: Any = method["parameters"]
    base = _base(model)
    added, attach = _missing_parts(base, method)
    here = _named_tensors(base)
    known = here | added
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    refuse_misfits(str(path), saved, given, to=f"its {METHOD}")
    refuse_misfits(
        str(path),
        {name: known[name].shape for name in known if name in saved or name in added},
        given,
        advice=f" Needs the {type(base).__name__} that was trained on, and as many classes (reset_head).",
    )
    _check_base(path, method["base"], here)
    refuse_values(
        str(path),
        tensors.items(),
        lambda name: known[name].is_floating_point(),
        method.get("checksums"),
        f" If it was changed on purpose, remove 'checksums' from {Path(folder, METHOD)}.",
    )
    for put_in in attach:
        put_in()
    with torch.no_grad():
        here = _named_tensors(base)
        for name, tensor in tensors.items():
            here[name].copy_(tensor)
    return method


def _base(model: nn.Module) -> nn.Module:
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def _of_peft(model: nn.Module) -> set[Tensor]:
    """Returns the parameters that PEFT saves itself."""
    held: set[Tensor] = set()
    for module in model.modules():
        containers: list[Any] = []
        if isinstance(module, BaseTunerLayer):
            containers = [getattr(module, name, None) for name in module.adapter_layer_names]
        elif isinstance(module, ModulesToSaveWrapper):
            containers = [module.modules_to_save]
        elif isinstance(module, PeftModel):
            containers = [getattr(module, "prompt_encoder", None)]
        for container in containers:
            held.update(container.parameters() if isinstance(container, nn.Module) else ())
    return held


def _trained(base: nn.Module, of_peft: set[Tensor]) -> dict[str, Tensor]:
    trained: dict[str, Tensor] = {
        name: parameter
        for name, parameter in base.named_parameters()
        if parameter.requires_grad and parameter not in of_peft
    }
    if not trained:
        return {}
    for path, module in base.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            trained |= {f"{path}.{name}": buffer for name, buffer in module.named_buffers()}
    return trained


def _named_tensors(base: nn.Module) -> dict[str, Tensor]:
    return {**dict(base.named_parameters()), **dict(base.named_buffers())}


def _missing_parts(base: nn.Module, method: dict[str, Any]) -> tuple[dict[str, Tensor], list[Any]]:
    """Makes the parts that the model lacks: their tensors by name, and how to put them in."""
    added: dict[str, Tensor] = {}
    attach: list[Any] = []
    if method["prompts"] and vpt.find_prompts(base) is None:
        anatomy, prompts = vpt.make_prompts(base, **method["prompts"])
        place = ".".join(part for part in (anatomy.trunk_name, vpt.NAME) if part)
        added |= {f"{place}.{name}": parameter for name, parameter in prompts.named_parameters()}
        attach.append(lambda: vpt.attach_prompts(anatomy, prompts))
    if method["adapters"] and not adaptformer.find_adapters(base):
        parts, made = adaptformer.make_adapters(base, **method["adapters"])
        for path, adapters in made.items():
            place = ".".join(part for part in (parts.trunk_name, path, adaptformer.NAME) if part)
            for name, parameter in nn.ModuleList(adapters).named_parameters():
                added[f"{place}.{name}"] = parameter
        attach.append(lambda: adaptformer.attach_adapters(parts, made))
    if method.get("probe") and attentive.find_probe(base) is None:
        seen, head, probe = attentive.make_probe(base, **method["probe"])
        place = ".".join(part for part in (seen.trunk_name, attentive.NAME) if part)
        added |= {f"{place}.{name}": parameter for name, parameter in probe.named_parameters()}
        attach.append(lambda: attentive.attach_probe(seen, head, probe))
    return added, attach


def _fingerprint(base: nn.Module, trained: set[str]) -> dict[str, list[float]]:
    """Returns a few values of the first and the last frozen matrix; none if all were trained."""
    frozen = [
        (name, parameter)
        for name, parameter in base.named_parameters()
        if name not in trained and parameter.ndim > 1 and _has_values(parameter)
    ]
    picked = [*frozen[:1], *frozen[1:][1 - _KNOWN_BY :]]
    return {name: _values(parameter) for name, parameter in picked}


def _has_values(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point and not tensor.is_meta and is_plain(tensor)


def _values(tensor: Tensor) -> list[float]:
    flat = tensor.detach().flatten()
    picked = flat[:: max(1, len(flat) // _VALUES)][:_VALUES].float()
    return [round(value, 6) for value in picked.tolist()]


def _check_base(path: Path, saved: dict[str, list[float]], here: dict[str, Tensor]) -> None:
    """Compares with a wide tolerance, so that a base in another precision is still the same base."""
    for name, values in saved.items():
        if name not in here:
            raise ValueError(f"{path} was trained on a base with {name}, which this model lacks.")
        if not _has_values(here[name]):
            continue
        a, b = torch.tensor(values), torch.tensor(_values(here[name]))
        if a.shape != b.shape or (a - b).abs().max() > 0.25 * a.std(correction=0) + 1e-4:
            raise ValueError(
                f"{path} was trained on a base with other weights (a few values of {name} differ). Load the "
                "base that it was trained on."
            )
