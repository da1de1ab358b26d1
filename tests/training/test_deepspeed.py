"""DeepSpeed's ZeRO on two CPU processes, joined by gloo, does what one process does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.processes import on_two_processes
from tests.training.settings import vision
from tests.training.test_processes import assert_same
from tests.training.test_sharding import ADAM, CHECKPOINTS, stopped_after
from toast.training.run import run

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install deepspeed)")


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_is_one_process(tmp_path: Path, stage: int) -> None:
    settings = {**ADAM, **CHECKPOINTS, "micro_batches": 2, "optimizer.clip": 0.1}
    places = (tmp_path / name for name in ("one", "two", "stopped"))
    one, two, stopped = (vision(tmp_path, **settings, out=str(place)) for place in places)
    run(one, "tune")
    on_two_processes(two, stage)
    assert_same(two, one)
    on_two_processes(stopped_after(two, 2, stopped), stage, resume=True)
    assert_same(stopped, one)
    files = (stopped.folder / "checkpoints").rglob("*")
    assert sum(path.stat().st_size for path in files) < 1 << 20
