"""Heads of every kind through the training program; targets that are none are refused with their place."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.training.settings import SENTENCES, TINY_VIT, losses, write_language_model, write_pictures
from toast.data.fields import Fields
from toast.report.writing import write_report
from toast.training.config_files import make_config
from toast.training.many_heads import Heads, answers_of
from toast.training.measuring import measure
from toast.training.run import run
from toast.training.run_config import RunConfig
from toast.training.sweeping import sweep

HEADS: dict[str, Any] = {
    "tint": {"kind": "classes"},
    "place": {"kind": "regression", "columns": ["number", "half"], "loss": "huber", "weight": 0.5},
    "things": {"kind": "multilabel"},
}


def _pictures(tmp: Path, heads: dict[str, Any] = HEADS, **settings: Any) -> RunConfig:
    root = tmp / "pictures"
    if not root.is_dir():
        write_pictures(root)
        for split, count in (("train", 24), ("test", 8)):
            rows = [
                f"class{i % 3}/{i:03d}.png,{'rgb'[i % 3]},{i},{i / 2},{['', 'a;b', 'c', 'a;b'][i % 4]}"
                for i in range(count)
            ]
            (root / split / "labels.csv").write_text("\n".join(["file,tint,number,half,things", *rows]))
    base = {
        "name": "run", "out": str(tmp / "runs"), "model": TINY_VIT, "heads": heads,
        "data": {"source": "csv", "root": str(root), "test": "test"},
        "method": {"name": "toast-lite", "rank": 2}, "optimizer": {"learning_rate": 1e-2},
        "batch_size": 8, "epochs": 2, "trackers": [], "evaluation": {"predictions": True},
    }  # fmt: skip
    return make_config(base, [(name.replace("__", "."), value) for name, value in settings.items()])


def _texts(tmp: Path, **settings: Any) -> RunConfig:
    if not (tmp / "model").is_dir():
        write_language_model(tmp / "model")
    rows = [
        {"text": s, "topic": "soup" if "soup" in s else "other", "words": len(s.split()), "in": s.split()[:2]}
        for s in SENTENCES * 4
    ]
    (tmp / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {
        "name": "run", "task": "language", "out": str(tmp / "runs"), "batch_size": 4, "epochs": 1,
        "model": {"library": "transformers", "name": str(tmp / "model")}, "trackers": [],
        "data": {"source": "text", "root": str(tmp / "text.jsonl"), "packing": "none", "block": 32,
                 "test_share": 0.25},
        "heads": {"topic": {"kind": "classes"}, "words": {"kind": "regression"},
                  "in": {"kind": "multilabel"}},
    }  # fmt: skip
    return make_config(base, [(name.replace("__", "."), value) for name, value in settings.items()])


def test_the_loss_is_the_weighted_sum_of_the_heads() -> None:
    config = make_config({"heads": HEADS, "model": {"library": "demo"}, "data": {"source": "demo"}})
    columns = {"tint": ["g", "r"], "number": [0, 4], "half": ["-1", "1"], "things": ["a", ["b", "a"]]}
    with pytest.raises(ValueError, match=r"heads\.things: every training sample is labelled 'a'"):
        Heads.fit(config.heads, Fields(columns, ["one", "two"]))
    columns["things"] = ["a;c", ["b"]]
    heads = Heads.fit(config.heads, Fields(columns, ["one", "two"]))
    labels = heads.encode(Fields(columns, ["one", "two"]))
    assert labels.tolist() == [[0, 0, -1, 1, 0, 1], [1, 4, 1, 0, 1, 0]]
    logits = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    expected = (
        F.cross_entropy(logits[:, :2], torch.tensor([0, 1]), reduction="sum")
        + 0.5 * F.huber_loss(logits[:, 2:4], torch.tensor([[-1.0, -1], [1, 1]]), reduction="sum") / 2
        + F.binary_cross_entropy_with_logits(logits[:, 4:], labels[:, 3:], reduction="sum") / 3
    )
    assert float(heads.loss(logits, labels)) == pytest.approx(float(expected))
    stand_in = torch.cat([labels, torch.full((1, 6), math.nan)])  # for a batch that cannot be read
    more = torch.cat([logits, torch.ones(1, 7)])
    assert float(heads.loss(more, stand_in)) == pytest.approx(float(expected))
    assert int(heads.counted(stand_in)) == 2
    assert heads.rows(more, stand_in)[2] is None
    again = answers_of(config, json.loads(json.dumps(heads.record())))
    assert again.record() == heads.record()
    assert heads.captions(logits[0], labels[0])[1].endswith("(is number 0, half -1)")


def test_heads_on_pictures_go_on_bit_for_bit_and_are_measured_again(tmp_path: Path) -> None:
    whole = _pictures(tmp_path, name="whole", checkpoint__keep=2)
    result = run(whole, "tune", quiet=True)
    names = {"tint.accuracy", "tint.confusion", "place.r2", "place.mae", "things.mean_average_precision"}
    assert names < result["test"].keys()
    again = measure(whole.folder)
    assert {name: again[name] for name in result["test"]} == result["test"]
    rows = [json.loads(line) for line in (whole.folder / "predictions.jsonl").read_text().splitlines()]
    assert rows[7]["label"] == {"tint": "g", "place": {"number": 7, "half": 3.5}, "things": ["a", "b"]}
    assert set(rows[7]["probabilities"]["things"]) == {"a", "b", "c"}
    page = write_report(whole.folder, tmp_path / "page.html", pictures=2).read_text()
    assert all(said in page for said in ("place: R²", "tint: by class", "things: by label", "place: number"))

    before = losses(whole.folder)
    shutil.rmtree(max((whole.folder / "checkpoints").iterdir()))
    shutil.rmtree(whole.folder / "adapter")
    (whole.folder / "result.json").unlink()
    resumed = run(whole, "tune", resume=True, quiet=True)
    assert losses(whole.folder) == before
    assert resumed["test"] == result["test"]

    cached = _pictures(tmp_path, name="cached", first_pass__mode="cached")
    run(cached, "tune", quiet=True)
    assert losses(cached.folder) == pytest.approx(before, abs=1e-6)

    listed = tmp_path / "pictures" / "train" / "labels.csv"
    listed.write_text(listed.read_text().replace(",23,", ",230,"))
    (whole.folder / "result.json").unlink()
    with pytest.raises(ValueError, match=r"made from other targets than the data's: heads\.place was"):
        run(whole, "tune", resume=True, quiet=True)


def test_class_only_figures_are_not_there_for_numbers(tmp_path: Path) -> None:
    config = _pictures(tmp_path, {"number": {"kind": "regression"}}, method="linear", epochs=1)
    result = run(config, "tune", quiet=True)
    assert set(result["test"]) == {"samples", "loss", "r2", "mae"}
    page = write_report(config.folder, tmp_path / "page.html", pictures=1).read_text()
    for said in ("Confusion", "classifies", "Top 5", "Calibration", "By class"):
        assert said not in page


@pytest.mark.parametrize("method", ["toast", "lora"])
def test_heads_on_text(tmp_path: Path, method: str) -> None:
    config = _texts(tmp_path, method=method, name="computed")
    result = run(config, "tune", quiet=True)
    assert {"topic.accuracy", "words.r2", "in.mean_average_precision"} <= result["test"].keys()
    assert result["trained"]["head"] == 24 * (2 + 1 + 6)
    again = measure(config.folder)
    assert again["loss"] == pytest.approx(result["test"]["loss"], abs=1e-6)
    if method == "toast":
        cached = _texts(tmp_path, method=method, name="cached", first_pass__mode="cached")
        run(cached, "tune", quiet=True)
        assert losses(cached.folder) == pytest.approx(losses(config.folder), abs=1e-6)


def test_a_sweep_chooses_by_the_kind_and_names_each_figure(tmp_path: Path) -> None:
    config = _pictures(
        tmp_path, {"number": {"kind": "regression"}}, epochs=1, data__validation_share=0.25,
        sweep={"rows": {"probe": {"method": "linear"}}, "grid": {"optimizer.learning_rate": [1e-3, 1e-2]},
               "seeds": 1},
    )  # fmt: skip
    line = sweep(config)["rows"]["probe"]
    assert line["select_by"] == "r2"
    assert line["validation"] == max(line["searched"])
    assert "| r2 | mae |" in (config.folder / "table.md").read_text()


@pytest.mark.parametrize(
    ("column", "head", "message"),
    [
        (["1", "x"], {"kind": "regression"}, "row 1: heads.h needs a finite number; got 'x'"),
        ([1, math.nan], {"kind": "regression"}, "row 1: heads.h needs a finite number; got nan"),
        ([1, True], {"kind": "regression"}, "row 1: heads.h needs a finite number; got True"),
        ([2, "2"], {"kind": "regression"}, r"heads.h: needs numbers that differ; all .* have \[2.0\]"),
        (["a", ""], {"kind": "classes"}, "row 1: heads.h needs the name of a class; got ''"),
        (["a", "a"], {"kind": "classes"}, "heads.h: needs two classes or more; all .* are 'a'"),
        (
            ["a", 3],
            {"kind": "multilabel"},
            "row 1: heads.h needs labels with ';' between them, or a list; got 3",
        ),
        (["", ";"], {"kind": "multilabel"}, "heads.h: no training sample has a label"),
        (["a", "b"], {"kind": "classes", "columns": ["other"]}, "needs the column other; the data has h"),
        (["a", "b"], {"kind": "classes", "loss": "mse"}, "heads.h.loss: belongs to regression"),
        (
            ["a", "b"],
            {"kind": "classes", "columns": ["h", "h"]},
            "columns: classes has one; got h, h",
        ),
    ],
)
def test_targets_that_are_none_are_named(column: list[Any], head: dict[str, Any], message: str) -> None:
    config = make_config({"heads": {"h": head}, "model": {"library": "demo"}, "data": {"source": "demo"}})
    with pytest.raises(ValueError, match=message):
        Heads.fit(config.heads, Fields({"h": column}, ["row 0", "row 1"]))


def test_a_label_that_training_lacks_is_named() -> None:
    config = make_config(
        {"heads": {"h": {"kind": "multilabel"}}, "model": {"library": "demo"}, "data": {"source": "demo"}}
    )
    heads = Heads.fit(config.heads, Fields({"h": ["a", "b"]}, ["row 0", "row 1"]))
    with pytest.raises(ValueError, match=r"test row: heads.h needs one of .* 2 labels \(a, b\); got 'c'"):
        heads.encode(Fields({"h": ["c"]}, ["test row"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads.tnit.weight": 2}, r"heads\.tnit: there is no head of this name; .*tint, place, things"),
        ({"heads.tint.weight": -1}, r"heads\.tint\.weight: .*greater than 0; got -1"),
        ({"heads.tint.kind": "ordinal"}, r"heads\.tint\.kind: .*'classes', 'regression' or 'multilabel'"),
        ({"heads": {"a.b": {"kind": "classes"}}}, r"heads: needs names without a dot"),
        ({"checkpoint.best": "accuracy", "data.validation_share": 0.5}, r"needs one of loss, tint\.accuracy"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _pictures(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "vpt-deep"}, "method: vpt-deep is not offered for heads on text; needs linear, full"),
        ({"data.packing": "documents"}, r"data\.packing: with heads a row is one text; needs none"),
    ],
)
def test_settings_that_do_not_fit_text_are_named(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _texts(tmp_path, **settings)


def test_pictures_without_classes_need_heads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has columns of targets, tint, .*no classes; needs heads"):
        run(_pictures(tmp_path, {}), "tune")
