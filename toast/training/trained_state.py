"""What a run trains, taken out of its model and put back: whole, or the part that each process holds.

Under FSDP a trained tensor is a `DTensor`, of which each process has some rows. It is kept by its name and
its whole shape, so what any number of processes has written goes into any other number of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.constants import OPTIMIZER_NAME, SCALER_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor import DTensor, distribute_tensor

from toast.files.shapes import refuse_misfits
from toast.files.tensors import read_safetensors, refuse_values, unpickled
from toast.saving.names import is_of_adapter

#: In a checkpoint: the weights, whole; or the folder in which each process has written its part of weights
#: and optimiser.
TRAINED, SHARDS = "trained.safetensors", "shards"
_OPTIMIZER, _SCALER = f"{OPTIMIZER_NAME}.bin", SCALER_NAME


def trained_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Returns what training changes: trained parameters, and buffers such as batch statistics."""
    module = accelerator.unwrap_model(model)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    persistent = module.state_dict()
    buffers = {name for name, _ in module.named_buffers() if name in persistent}
    kept = {name: persistent[name] for name in sorted(trained | buffers)}
    return {name: value.detach().contiguous().clone() for name, value in kept.items()}


def put_back(accelerator: Accelerator, model: nn.Module, held: Mapping[str, Tensor]) -> None:
    """Puts what `trained_state` returned into the model, in whichever parts the model holds it.

    Raises:
        ValueError: If the model trains something else.
    """
    trained = trained_state(accelerator, model)
    _refuse_others(trained, {name: value.shape for name, value in held.items()})
    parts = {name: spread(value, trained[name]) for name, value in held.items()}
    accelerator.unwrap_model(model).load_state_dict(parts, strict=False)


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor whole; of one that is sharded, every process has to ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    # A part that is kept in the CPU's memory goes where its process group can send it.
    here: Any = tensor.to(tensor.device_mesh.device_type)
    return here.full_tensor()  # type: ignore[no-any-return]


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns this process's part of a whole tensor, if another one of its shape is sharded."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return tensor
    # Every process has read all of it. What a part is cut from does not stay in memory.
    cut = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return cut.clone()


def elements(parameter: Tensor) -> int:
    """Returns how many numbers a parameter has, also one that ZeRO-3 has partitioned, which looks empty."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _is_partitioned(parameter: Tensor) -> bool:
    """Whether a parameter is one of DeepSpeed's ZeRO-3."""
    return hasattr(parameter, "ds_id")


def adapter_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor] | None:
    """Returns what is saved of a sharded model, whole and in the CPU's memory; every process has to ask.

    The frozen backbone is left out.

    Args:
        accelerator: What sharded it.
        model: The model that is saved, a part of what was sharded.

    Returns:
        Tensors by name; none in the processes that do not write. None if nothing is sharded.
    """
    held: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if not any(isinstance(value, DTensor) or _is_partitioned(value) for value in held.values()):
        return None
    kept = {
        name: value.detach() if isinstance(value, DTensor) else value
        for name, value in held.items()
        if value.requires_grad
        or not isinstance(value, nn.Parameter)
        or is_of_adapter(name)
        or ".modules_to_save." in name
    }
    return dict(for_main(accelerator, kept))


def save_state(accelerator: Accelerator, folder: Path) -> None:
    """Writes weights and optimiser of a sharded run, as its state dicts are configured: full or sharded.

    A full one is what a run on one process writes.
    """
    trained = trained_state(accelerator, accelerator._models[0])
    optimizer = accelerator._optimizers[0].state_dict()
    states: dict[int, dict[str, Any]] = optimizer["state"]
    sharded = {
        f"optimizer/{index}/{key}": value
        for index, state in states.items()
        for key, value in state.items()
        if isinstance(value, DTensor)
    }
    if accelerator.state.fsdp_plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT:
        tensors = {f"weights/{name}": value for name, value in trained.items()} | sharded
        save(tensors, checkpoint_id=folder / SHARDS)
        found: dict[str, Tensor] = {}
    else:
        weights = dict(for_main(accelerator, trained))
        if accelerator.is_main_process:
            save_file(weights, folder / TRAINED)
        found = dict(for_main(accelerator, sharded))
    if accelerator.is_main_process:
        rest = {
            index: {key: value for key, value in state.items() if not isinstance(value, DTensor)}
            for index, state in states.items()
        }
        optimizer["state"] = _with(rest, found)
        torch.save(optimizer, folder / _OPTIMIZER)
        if accelerator.scaler is not None:
            torch.save(accelerator.scaler.state_dict(), folder / _SCALER)


def load_state(accelerator: Accelerator, folder: Path) -> None:
    """Reads weights and optimiser, whichever processes have written them and whichever read.

    Raises:
        ValueError: If they are of another model, or damaged.
    """
    model, optimizer = accelerator._models[0], accelerator._optimizers[0]
    held: dict[str, Any] = unpickled(folder / _OPTIMIZER)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if (folder / SHARDS).is_dir():
        trained = trained_state(accelerator, model)
        weights, found = _read_shards(folder / SHARDS, trained, parameters)
    else:
        weights, found = read_safetensors(folder / TRAINED), {}
        refuse_values(str(folder / TRAINED), weights.items(), lambda _: False)
    states: dict[int, dict[str, Any]] = {
        index: {k: spread(v, parameters[index]) if isinstance(v, Tensor) else v for k, v in state.items()}
        for index, state in held["state"].items()
    }
    put_back(accelerator, model, weights)
    if accelerator.scaler is not None and (folder / _SCALER).is_file():
        accelerator.scaler.load_state_dict(unpickled(folder / _SCALER))
    optimizer.load_state_dict({**held, "state": _with(states, found)})


def _read_shards(
    folder: Path, trained: Mapping[str, Tensor], parameters: list[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Reads the weights by name and the optimiser's tensors, each process its part."""
    reader = FileSystemReader(folder)
    kinds = {
        name: kind
        for name, kind in reader.read_metadata().state_dict_metadata.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    _refuse_others(trained, {n.removeprefix("weights/"): k.size for n, k in kinds.items() if _is_weight(n)})
    tensors: dict[str, Any] = {}
    for name, kind in kinds.items():
        like = trained[name.removeprefix("weights/")] if _is_weight(name) else parameters[_index(name)]
        tensors[name] = torch.empty_like(like, dtype=kind.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process
        load(tensors, storage_reader=reader)
    weights = {n.removeprefix("weights/"): t for n, t in tensors.items() if _is_weight(n)}
    return weights, {n: t for n, t in tensors.items() if not _is_weight(n)}


def _is_weight(name: str) -> bool:
    return name.startswith("weights/")


def _index(name: str) -> int:
    return int(name.split("/")[1])


def _with(states: Mapping[int, Mapping[str, Any]], found: Mapping[str, Tensor]) -> dict[int, dict[str, Any]]:
    """Returns an optimiser's states with further tensors, named `optimizer/INDEX/KEY`."""
    kept = {index: dict(state) for index, state in states.items()}
    for name, tensor in found.items():
        kept.setdefault(_index(name), {})[name.split("/", 2)[2]] = tensor
    return kept


def for_main(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields tensors whole, in the CPU's memory, to the process that writes; gathers one at a time."""
    for name, tensor in tensors.items():
        with _gathering(tensor):
            gathered = whole(tensor)
            if accelerator.is_main_process:
                yield name, gathered.detach().cpu().clone()


def _gathering(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes a parameter of ZeRO-3 whole; every process has to enter."""
    if not _is_partitioned(tensor):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])  # type: ignore[no-any-return]


def _refuse_others(trained: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> None:
    refuse_misfits("what was trained", {name: value.shape for name, value in trained.items()}, shapes)
