"""Two machines, each with a launcher of its own, here on loopback: as `docs/scale.md` has it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.training.settings import losses, vision
from tests.training.test_processes import SETTINGS, assert_same
from toast.training.checkpoints import newest_checkpoint
from toast.training.config_files import to_yaml
from toast.training.run import run
from toast.training.run_config import RunConfig

SCRIPT = Path(__file__).parents[2] / "scripts" / "tune.py"


def launch(by: str, config: RunConfig, at: Path, *arguments: str) -> list[psutil.Popen]:
    """Starts a run on two machines with one process each, by `accelerate` or `torchrun`."""
    at.write_text(to_yaml(config))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command, rank_option = {
        "accelerate": (
            ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2",
             "--main_process_ip", "127.0.0.1", "--main_process_port", port, "--mixed_precision", "no",
             "--dynamo_backend", "no"],
            "--machine_rank",
        ),
        "torchrun": (
            ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
             "--master-addr", "127.0.0.1", "--master-port", port],
            "--node-rank",
        ),
    }[by]  # fmt: skip
    machines = []
    for rank in (0, 1):
        with (at.parent / f"machine-{rank}.txt").open("w") as said:
            machine = psutil.Popen(
                [
                    sys.executable,
                    "-m",
                    *command,
                    rank_option,
                    str(rank),
                    str(SCRIPT),
                    "--config",
                    str(at),
                    *arguments,
                ],
                env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
        machines.append(machine)
    return machines


@pytest.mark.timeout(600)  # eight interpreters, on however few cores
def test_a_machine_is_lost_and_the_run_goes_on(tmp_path: Path) -> None:
    settings = {**SETTINGS, "epochs": 12, "log_every": 1}
    one, two = (vision(tmp_path, **settings, name=name) for name in ("one", "two"))
    run(one, "tune")
    left, lost = launch("accelerate", two, tmp_path / "two.yaml")
    metrics = two.folder / "metrics.jsonl"
    while left.poll() is None and not (metrics.is_file() and len(losses(two.folder)) >= 3):
        time.sleep(0.01)
    for process in (lost, *lost.children(recursive=True)):
        process.kill()
    lost.wait()
    assert left.wait(timeout=120) != 0, (tmp_path / "machine-0.txt").read_text()
    assert "another process of this run has ended" in (tmp_path / "machine-0.txt").read_text()
    assert newest_checkpoint(two.folder / "checkpoints") is not None
    assert not (two.folder / "result.json").exists()
    machines = launch("torchrun", two, tmp_path / "two.yaml", "--resume")
    assert [machine.wait() for machine in machines] == [0, 0]
    assert_same(two, one)
