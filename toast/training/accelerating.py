"""Accelerate as a run uses it: devices, processes, precision, accumulation, trackers, sharding."""

from __future__ import annotations

import os

from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
)
from peft.utils import ModulesToSaveWrapper
from torch import nn

from toast.layer import ToastLayer
from toast.saving.names import is_of_adapter
from toast.steering import find_steering
from toast.training.preparing import Prepared
from toast.training.run_config import RunConfig

#: Precision of a run by that of the frozen weights: what is trained is float32, so others need autocast.
PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def make_accelerator(config: RunConfig) -> Accelerator:
    """Returns Accelerate's object for a run; what `accelerate launch` says comes through the environment.

    A batch of the loader is split over the processes, so that their number changes neither the order of the
    samples nor the gradient.

    Raises:
        ValueError: If the batch cannot be split over the processes.
    """
    precision: str | None = config.precision
    if precision is None and os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no":
        precision = PRECISIONS[config.model.dtype]
    held = AcceleratorState._shared_state.get("_mixed_precision")
    if precision is not None and held not in (None, precision):
        AcceleratorState._reset_state()  # of an earlier run of this process
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.micro_batches, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=False),
        log_with=config.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(config.folder), logging_dir=str(config.folder)),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=config.method.row.may_leave_out)
        ],
    )
    processes = accelerator.num_processes
    if config.batch_size // config.micro_batches % processes:
        raise ValueError(
            f"batch_size: needs batch_size / micro_batches to be a multiple of the {processes} processes; "
            f"got {config.batch_size} / {config.micro_batches}."
        )
    return accelerator


def replicate_trained(accelerator: Accelerator, prepared: Prepared) -> None:
    """Tells FSDP to shard the frozen backbone and to leave what TOAST trains whole in every process.

    All feedback maps are needed between the two passes, outside of the blocks that hold them; beside the
    backbone they are small. `toast.training.loop.average_replicated` averages their gradients.

    Raises:
        ValueError: Under FSDP's first version, which flattens trained and frozen parameters together.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if accelerator.distributed_type != DistributedType.FSDP or plugin is None:
        return
    model = prepared.method.model
    steering = find_steering(model)
    if steering is None:
        return
    if plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP: TOAST needs version 2; set fsdp_version: 2 in the file for accelerate launch."
        )
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in steering.blocks})
    plugin.ignored_modules = _trained_modules(model)


def _trained_modules(model: nn.Module) -> list[nn.Module]:
    own = [
        module
        for layer in model.modules()
        if isinstance(layer, ToastLayer)
        for name, module in layer.named_children()
        if is_of_adapter(name)
    ]
    kept = [m.modules_to_save for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    return [*own, *kept]
