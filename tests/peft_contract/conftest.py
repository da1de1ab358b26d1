"""A check of `case` runs on all models and variants, of `each` on all models, of `few` on two models."""

from __future__ import annotations

import pytest

from tests.peft_contract.cases import CASES, EACH, FEW, Case


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=EACH, ids=str)
def each(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=FEW, ids=str)
def few(request: pytest.FixtureRequest) -> Case:
    return request.param
