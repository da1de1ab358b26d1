"""Tiny random models, built from configurations, and the fixtures of the official implementation."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# No test may reach for a hub; set before the libraries are imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

DATA = Path(__file__).parent / "data"

# The models are tiny: threads of one operator would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def official() -> Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]:
    """Reads one run of the official implementation: tensors by name, and the sizes."""

    def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        with safe_open(DATA / f"{name}.safetensors", "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118

    return read


@pytest.fixture
def assets() -> Path:
    """The folder of real weights and texts; the test is skipped where it is not there."""
    root = Path(os.environ.get("TOAST_ASSETS", Path.home() / ".cache" / "toast-assets"))
    if not root.is_dir():
        pytest.skip(f"real weights are not at {root}; set TOAST_ASSETS to their folder")
    return root
