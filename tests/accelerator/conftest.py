"""Tests of the accelerator that is there; with `TOAST_TEST_DEVICE=cpu` the same code runs on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test of this folder. What libraries warn of on a device is no error of ours."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.accelerator)
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that is tested: the one that the environment names, or the accelerator; else a skip."""
    import torch

    from toast.benchmark.suite import place_of

    named = os.environ.get("TOAST_TEST_DEVICE")
    if named is None and not torch.accelerator.is_available():
        pytest.skip("no accelerator; TOAST_TEST_DEVICE=cpu runs these tests on the CPU")
    return place_of(named or "auto", "float32", compiled=False).device


@pytest.fixture(autouse=True)
def all_digits() -> Iterator[None]:
    """Keeps products of float32 from being computed in TensorFloat-32, which has ten bits."""
    import torch

    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed
