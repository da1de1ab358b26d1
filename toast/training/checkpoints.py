"""Checkpoints of a run: through Accelerate, of what is trained alone, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils.constants import OPTIMIZER_NAME, SCALER_NAME
from safetensors.torch import load_file, save_file
from torch import nn

from toast.reading import checksum_file, read_json, refuse_values
from toast.training.folder import write_json

_TRAINED = "trained.safetensors"
_PROGRESS = "progress.json"
# In the progress: the checksum of every file by its name.
_FILES = "files"


def save_checkpoint(
    accelerator: Accelerator, folder: Path, step: int, progress: dict[str, Any], keep: int = 1
) -> Path:
    """Writes a checkpoint beside, and renames it when every process has written its part.

    Args:
        accelerator: What prepared model and optimiser.
        folder: Where checkpoints are.
        step: Optimiser steps that were made.
        progress: What else has to be known to go on; JSON.
        keep: How many of the newest stay.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step-{step:08d}"
    unfinished = folder / f".step-{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with _trained_alone(accelerator):
        accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {path.relative_to(unfinished).as_posix(): checksum_file(path) for path in _files(unfinished)}
        write_json(unfinished / _PROGRESS, {"step": step, **progress, _FILES: files})
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        for old in _whole(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def save_alone(accelerator: Accelerator, folder: Path, step: int, progress: dict[str, Any]) -> Path | None:
    """Writes a checkpoint without the other processes, one of which has ended.

    Every process of a data-parallel run holds all of it, so whichever is left can write it.

    Returns:
        The checkpoint's folder; None where each process holds a part, as it does under FSDP and DeepSpeed.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return None
    final = folder / f"step-{step:08d}"
    unfinished = folder / f".step-{step:08d}-{accelerator.process_index}"
    if (final / _PROGRESS).is_file():
        return final
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(_state(accelerator, accelerator._models[0]), unfinished / _TRAINED)
    torch.save(accelerator._optimizers[0].state_dict(), unfinished / f"{OPTIMIZER_NAME}.bin")
    if accelerator.scaler is not None:
        torch.save(accelerator.scaler.state_dict(), unfinished / SCALER_NAME)
    files = {path.relative_to(unfinished).as_posix(): checksum_file(path) for path in _files(unfinished)}
    write_json(unfinished / _PROGRESS, {"step": step, **progress, _FILES: files})
    shutil.rmtree(final, ignore_errors=True)  # what was being written when the other process ended
    unfinished.rename(final)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the newest whole checkpoint; None if there is none."""
    whole = _whole(folder)
    return whole[-1] if whole else None


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> dict[str, Any]:
    """Takes a run to where a checkpoint was written.

    Returns:
        Its progress, `step` among it.

    Raises:
        ValueError: If it is of another model, or damaged; nothing has been read into the run then.
    """
    progress = read_json(checkpoint / _PROGRESS)
    _refuse_changed(checkpoint, progress.pop(_FILES, {}))
    try:
        with _trained_alone(accelerator):
            accelerator.load_state(str(checkpoint))
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{checkpoint} cannot be read into this run: {error}") from error
    return progress


def _refuse_changed(checkpoint: Path, saved: dict[str, str]) -> None:
    """Refuses files that are not what was written; checkpoints without checksums are taken as they are."""
    for name, checksum in saved.items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{path} is not there, which was written with its checkpoint.")
        if checksum_file(path) != checksum:
            raise ValueError(
                f"{path} is damaged: it is not what was written (the checksums differ). Copy the checkpoint "
                "again, or remove it to resume from an earlier one."
            )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _whole(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / _PROGRESS).is_file())


@contextmanager
def _trained_alone(accelerator: Accelerator) -> Iterator[None]:
    """Lets Accelerate leave the frozen weights out, which the backbone's own file holds.

    Sharded models and DeepSpeed's engine have formats of their own, which Accelerate writes.
    """

    def save(models: list[nn.Module], weights: list[Any], output: str) -> None:
        if weights:
            weights.clear()
            if accelerator.is_main_process:
                save_file(_state(accelerator, models[0]), Path(output) / _TRAINED)

    def load(models: list[nn.Module], source: str) -> None:
        if not (Path(source) / _TRAINED).is_file():
            return
        model = models.pop()
        held = load_file(Path(source) / _TRAINED)
        refuse_values(str(Path(source) / _TRAINED), held.items(), lambda _: False)
        wanted = {name: value.shape for name, value in _state(accelerator, model).items()}
        given = {name: value.shape for name, value in held.items()}
        if wanted != given:
            wrong = sorted(n for n in wanted.keys() | given.keys() if wanted.get(n) != given.get(n))
            raise ValueError(f"{len(wrong)} trained tensors differ in name or shape, first {wrong[0]!r}")
        accelerator.unwrap_model(model).load_state_dict(held, strict=False)

    hooks = [accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)]
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        hooks.pop().remove()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _state(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns what training changes: trained parameters, and buffers such as batch statistics."""
    module = accelerator.unwrap_model(model)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    persistent = module.state_dict()
    buffers = {name for name, _ in module.named_buffers() if name in persistent}
    kept = {name: persistent[name] for name in sorted(trained | buffers)}
    return {name: value.detach().contiguous().clone() for name, value in kept.items()}
