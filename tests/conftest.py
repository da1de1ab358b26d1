"""Tiny random models, built from configurations, and the fixtures of the official implementation."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Heavy libraries are imported by the fixtures: the process that hands the tests out would wait for them.
if TYPE_CHECKING:
    from torch import Tensor

# No test may reach for a hub; set before the libraries are imported.
os.environ["HF_HUB_OFFLINE"] = "1"

DATA = Path(__file__).parent / "fixtures"

# The libraries are a million objects that stay: the collector would go through them again and again.
gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Puts first what waits for processes: these take longest, and one worker forks all from one process."""
    items.sort(key=lambda item: vars(item.module).keys().isdisjoint(("on_two_processes", "start_module")))


def pytest_collection_finish() -> None:
    """Takes what is imported by now out of the collector's sight, and has it look less often."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are tiny: threads of one operator would only wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What stays of a process ends up where pytest cleans up: its workers end without their exit handlers."""
    tempfile.tempdir = str(tmp_path_factory.mktemp("files"))
    yield
    tempfile.tempdir = None


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    import torch

    torch.default_generator.manual_seed(0)  # `torch.manual_seed` notes the stack for each kind of accelerator


@pytest.fixture
def official() -> Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]:
    """Reads one run of the official implementation: tensors by name, and the sizes."""
    from safetensors import safe_open

    def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        with safe_open(DATA / f"{name}.safetensors", "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118

    return read


@pytest.fixture
def adapters_of_transformers() -> None:
    """The adapter methods of transformers' models; skipped where they refuse PEFT as installed, LoRA too."""
    import peft
    import transformers
    from packaging.version import Version
    from transformers.integrations.peft import MIN_PEFT_VERSION

    needed, there = Version(MIN_PEFT_VERSION), Version(peft.__version__)
    if there < needed:
        pytest.skip(f"transformers {transformers.__version__} refuses PEFT below {needed}; there is {there}")


@pytest.fixture
def assets() -> Path:
    """The folder of real weights and texts; the test is skipped where it is not there."""
    root = Path(os.environ.get("TOAST_ASSETS", Path.home() / ".cache" / "toast-assets"))
    if not root.is_dir():
        pytest.skip(f"real weights are not at {root}; set TOAST_ASSETS to their folder")
    return root
