"""Runs on two CPU processes, data parallel or sharded, without the cost of starting Python anew."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from typing import Any

import torch.multiprocessing
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from toast.training.log import Log
from toast.training.run import Run, run
from toast.training.run_config import RunConfig
from toast.training.run_folder import write_json

#: In a run's folder: when a process of it was killed, in seconds since 1970.
KILLED = "killed"


def on_two_processes(
    config: RunConfig, sharded: str | None = None, resume: bool = False, dies: tuple[int, int] | None = None
) -> None:
    """Runs a configuration on two processes that are joined by gloo.

    Args:
        config: The run's configuration.
        sharded: Kind of state dict under which FSDP shards the backbone; None is data parallel.
        resume: Go on from the newest checkpoint.
        dies: Process that is killed, and the step after which.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # Forked from a process that has imported all and computed nothing: autograd may have threads here.
    multiprocessing.set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(
        _process, (port, config, sharded, resume, dies), nprocs=2, start_method="forkserver"
    )


def _process(
    rank: int, port: int, config: RunConfig, sharded: str | None, resume: bool, dies: tuple[int, int] | None
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
    if sharded is None:
        run(config, "tune", resume)
    else:
        _shard(sharded)
        prepared = Run(config, "tune")
        _count_shards(prepared)
        prepared.execute(resume)
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


def _shard(kind: str) -> None:
    """Accelerate offers FSDP on accelerators alone; its code runs on gloo as well."""
    state = Accelerator(cpu=True).state
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type=kind
    )
    for shared in (AcceleratorState._shared_state, PartialState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = plugin


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
