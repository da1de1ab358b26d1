"""YAML as users write it: nothing lost, nothing misread, and no file that costs more than it holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import toast
from toast.cli import app
from toast.files.atomic import read_regular
from toast.training.config_files import load_config, make_config, parse_override, to_yaml
from toast.training.yaml_text import MOST_LEVELS, dump_yaml, parse_yaml

BASE = "model: {library: demo}\ndata: {source: demo}\n"


def _load(tmp_path: Path, text: str | bytes) -> Any:
    place = tmp_path / "c.yaml"
    place.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(place)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("010", "010"), ("12:30", "12:30"), ("2026-01-01", "2026-01-01"), ("0x10", 16),
        ("1_000", 1000), ("-.inf", float("-inf")), ("no", False), ("~", None), ("1.5", 1.5), ("-3", -3),
        ("{<<: {a: 1}, a: 2}", {"a": 2}),
    ],
)  # fmt: skip
def test_plain_text_is_what_it_looks_like(text: str, value: Any) -> None:
    assert parse_yaml(text) == value


@pytest.mark.parametrize("text", ["1e-3", "010", "no", "2026-01-01", "~", "12:30", ".5", "a: b", "1_0"])
def test_text_is_written_so_that_it_stays_text(text: str) -> None:
    assert parse_yaml(dump_yaml({"name": text})) == {"name": text}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "optimizer: {clip: 1}\nmethod: lora\noptimizer: {momentum: 0}\n",
            "'optimizer' twice.*line 3.*line 5",
        ),
        ("optimizer: {clip: 1, clip: 2}\n", r"'clip' twice"),
        ("a: &a [*a]\n", "contains itself"),
        ("a: &a {b: *a}\n", "contains itself"),
        ("a: " + "[" * 5000 + "]" * 5000, f"more than {MOST_LEVELS} levels deep"),
        ("a: &l0 [x]\n" + "".join(f"b{n}: &l{n + 1} [{f'*l{n}, ' * 9}]\n" for n in range(30)), "written out"),
        (
            "a: &l0 [x]\n" + "".join(f"b{n}: &l{n + 1} [*l{n}]\n" for n in range(3000)),
            "levels with its aliases",
        ),
        ("#" * 2**20, "characters; a configuration has at most"),
        ("a: [1\n", "is not valid YAML"),
    ],
    ids=["section", "key", "itself", "mapping", "deep", "bomb", "chain", "large", "broken"],
)
def test_what_no_configuration_is_is_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)c\.yaml .*{message}"):
        _load(tmp_path, BASE + text)


def test_other_encodings_are_read_or_named_with_file_and_line(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert _load(tmp_path, (BASE + "name: für\n").encode(encoding)).name == "für"
    with pytest.raises(ValueError, match=r"c\.yaml, line 3"):
        _load(tmp_path, (BASE + "name: für\n").encode("latin-1"))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for place in (tmp_path / "pipe.yaml", Path("/dev/zero")):
        with pytest.raises(ValueError, match=r"is a special file .*; needs a YAML file"):
            load_config(place)
        with pytest.raises(ValueError, match=r"is a special file .*; needs a file"):
            read_regular(place)
    with pytest.raises(ValueError, match="needs at most 1"):
        (tmp_path / "two").write_text("ab")
        read_regular(tmp_path / "two", most=1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=true", r"learning_rate: needs a number; got true"),
        ("optimizer.rates={head: yes}", "head: needs a number; got true"),
        ("seed=false", "seed: needs a number; got false"),
        ("optimizer.learning_rate=.inf", "learning_rate: .*finite"),
        ("optimizer.weight_decay=.nan", "weight_decay: .*finite"),
        ("method.rank=true", "rank: needs a number"),
        ("seed=4294967296", "seed: .*less than 4294967296"),
        ("name=2024", "name: needs text; put it in quotes; got 2024"),
        ("data.train=on", "train: needs text; put it in quotes; got True"),
        ("name=../../escape", "name: needs the name of a folder, without a path; got '../../escape'"),
        ("name=..", "name: needs the name of a folder"),
        ("name=''", "name: needs the name of a folder"),
        ("name=/tmp/x", "name: needs the name of a folder"),
        ("sweep.rows={../x: {}}", "needs the name of a folder"),
        ("out=~nobody-at-all/x", "out: there is no such home folder"),
        ("name=" + "n" * 300, "at most 200 bytes"),
    ],
)
def test_values_that_would_be_misread_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(parse_yaml(BASE), [parse_override(override)])


def test_the_precision_is_switched_off_by_its_documented_word(tmp_path: Path) -> None:
    config = _load(tmp_path, BASE + "precision: no\n")
    assert config.precision == "no"
    assert _load(tmp_path, to_yaml(config)) == config
    assert make_config(parse_yaml(BASE), [parse_override("precision=no")]).precision == "no"


def test_the_home_folder_is_filled_in_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("HERE", "/data")
    text = "out: ~/runs\nmethod: {start: ~/a}\nfirst_pass: {folder: ~/f}\n"
    text += "augment: {options: {x: [~/y, a~/b]}}\n"
    config = _load(tmp_path, BASE + text)
    assert (str(config.out), str(config.method.start)) == ("/home/somebody/runs", "/home/somebody/a")
    assert str(config.first_pass.folder) == "/home/somebody/f"
    assert config.augment.options == {"x": ["/home/somebody/y", "a~/b"]}
    set_on_top = [parse_override("out=~/x"), parse_override("data.root=$HERE/y")]
    config = make_config(parse_yaml(BASE), set_on_top)
    assert (str(config.out), str(config.data.root)) == ("/home/somebody/x", "/data/y")
    given: list[Path] = []

    def write_report(run: Path, out: Path, pictures: int) -> Path:
        given.append(out)
        return Path(__file__)

    monkeypatch.setattr("toast.report.writing.write_report", write_report)
    monkeypatch.setattr("toast.training.run_folder.refuse_no_run", lambda _: None)
    assert CliRunner().invoke(app, ["report", "x", "--out=~/page.html"]).exit_code == 0
    assert given == [Path("/home/somebody/page.html")]


def test_an_adapter_is_never_saved_without_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.models import decoder

    monkeypatch.chdir(tmp_path)
    import torch

    model = toast.wrap(decoder("llama", torch.float32))
    with pytest.raises(ValueError, match="folder: needs a path; got an empty text"):
        toast.save_adapter(model, "")
    assert not list(tmp_path.iterdir())
