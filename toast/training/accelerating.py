"""Accelerate as a run uses it: devices, processes, precision, accumulation, trackers, sharding."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast,
    broadcast_object_list,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from toast.steering import Steering, find_steering
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
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # its engine makes the steps
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.batch_size // config.micro_batches // processes,
            "gradient_accumulation_steps": config.micro_batches,
            "gradient_clipping": config.optimizer.clip or 0.0,
        }
    return accelerator


def loads_in_main(accelerator: Accelerator) -> bool:
    """Whether the main process alone reads the weights and sends them (fsdp_cpu_ram_efficient_loading)."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if accelerator.distributed_type != DistributedType.FSDP or plugin is None:
        return False
    return bool(plugin.cpu_ram_efficient_loading)


def send_start(accelerator: Accelerator, prepared: Prepared) -> None:
    """Gives all processes the main one's task embeddings and input sizes, which their rates follow from.

    Where the main process alone has read the weights, all others come with those of the backbone.
    """
    if loads_in_main(accelerator):
        for parameter in prepared.method.groups.get("task_embedding", {}).values():
            parameter.data.copy_(broadcast(parameter.data.to(accelerator.device)))
    if accelerator.num_processes > 1:  # so that no process rounds a rate differently
        (prepared.input_sizes,) = broadcast_object_list([prepared.input_sizes])


def shard_by_map(accelerator: Accelerator, prepared: Prepared) -> None:
    """Tells FSDP to shard each block and, as units of their own, each feedback map of TOAST.

    The maps run between the two passes, outside of the blocks that hold them: each is gathered when it is
    called, forward and backward. Selector, embeddings and head are in the unit around all. Gradients of
    micro-batches are exchanged one by one, for those that wait would be whole in every process.

    Raises:
        ValueError: Under FSDP's first version, which flattens trained and frozen parameters together, and
            with settings under which a map is not gathered when it is called.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if accelerator.distributed_type != DistributedType.FSDP or plugin is None:
        return
    steering = find_steering(prepared.method.model)
    if steering is None:
        return
    _refuse_settings(plugin, prepared.objective)
    units = [*steering.blocks, *(unit for maps in _adapter_maps(steering) for unit in maps)]
    given = plugin.transformer_cls_names_to_wrap or []
    plugin.transformer_cls_names_to_wrap = sorted({*given, *(type(unit).__name__ for unit in units)})
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    if plugin.mixed_precision_policy is not None:
        # Half precision for what is computed; what is trained, its gradients' mean and the loss stay float32.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
        )


def _adapter_maps(steering: Steering) -> list[tuple[nn.Module, nn.Module]]:
    adapter = steering.adapter
    return [] if adapter is None else [(maps.to_state, maps.to_signal) for maps in adapter.maps]


def _refuse_settings(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP: TOAST needs version 2; set fsdp_version: 2 in the file for accelerate launch."
        )
    if plugin.auto_wrap_policy is not transformer_auto_wrap_policy:
        raise ValueError(
            "FSDP: TOAST needs its blocks and its feedback maps as units; set fsdp_auto_wrap_policy: "
            "TRANSFORMER_BASED_WRAP in the file for accelerate launch (the classes are found)."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "FSDP: fsdp_activation_checkpointing wraps the blocks so that the two passes are lost; leave it "
            "out of the file for accelerate launch and set checkpointing: true in the configuration."
        )
    buffers = sorted({name for name, _ in model.named_buffers()} & model.state_dict().keys())
    if plugin.cpu_ram_efficient_loading and buffers:
        raise ValueError(
            f"FSDP: fsdp_cpu_ram_efficient_loading sends parameters alone, and this model keeps {buffers[0]} "
            "as a buffer with its weights; set it to false in the file for accelerate launch."
        )
