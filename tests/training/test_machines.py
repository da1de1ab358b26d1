"""Two machines, each with a launcher of its own, here on loopback: as `docs/scale.md` has it."""

from __future__ import annotations

import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from tests.training.processes import start_module
from tests.training.settings import losses, vision
from tests.training.test_processes import SETTINGS, assert_same
from toast.training.checkpoints import newest_checkpoint
from toast.training.config_files import to_yaml
from toast.training.run import run
from toast.training.run_config import RunConfig

SCRIPT = Path(__file__).parents[2] / "scripts" / "tune.py"


def launch(by: str, config: RunConfig, at: Path, *arguments: str) -> list[BaseProcess]:
    """Starts a run on two machines with one process each, by `accelerate` or `torchrun`."""
    at.write_text(to_yaml(config))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    module, options, rank_option = {
        "accelerate": (
            "accelerate.commands.launch",
            ["--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1",
             "--main_process_port", port, "--mixed_precision", "no", "--dynamo_backend", "no"],
            "--machine_rank",
        ),
        "torchrun": (
            "torch.distributed.run",
            ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port],
            "--node-rank",
        ),
    }[by]  # fmt: skip
    given = [str(SCRIPT), "--config", str(at), *arguments]
    return [
        start_module(module, [*options, rank_option, str(rank), *given], at.parent / f"machine-{rank}.txt")
        for rank in (0, 1)
    ]


@pytest.mark.timeout(600)  # four interpreters, on however few cores
def test_a_machine_is_lost_and_the_run_goes_on(tmp_path: Path) -> None:
    settings = {**SETTINGS, "epochs": 12, "log_every": 1}
    one, two = (vision(tmp_path, **settings, name=name) for name in ("one", "two"))
    run(one, "tune")
    left, lost = launch("accelerate", two, tmp_path / "two.yaml")
    metrics = two.folder / "metrics.jsonl"
    while left.is_alive() and not (metrics.is_file() and len(losses(two.folder)) >= 3):
        time.sleep(0.01)
    killed = psutil.Process(lost.pid)
    for process in (killed, *killed.children(recursive=True)):
        process.kill()
    lost.join()
    left.join(timeout=120)
    assert left.exitcode, (tmp_path / "machine-0.txt").read_text()
    assert "another process of this run has ended" in (tmp_path / "machine-0.txt").read_text()
    assert newest_checkpoint(two.folder / "checkpoints") is not None
    assert not (two.folder / "result.json").exists()
    machines = launch("torchrun", two, tmp_path / "two.yaml", "--resume")
    for machine in machines:
        machine.join()
    assert [machine.exitcode for machine in machines] == [0, 0]
    assert_same(two, one)
