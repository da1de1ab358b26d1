"""Configurations: read, overridden, written, and refused with what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from toast.training.config_files import load_config, make_config, parse_override, to_yaml

BASE: dict[str, Any] = {"model": {"library": "demo"}, "data": {"source": "demo"}}


def test_overrides_are_set_in_their_section_and_typed() -> None:
    texts = ["optimizer.learning_rate=1e-3", "method=lora", "method.rank=4", "data.test=null", "seed=7"]
    config = make_config(BASE, [parse_override(text) for text in texts])
    assert config.optimizer.learning_rate == 0.001
    assert (config.method.name, config.method.rank) == ("lora", 4)
    assert (config.data.test, config.seed) == (None, 7)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    config = make_config(BASE, [("method.start", "x/y"), ("optimizer.rates", {"head": 3e-3})])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path) == load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("number", ["1e-3", "1E3", "2.5e-4", "-1e2", ".5"])
def test_numbers_with_an_exponent_are_numbers(number: str) -> None:
    assert parse_override(f"x={number}")[1] == float(number)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer.learning_rat": 1}, r"optimizer\.learning_rat: .* did you mean learning_rate\?"),
        ({"optimizer.learning_rate": -1}, r"optimizer\.learning_rate: .*greater than 0; got -1"),
        ({"method": "lorra"}, r"method\.name: .*lora, .*got 'lorra'"),
        ({"epochs": 2, "steps": 3}, "epochs, steps: needs one of the two"),
        ({"batch_size": 10, "micro_batches": 4}, r"multiple of micro_batches \(4\); got 10"),
        (
            {"method": "linear", "method.start": "x"},
            "start: belongs to lora, toast and toast-lite; the method is linear",
        ),
        ({"method.preset": "audio"}, "preset: needs one of vision, language.*'audio'"),
        ({"method": "lora", "first_pass.mode": "cached"}, "lora: it has no frozen first pass"),
        ({"model": {"library": "timm"}}, "name: needs the name of a model"),
        ({"data.root": 3.5}, r"data\.root: .*path.*; got 3\.5"),
    ],
)
def test_faults_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(BASE, overrides.items())


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)my\.yaml:.*seed: .*\n.*workers: "):
        make_config(BASE | {"seed": -1, "workers": -1}, where="my.yaml")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml does not exist"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match=r"needs settings by name .* got list"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"broken\.yaml is not valid YAML"):
        load_config(tmp_path / "broken.yaml")
    with pytest.raises(ValueError, match=r"needs key=value.*'seed'"):
        parse_override("seed")
