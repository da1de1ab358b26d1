"""Counting what could not be decoded."""

from __future__ import annotations

import logging

import pytest

from toast.data.vision import BadSamples


def test_each_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    bad = BadSamples(0.5, 4)
    with caplog.at_level(logging.WARNING):
        bad.add([("a.png", "truncated"), ("b.png", "no picture")])
        bad.add([("a.png", "truncated")])
        bad.add([])
    assert len(bad) == 2
    assert caplog.messages == [
        "picture skipped: a.png: truncated",
        "picture skipped: b.png: no picture",
    ]


def test_too_many() -> None:
    bad = BadSamples(0.5, 4)
    bad.add([("a", "x"), ("b", "y")])
    with pytest.raises(
        ValueError, match=r"3 of 4 pictures .*\n  a: x\n  b: y\n  c: z\n.*share of 0\.5 .* Fix"
    ):
        bad.add([("c", "z")])
    with pytest.raises(ValueError, match="share of 0 "):
        BadSamples(0, 10**6).add([("a", "x")])


def test_summary() -> None:
    bad = BadSamples(1, 10)
    assert bad.summary() == "none of 10 pictures was bad"
    bad.add((str(i), "x") for i in range(8))
    assert bad.summary().startswith("8 of 10 pictures could not be decoded:\n  0: x\n")
    assert bad.summary().endswith("4: x\n  and 3 more")


@pytest.mark.parametrize(("share", "total"), [(-0.1, 5), (1.1, 5), (0.1, 0)])
def test_wrong_limits(share: float, total: int) -> None:
    with pytest.raises(ValueError, match="limit_share must be 0 to 1 and total at least 1"):
        BadSamples(share, total)
