"""Checkpoints of a run: through Accelerate, of what is trained alone, whole or not at all."""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils.constants import OPTIMIZER_NAME, SCALER_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from toast.files.atomic import flush, flush_all
from toast.files.json_files import NUMBER, Kinds, read_json
from toast.files.tensors import checksum_file, read_safetensors, refuse_values
from toast.training.run_folder import write_json
from toast.training.trained_state import (
    SHARDS,
    TRAINED,
    for_main,
    load_state,
    put_back,
    save_state,
    trained_state,
)

#: What was trained when the run measured best, if that is kept.
_BEST = "best.safetensors"
_PROGRESS = "progress.json"
#: In the progress: the checksum of every file by its name, and that of the progress itself.
_FILES, _CHECKSUM = "files", "checksum"
#: What a run needs of a progress to go on.
_KEYS: dict[str, Kinds] = {
    "step": int, "total": int, "validated": int, "validation": (dict, type(None)), "bad": dict,
    "step_seconds": NUMBER,
}  # fmt: skip
#: How DeepSpeed's engine leaves the frozen weights out of its own files.
_OF_ENGINE = {"save": {"exclude_frozen_parameters": True}, "load": {"load_module_strict": False}}
logger = logging.getLogger(__name__)


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    progress: dict[str, Any],
    keep: int = 1,
    best: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes a checkpoint beside, and renames it when every process has written its part.

    At no time is there none: a kill at any point leaves the new one or those from before.

    Args:
        accelerator: What prepared model and optimiser.
        folder: Where checkpoints are.
        step: Optimiser steps that were made.
        progress: What else has to be known to go on; JSON.
        keep: How many of the newest stay.
        best: What was trained when the run measured best, if that is kept; each process's part of it.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step-{step:08d}"
    unfinished = folder / f".step-{step:08d}"
    if accelerator.is_main_process:
        whole = _whole(folder)
        if unfinished in whole and final not in whole:  # a run was killed before; it may be the only one
            _remove(final)
            unfinished.rename(final)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if accelerator.distributed_type == DistributedType.FSDP:
        save_state(accelerator, unfinished)
        best = dict(for_main(accelerator, best or {}))
    else:
        with _trained_alone(accelerator):
            accelerator.save_state(str(unfinished), **_OF_ENGINE["save"] if _is_engine(accelerator) else {})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _complete(unfinished, final, step, progress, best)
        # Later ones are damaged, for the run would have gone on from them.
        before = [path for path in _whole(folder) if (_step(path) or 0) <= step]
        for old in {*_whole(folder)} - {*before[-keep:]}:
            _remove(old)
    accelerator.wait_for_everyone()
    return final


def save_alone(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    progress: dict[str, Any],
    best: Mapping[str, Tensor] | None = None,
) -> Path | None:
    """Writes a checkpoint without the other processes, one of which has ended.

    Every process of a data-parallel run holds all of it, so whichever is left can write it.

    Returns:
        The checkpoint's folder; None where each process holds a part, as it does under FSDP and DeepSpeed.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return None
    final = folder / f"step-{step:08d}"
    unfinished = folder / f".{accelerator.process_index}-step-{step:08d}"
    if final in _whole(folder):
        return final
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(trained_state(accelerator, accelerator._models[0]), unfinished / TRAINED)
    torch.save(accelerator._optimizers[0].state_dict(), unfinished / f"{OPTIMIZER_NAME}.bin")
    if accelerator.scaler is not None:
        torch.save(accelerator.scaler.state_dict(), unfinished / SCALER_NAME)
    try:
        _complete(unfinished, final, step, progress, best)
    except OSError:
        if final not in _whole(folder):  # else another process that is left was faster
            raise
        shutil.rmtree(unfinished, ignore_errors=True)
    return final


def _complete(
    unfinished: Path, final: Path, step: int, progress: dict[str, Any], best: Mapping[str, Tensor] | None
) -> None:
    """Writes the progress, which makes a checkpoint whole, and lets it take its place."""
    if best:
        save_file(dict(best), unfinished / _BEST)
    files = {path.relative_to(unfinished).as_posix(): checksum_file(path) for path in _files(unfinished)}
    write_json(unfinished / _PROGRESS, {"step": step, **progress, _FILES: files})
    held = read_json(unfinished / _PROGRESS)  # as it will be read again
    write_json(unfinished / _PROGRESS, held | {_CHECKSUM: _checksum(held)})
    flush_all(unfinished)
    # An earlier one of the step goes when the new one is whole, which `_whole` finds under either name.
    _remove(final)
    unfinished.rename(final)
    flush(final.parent)


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint; one that is half removed is none."""
    (checkpoint / _PROGRESS).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def newest_checkpoint(folder: Path, say: Callable[[str], None] = logger.warning) -> Path | None:
    """Returns the newest checkpoint that is whole and as it was written; None if none was written.

    Args:
        folder: Where checkpoints are.
        say: Is called for each that is damaged and passed over.

    Raises:
        ValueError: If all are damaged.
    """
    faults = []
    for checkpoint in reversed(_whole(folder)):
        try:
            _read_progress(checkpoint)
        except ValueError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            say(f"{fault} Continuing from the checkpoint before, {checkpoint.name}.")
        return checkpoint
    if faults:
        raise ValueError(
            f"{folder} holds no checkpoint to continue from:\n  "
            + "\n  ".join(faults)
            + "\nCopy it again if there is a copy. To start from the beginning, delete that folder and call "
            "--resume again; checkpoint.keep=2 keeps one more to fall back to."
        )
    return None


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> dict[str, Any]:
    """Takes a run to where a checkpoint was written.

    Returns:
        Its progress, `step` among it.

    Raises:
        ValueError: If it is of another model, or damaged; nothing has been read into the run then.
    """
    progress = _read_progress(checkpoint)
    try:
        if accelerator.distributed_type == DistributedType.FSDP or (checkpoint / SHARDS).is_dir():
            load_state(accelerator, checkpoint)
        else:
            with _trained_alone(accelerator):
                accelerator.load_state(
                    str(checkpoint), **_OF_ENGINE["load"] if _is_engine(accelerator) else {}
                )
    except Exception as error:  # Accelerate and torch raise many kinds for files that are foreign or cut off
        raise ValueError(f"{checkpoint} cannot be read into this run: {error}") from error
    return progress


def load_best(checkpoint: Path) -> dict[str, Tensor]:
    """Returns what was trained when the run had measured best; empty if that was not kept."""
    return read_safetensors(checkpoint / _BEST) if (checkpoint / _BEST).is_file() else {}


def _read_progress(checkpoint: Path) -> dict[str, Any]:
    """Reads the progress of a checkpoint whose files are what was written.

    Raises:
        ValueError: If one is not; checkpoints without checksums are taken as they are.
    """
    path = checkpoint / _PROGRESS
    progress = read_json(path, _KEYS)
    checksum = progress.pop(_CHECKSUM, None)
    if checksum not in (None, _checksum(progress)):
        raise ValueError(f"{path} is damaged: it is not what was written (the checksums differ).")
    step = progress["step"]
    if not 0 <= step <= progress["total"] or step != _step(checkpoint):
        raise ValueError(
            f"{path} is damaged: step needs to be that of the folder, at most {progress['total']}; "
            f"it is {step}."
        )
    files = progress.pop(_FILES, {})
    if not isinstance(files, dict):
        raise ValueError(f"{path} is damaged: {_FILES} needs an object; it is {files!r}.")  # noqa: TRY004
    for name, saved in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise ValueError(f"{file} does not exist, although its checkpoint lists it.")
        if checksum_file(file) != saved:
            raise ValueError(f"{file} is damaged: it is not what was written (the checksums differ).")
    return progress


def _checksum(progress: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(progress, sort_keys=True).encode()):08x}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _whole(folder: Path) -> list[Path]:
    """Returns the checkpoints that are written to their end, the oldest first.

    Those under a hidden name are among them: a run may have been killed before it renamed one.
    """
    found = [path for path in folder.glob("*step-*") if path.name.lstrip(".").startswith("step-")]
    whole = [path for path in found if (path / _PROGRESS).is_file() and _step(path) is not None]
    return sorted(whole, key=lambda path: (_step(path), not path.name.startswith(".")))


def _step(checkpoint: Path) -> int | None:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else None


@contextmanager
def _trained_alone(accelerator: Accelerator) -> Iterator[None]:
    """Lets Accelerate leave the frozen weights out, which the backbone's own file holds.

    DeepSpeed's engine has a format of its own, which Accelerate writes.
    """

    def save(models: list[nn.Module], weights: list[Any], output: str) -> None:
        if weights:
            weights.clear()
            if accelerator.is_main_process:
                save_file(trained_state(accelerator, models[0]), Path(output) / TRAINED)

    def load(models: list[nn.Module], source: str) -> None:
        if not (Path(source) / TRAINED).is_file():
            return
        model = models.pop()
        held = load_file(Path(source) / TRAINED)
        refuse_values(str(Path(source) / TRAINED), held.items(), lambda _: False)
        put_back(accelerator, model, held)

    hooks = [accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)]
    if _is_engine(accelerator):
        hooks.pop().remove()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_engine(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)
