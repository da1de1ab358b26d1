"""Warnings about torchao are dropped, and no others of the same logger."""

from __future__ import annotations

import logging

import pytest

from toast.commands.noise import silence


def test_warnings_about_torchao_alone_are_dropped(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("torch.utils._pytree")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "propagate", True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("warnings.filterwarnings", lambda *_: None)
        silence()
    for module in ("torchao.quantization", "mine"):
        logger.warning("%s is an Enum subclass", type("Kind", (), {"__module__": module}))
    logger.warning("something else")
    assert [record.message for record in caplog.records] == [
        "<class 'mine.Kind'> is an Enum subclass", "something else",
    ]  # fmt: skip
