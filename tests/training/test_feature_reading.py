"""`toast features`: files hold what the model computes of each sample, however they were made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import toast
from tests.training.settings import TINY_RESNET, language, vision
from toast.training.config_files import to_yaml
from toast.training.feature_reading import write_split
from toast.training.loaded import load_run
from toast.training.preparing import open_all
from toast.training.run import run
from toast.training.tensor_store import Store

ROOT = Path(__file__).parents[2]


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        meta = {name: json.loads(text) for name, text in file.metadata().items()}
        return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118


def _quiet(*args: Any, **options: Any) -> Path:
    return write_split(*args, say=lambda _: None, **options)


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A steered run with a stored first pass."""
    config = vision(tmp_path_factory.mktemp("steered"), first_pass__mode="cached", epochs=1)
    run(config, "tune", quiet=True)
    return config.folder


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("what", ["pooled", "class", "selected"])
def test_files_hold_what_the_model_computes(steered: Path, tmp_path: Path, what: Any, split: str) -> None:
    """Of the training split from the stored first pass."""
    tensors, meta = _read(_quiet(steered, tmp_path / "x.safetensors", split=split, what=what))
    loaded = load_run(steered)
    data = getattr(open_all(loaded.config)[1], split)
    items = [data[0, index] for index in range(len(data))]
    seen = toast.trace(loaded.model, torch.stack([item["pixels"] for item in items]))
    tokens = loaded.model.get_base_model().forward_features(torch.stack([item["pixels"] for item in items]))
    expected = {
        "pooled": tokens[:, 0],
        "class": tokens[:, 0],
        "selected": (seen.selection_weights[..., None] * seen.features).mean(1),
    }
    torch.testing.assert_close(tensors["features"], expected[what].detach(), rtol=1e-4, atol=1e-5)
    assert tensors["label"].tolist() == [item["label"] for item in items]
    assert meta["names"] == [data.source.sample_name(index) for index in range(len(data))]
    assert meta["classes"] == ["class0", "class1", "class2"]
    assert not list(tmp_path.glob(".*"))


def test_parquet_holds_the_same_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "linear.yaml"
    file.write_text(to_yaml(vision(tmp_path, method="linear", augment={"preset": "flip"})))
    tensors, meta = _read(_quiet(file, tmp_path / "x.safetensors"))
    monkeypatch.setattr("toast.training.tensor_store._PART", 10)
    written: list[int] = []
    write = Store.write

    def until(self: Store, part: int, *args: Any, **options: Any) -> None:
        if written == [0]:
            written.append(-1)
            raise KeyboardInterrupt
        written.append(part)
        write(self, part, *args, **options)

    monkeypatch.setattr(Store, "write", until)
    with pytest.raises(KeyboardInterrupt):
        _quiet(file, tmp_path / "x.parquet")
    table = parquet.read_table(_quiet(file, tmp_path / "x.parquet"))
    assert written == [0, -1, 1, 2]
    assert torch.allclose(torch.tensor(table["features"].to_pylist()), tensors["features"], atol=1e-6)
    assert (table["name"].to_pylist(), table["label"].to_pylist()) == (
        meta["names"], tensors["label"].tolist()
    )  # fmt: skip
    assert json.loads(table.schema.metadata[b"classes"]) == meta["classes"]


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    config = vision(tmp_path, method="linear", data__bad_share=0.1)
    bad = sorted((tmp_path / "pictures" / "train").rglob("*.png"))[5]
    bad.write_bytes(b"nothing")
    file = tmp_path / "linear.yaml"
    file.write_text(to_yaml(config))
    said: list[str] = []
    tensors, meta = _read(write_split(file, tmp_path / "x.safetensors", say=said.append))
    assert len(tensors["features"]) == len(tensors["label"]) == len(meta["names"]) == 23
    assert any(line == f"left out train/{bad.parent.name}/{bad.name}" for line in said)
    with pytest.raises(ValueError, match=r"1 of 24 train images cannot be read.*data\.bad_share=0\.0"):
        _quiet(file, tmp_path / "y.safetensors", ["data.bad_share=0"])


def test_text_is_the_mean_over_its_tokens(tmp_path: Path) -> None:
    config = language(tmp_path)
    file = tmp_path / "text.yaml"
    file.write_text(to_yaml(config))
    tensors, meta = _read(_quiet(file, tmp_path / "x.safetensors", what="pooled"))
    backbone, splits = open_all(config)
    row = torch.tensor([splits.train[0, 3]["input_ids"]])
    states = backbone.model.model(row).last_hidden_state
    assert torch.allclose(tensors["features"][3], states.mean(1)[0], atol=1e-5)
    assert meta["names"][3] == "row 3"
    with pytest.raises(ValueError, match=r"data\.packing: features are of a row"):
        _quiet(file, tmp_path / "y.safetensors", ["data.packing=documents"])


@pytest.mark.parametrize(
    ("settings", "out", "options", "message"),
    [
        ({}, "x.csv", {}, r"--out: needs a file that ends in \.safetensors or \.parquet; got 'x\.csv'"),
        ({}, "x.parquet", {"split": "dev"}, "--split: .* has train, test; got 'dev'"),
        ({}, "x.parquet", {"what": "all"}, "--what: needs one of pooled, class, selected; got 'all'"),
        ({"method": "linear"}, "x.parquet", {"what": "selected"}, "--what selected needs a model with an"),
        ({"model": TINY_RESNET, "method": "linear"}, "x.parquet", {"what": "class"}, "no class token|family"),
    ],
)
def test_what_is_not_there_is_named(
    tmp_path: Path, settings: dict[str, Any], out: str, options: dict[str, Any], message: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(vision(tmp_path, **settings)))
    with pytest.raises(ValueError, match=message):
        _quiet(file, tmp_path / out, **options)


def test_the_lines_of_the_documentation_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install -e '.[dev]'")
    file = tmp_path / "linear.yaml"
    file.write_text(to_yaml(vision(tmp_path, method="linear")))
    for split in ("train", "test"):
        _quiet(file, tmp_path / f"{split}.safetensors", split=split)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "features.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "features.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["LogisticRegression", "LinearSVC", "KNeighborsClassifier"]
    assert float(lines[0].split()[1]) > 0.8  # pictures of one tint each
