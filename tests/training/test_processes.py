"""Two processes, joined by gloo, do what one does: data parallel, and with the backbone sharded by FSDP."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from tests.training.processes import KILLED, on_two_processes
from tests.training.settings import language, losses, vision
from toast.training.run import run
from toast.training.run_config import RunConfig


def assert_same(two: RunConfig, one: RunConfig, tolerance: float = 1e-5) -> None:
    """Losses, test measures and trained weights agree to rounding."""
    assert losses(two.folder) == pytest.approx(losses(one.folder), abs=tolerance)
    assert losses(two.folder, "validation") == pytest.approx(losses(one.folder, "validation"), abs=tolerance)
    test, wanted = (json.loads((c.folder / "result.json").read_text())["test"] for c in (two, one))
    assert test["loss"] == pytest.approx(wanted["loss"], abs=tolerance)
    assert test.get("samples", test.get("tokens")) == wanted.get("samples", wanted.get("tokens"))
    weights, expected = (load_file(c.folder / "adapter" / "adapter_model.safetensors") for c in (two, one))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=20 * tolerance, rtol=0)


SETTINGS = {
    "data.validation_share": 0.2,
    "augment.preset": "flip",
    "micro_batches": 2,
    "optimizer.name": "sgd",  # Adam would blow the rounding of a tiny gradient up to a whole step
}


def test_data_parallel_is_one_process(tmp_path: Path) -> None:
    one = vision(tmp_path, **SETTINGS, name="one")
    run(one, "tune")
    two = vision(tmp_path, **SETTINGS, name="two")
    on_two_processes(two)
    assert_same(two, one)


def test_data_parallel_on_rows_of_different_lengths(tmp_path: Path) -> None:
    """The loss is a mean over tokens, of which the processes have different numbers."""
    one = language(tmp_path, name="one", optimizer__name="sgd", first_pass__mode="cached")
    run(one, "tune")
    two = language(
        tmp_path,
        name="two",
        optimizer__name="sgd",
        first_pass__mode="cached",
        first_pass__folder=str(tmp_path / "other"),
    )
    on_two_processes(two)
    assert_same(two, one)


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_sharded_backbone_is_one_process(tmp_path: Path, kind: str) -> None:
    """It saves the best measurement, which is the first of two equal ones, also when it goes on."""
    settings = {**SETTINGS, "method.options": {"steer_from": 1}, "checkpoint.best": "accuracy"}
    one = vision(tmp_path, **settings, name="one")
    run(one, "tune")
    two = vision(tmp_path, **settings, name="two")
    on_two_processes(two, kind)
    assert_same(two, one)
    shards = json.loads((two.folder / "shards.json").read_text())
    assert shards.keys() == {"frozen sharded", "trained sharded"}
    for name in ("result.json", "adapter/adapter_model.safetensors"):
        (two.folder / name).unlink()
    on_two_processes(two, kind, resume=True)
    assert_same(two, one)
    best, wanted = (json.loads((c.folder / "result.json").read_text())["best"] for c in (two, one))
    assert best == wanted | {"value": pytest.approx(wanted["value"])}
    assert best["step"] == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_left_writes_a_checkpoint_and_ends(tmp_path: Path, rank: int) -> None:
    one = vision(tmp_path, **SETTINGS, name="one")
    run(one, "tune")
    two = vision(tmp_path, **SETTINGS, name="two", log_every=3)
    with pytest.raises(ProcessExitedException):
        on_two_processes(two, dies=(rank, 1))
    seconds = time.time() - float((two.folder / KILLED).read_text())
    assert seconds < 30  # gloo itself would wait for half an hour
    assert [path.name for path in (two.folder / "checkpoints").iterdir()] == ["step-00000001"]
    run(two, "tune", resume=True)
    assert_same(two, one)


def test_a_batch_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    config = vision(tmp_path, name="odd", batch_size=7)
    with pytest.raises(ProcessRaisedException, match=r"batch_size: .*multiple of the 2 processes"):
        on_two_processes(config)
