"""Runs on two CPU processes, data parallel or sharded, without the cost of starting Python anew."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.multiprocessing
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from toast.layer import ToastLayer
from toast.training.log import Log
from toast.training.preparing import Stage, prepare
from toast.training.run import Run, run
from toast.training.run_config import RunConfig
from toast.training.run_folder import write_json

#: In a run's folder: when a process of it was killed, in seconds since 1970.
KILLED = "killed"


def on_two_processes(
    config: RunConfig,
    sharded: str | int | None = None,
    resume: bool = False,
    dies: tuple[int, int] | None = None,
    stage: Stage = "tune",
    efficient: RunConfig | None = None,
) -> None:
    """Runs a configuration on two processes that are joined by gloo.

    Args:
        config: The run's configuration.
        sharded: Kind of state dict under which FSDP shards the model; a number is DeepSpeed's ZeRO stage;
            None is data parallel.
        resume: Go on from the newest checkpoint.
        dies: Process that is killed, and the step after which.
        stage: `pretune` or `tune`.
        efficient: The first process alone reads the weights (`fsdp_cpu_ram_efficient_loading`); this is a
            small run like the other one, which loads the libraries before memory is measured.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # Forked from a process that has imported all and computed nothing: autograd may have threads here.
    multiprocessing.set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(
        _process, (port, config, sharded, resume, dies, stage, efficient), nprocs=2, start_method="forkserver"
    )


def start_module(name: str, arguments: list[str], errors: Path) -> BaseProcess:
    """Starts `python -m NAME ARGUMENTS` in a process that has imported all already.

    Args:
        name: The module.
        arguments: What it is given.
        errors: The file that takes what it says to standard error.
    """
    multiprocessing.set_forkserver_preload([__name__])
    process = multiprocessing.get_context("forkserver").Process(
        target=_run_module, args=(name, arguments, errors)
    )
    process.start()
    return process


def _run_module(name: str, arguments: list[str], errors: Path) -> None:
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.argv[1:] = arguments
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _process(
    rank: int,
    port: int,
    config: RunConfig,
    sharded: str | int | None,
    resume: bool,
    dies: tuple[int, int] | None,
    stage: Stage,
    efficient: RunConfig | None,
) -> None:
    os.environ |= {
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    for state in (AcceleratorState, PartialState):
        state._shared_state.clear()
    if dies is not None and rank == dies[0]:
        _kill_after(dies[1])
    if isinstance(sharded, int):
        _partition(sharded, config.micro_batches)
    if not isinstance(sharded, str):
        run(config, stage, resume)
    else:
        _shard(sharded, config.precision, efficient is not None)
        if efficient is not None:
            ctypes.CDLL(None).mallopt(-3, 1 << 17)  # tensors are given back at once, as those of large models
            prepare(efficient, stage)
        before = _memory("VmRSS", fresh=True)
        prepared = Run(config, stage)
        peak = _memory("VmHWM") - before
        _count_shards(prepared)
        held = Held(prepared, peak)
        prepared.execute(resume)
        held.write(rank)
    PartialState().destroy_process_group()


def _kill_after(step: int) -> None:
    """Ends this process as a lack of memory does."""
    note = Log.note

    def note_and_die(self: Log, made: int, losses: Any) -> None:
        note(self, made, losses)
        if made == step:
            (self.place / KILLED).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    Log.note = note_and_die  # type: ignore[method-assign]


def _shard(kind: str, precision: str | None, efficient: bool) -> None:
    """Accelerate offers FSDP on accelerators alone; its code runs on gloo as well."""
    state = Accelerator(cpu=True, mixed_precision=precision).state
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type=kind,
        cpu_ram_efficient_loading=efficient,
    )
    if precision not in (None, "no"):
        plugin.set_mixed_precision(precision)
    for shared in (AcceleratorState._shared_state, PartialState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = plugin


def _partition(stage: int, micro_batches: int) -> None:
    """Likewise of DeepSpeed."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed import comm

    state = Accelerator(cpu=True).state
    comm.init_distributed("gloo", auto_mpi_discovery=False)
    plugin = DeepSpeedPlugin(zero_stage=stage, gradient_accumulation_steps=micro_batches)
    if stage == 3:  # as large models are treated: all is in parts, and let go of after its turn
        names = (
            "param_persistence_threshold",
            "max_live_parameters",
            "max_reuse_distance",
            "prefetch_bucket_size",
        )
        plugin.deepspeed_config["zero_optimization"] |= {f"stage3_{name}": 0 for name in names}
    plugin.set_mixed_precision("no")
    for shared in (AcceleratorState._shared_state, PartialState._shared_state):
        shared["distributed_type"] = DistributedType.DEEPSPEED
    state.deepspeed_plugins = {"default": plugin}
    plugin.select(_from_accelerator_state=True)


def _count_shards(prepared: Run) -> None:
    """Writes which parameters of each kind are spread over the processes, and which are whole."""
    kinds: dict[str, list[str]] = {}
    for name, parameter in prepared.objective.named_parameters():
        kind = "trained" if parameter.requires_grad else "frozen"
        kinds.setdefault(f"{kind} {'sharded' if isinstance(parameter, DTensor) else 'whole'}", []).append(
            name
        )
    if prepared.is_main:
        prepared.place.mkdir(parents=True, exist_ok=True)
        write_json(prepared.place / "shards.json", kinds)


class Held:
    """Watches what a process holds of what a run trains.

    Args:
        prepared: The run, before it begins.
        peak: Bytes that the process took at most to prepare it.

    Attributes:
        bytes: Of trained parameters, of their gradients before a step, and of the optimiser's states.
        gathered: The most feedback maps that were whole at the same time.
        dtypes: Of parameters, gradients and optimiser states.
    """

    def __init__(self, prepared: Run, peak: int) -> None:
        self.peak = peak
        self.prepared = prepared
        self.optimizer = prepared.loop.optimizer.optimizer
        self.bytes: dict[str, int] = {}
        self.dtypes: set[str] = set()
        self.gathered = 0
        self.maps = [
            module
            for layer in prepared.objective.modules()
            if isinstance(layer, ToastLayer)
            for name, module in layer.named_modules()
            if name.count(".") == 1 and name.startswith(("toast_to_state.", "toast_to_signal."))
        ]
        self.optimizer.register_step_pre_hook(self._before_step)
        for each in self.maps:
            each.register_forward_hook(self._count)
            each.register_full_backward_pre_hook(self._count)

    def _before_step(self, *_: Any) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._weigh("parameters", parameters)
        self._weigh("gradients", [p.grad for p in parameters if p.grad is not None])

    def _weigh(self, what: str, tensors: list[Any]) -> None:
        parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        self.bytes[what] = max(self.bytes.get(what, 0), sum(p.numel() * p.element_size() for p in parts))
        self.dtypes |= {str(part.dtype) for part in parts}

    def _count(self, *_: Any) -> None:
        whole = [not all(isinstance(p, DTensor) for p in each.parameters()) for each in self.maps]
        self.gathered = max(self.gathered, sum(whole))

    def write(self, rank: int) -> None:
        """Writes it into the run's folder."""
        states = [v for state in self.optimizer.state.values() for v in state.values()]
        self._weigh("optimiser", [value for value in states if torch.is_tensor(value)])
        found = {"bytes": self.bytes, "dtypes": sorted(self.dtypes), "gathered": self.gathered}
        found |= {"maps": len(self.maps), "peak": self.peak}
        write_json(self.prepared.place / f"held-{rank}.json", found)


def _memory(what: str, fresh: bool = False) -> int:
    """Returns the memory that this process holds (`VmRSS`), or held at most (`VmHWM`), in bytes.

    Args:
        what: The name in Linux's `/proc/self/status`.
        fresh: Forget what was held at most until now.
    """
    if fresh:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))
