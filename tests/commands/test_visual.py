"""`toast visualize` and `toast compare`: what they write is what the run's own measurement says."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import typer
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import toast
from tests.models import awaken
from tests.training.settings import language, vision, write_language_model
from toast.commands import compare, visualize
from toast.commands.errors import Commands
from toast.data.vision import transforms
from toast.report.opening import open_model
from toast.report.samples import find_pictures, of_files, of_split, open_split
from toast.training.loaded import load_run
from toast.training.run import run
from toast.visual.maps import look


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of three runs on pictures whose test split has boxes: TOAST, LoRA and full tuning."""
    tmp = tmp_path_factory.mktemp("runs")
    settings: dict[str, Any] = {"epochs": None, "steps": 1}
    boxes = {f"class{index % 3}/{index:03d}.png": [index, 3, index + 9, 17] for index in range(7)}
    vision(tmp)  # writes the pictures
    (tmp / "pictures" / "test" / "boxes.json").write_text(json.dumps(boxes))
    for name, method in {"steered": "toast", "low-rank": "lora", "tuned": "full"}.items():
        run(vision(tmp, name=name, method=method, **settings), "tune")
    return tmp / "runs"


@pytest.fixture(scope="module")
def language_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on sentences."""
    config = language(tmp_path_factory.mktemp("language"), epochs=None, steps=1)
    run(config, "tune")
    return config.folder


def command(*args: object) -> Result:
    app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
    for looking in (visualize.visualize, compare.compare):
        app.command()(looking)
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "160"})


def done(*args: object) -> str:
    result = command(*args)
    assert result.exit_code == 0, result.stderr + str(result.exception)
    return result.stdout


def refused(*args: object) -> str:
    result = command(*args)
    assert result.exit_code == 2, result.stdout + str(result.exception)
    return result.stderr


def test_some_of_a_runs_test_split_are_drawn(runs: Path, tmp_path: Path) -> None:
    printed = done("visualize", runs / "steered", "--count", 1, "--out", tmp_path / "out", "--block", 1)
    name = "test-class0-000"
    assert printed.split() == [str(tmp_path / "out" / f"{name}.{kind}") for kind in ("png", "npz")]
    opened = load_run(runs / "steered")
    file = runs.parent / "pictures" / "test" / "class0" / "000.png"
    with Image.open(file) as picture, np.load(tmp_path / "out" / f"{name}.npz") as held:
        transform = timm.data.create_transform(**opened.backbone.data, is_training=False)
        seen = toast.trace(opened.model, transform(picture.convert("RGB"))[None], attention_blocks=[1])
        patches = seen.attention[1][0].mean(0)[0, 1:]
        np.testing.assert_allclose(
            held["attention"].flatten(), (patches / patches.sum()).detach(), rtol=0, atol=1e-6
        )
        assert str(held["shows"]).startswith("attention, block 1 of 0-2")


def test_pictures_are_spread_over_the_split(runs: Path) -> None:
    opened = load_run(runs / "steered")
    source = open_split(opened.config, "test")
    some = of_split(source, transforms(opened.backbone.data, train=False), 3, pytest.fail)
    assert [(each.name, each.label) for each in some] == [
        (f"test/class{label}/{number:03d}", label) for label, number in ((0, 0), (0, 6), (1, 7))
    ]


def test_a_users_pictures_are_drawn_with_their_boxes(runs: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    for name in ("one.png", "more/two.PNG", ".hidden/three.png"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), "teal").save(mine / name)
    (mine / "notes.txt").write_text("no picture")
    (mine / "more" / "broken.jpg").write_bytes(b"no picture")
    (mine / "boxes.json").write_text(json.dumps({"more/two.PNG": [8, 0, 24, 16]}))
    out = tmp_path / "out"
    args = [runs / "low-rank", mine, mine / "one.png", "--out", out, "--format", "svg", "--head", 1]
    result = command("visualize", *args)
    assert result.exit_code == 0
    assert "skipped " in result.stderr and "broken.jpg: UnidentifiedImageError" in result.stderr
    assert sorted(p.name for p in out.iterdir()) == [
        f"{name}.{kind}" for name in ("more-two", "one-2", "one") for kind in ("npz", "svg")
    ]
    assert "inthebox" in _text_of(out / "more-two.svg")
    assert "inthebox" not in _text_of(out / "one.svg")


def _text_of(svg: Path) -> str:
    """The texts of a drawing: matplotlib writes them as comments beside their outlines."""
    lines = [line.strip() for line in svg.read_text().splitlines()]
    return "".join(line[4:-3].replace(" ", "") for line in lines if line.startswith("<!--") and len(line) > 7)


def test_boxes_and_masks_are_taken_along_where_the_picture_goes(runs: Path, tmp_path: Path) -> None:
    """The same target as a box and as a mask, in a picture twice as wide as the model's, cropped."""
    data = open_model(runs / "steered").backbone.data | {"crop_pct": 1.0}
    for kind in ("box", "mask"):
        (tmp_path / kind / "deep").mkdir(parents=True)
        Image.new("RGB", (64, 32), "navy").save(tmp_path / kind / "deep" / "a.jpg")
    (tmp_path / "box" / "boxes.csv").write_text("name,x0,y0,x1,y1\ndeep/a.jpg,24,8,40,16\n")
    mask = np.zeros((32, 64), np.uint8)
    mask[8:16, 24:40] = 255
    (tmp_path / "mask" / "masks" / "deep").mkdir(parents=True)
    Image.fromarray(mask).save(tmp_path / "mask" / "masks" / "deep" / "a.png")
    targets = []
    for kind in ("box", "mask"):
        found = find_pictures([tmp_path / kind])
        assert [each.path.name for each in found] == ["a.jpg"]
        (sample,) = of_files(found, transforms(data, train=False), pytest.fail)
        targets.append(sample.target)
        assert sample.name == "deep/a"
        assert sample.box == [4, 4, 12, 8]
    assert torch.equal(*targets)


def test_comparison_says_what_the_runs_measured(runs: Path, tmp_path: Path) -> None:
    places = [runs / name for name in ("tuned", "steered", "low-rank")]
    printed = done("compare", *places, "--out", tmp_path / "out", "--batch-size", 3)
    held = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert set(held["models"]) == {"frozen", "tuned", "steered", "low-rank"}
    assert (held["pictures"], held["in_sight"], held["out_of_sight"]) == (8, 7, 0)
    assert held["reference"] == "frozen"
    assert "1 of the pictures have no target, first test/class1/007." in printed
    for place in places:
        measured = json.loads((place / "result.json").read_text())["test"]["attention_on_target"]
        row = held["models"][place.name]
        assert row["on_target"]["mean"] == pytest.approx(measured, abs=1e-6)
        assert row["on_target"]["low"] < row["on_target"]["mean"] < row["on_target"]["high"]
    assert f"{measured:.3f} [" in printed
    with (tmp_path / "out" / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 + 3 * 6 + 3  # accuracy of three, selection of one: inside, outside, ratio


def test_without_boxes_what_needs_none_is_compared(tmp_path: Path) -> None:
    config = vision(tmp_path, name="plain", epochs=None, steps=1)
    measured = run(config, "tune")["test"]
    printed = done("compare", config.folder, "--out", tmp_path / "out")
    row = json.loads((tmp_path / "out" / "comparison.json").read_text())["models"]["plain"]
    assert row.keys() == {"accuracy", "entropy", "total_variation", "jensen_shannon"}
    assert row["accuracy"]["mean"] == pytest.approx(measured["accuracy"])
    assert "No target is visible, so nothing is measured on targets" in printed
    assert "attention on target" not in printed


def test_without_an_adapter_the_frozen_model_is_opened(runs: Path, tmp_path: Path) -> None:
    """A run tuned in full holds no frozen model; that of a steered run on the same backbone is the same."""
    found = []
    for name in ("tuned", "steered"):
        done("compare", runs / name, "--out", tmp_path / name, "--images", runs.parent / "pictures" / "test")
        found.append(json.loads((tmp_path / name / "comparison.json").read_text()))
    assert found[0]["models"]["frozen"] == found[1]["models"]["frozen"]
    assert found[0]["models"]["tuned"]["total_variation"]["mean"] > 0


def test_a_language_run_answers_prompts(language_run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("stir\nthe rice\n")
    out = tmp_path / "out"
    printed = done("visualize", language_run, f"@{tmp_path / 'prompt.txt'}", "--out", out, "--tokens", 3)
    assert sorted(p.name for p in out.iterdir()) == [
        f"text-1.{kind}" for kind in ("html", "npz", "png", "svg")
    ]
    assert str(out / "text-1.html") in printed
    assert "Attention of block 1, mean of all heads." in printed
    opened = load_run(language_run)
    ids = opened.backbone.tokenizer("stir\nthe rice", return_tensors="pt")["input_ids"]
    answered = opened.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False
    )
    with np.load(out / "text-1.npz") as held:
        assert held["token_ids"].tolist() == answered[0].tolist()
        assert held["is_prompt"].sum() == ids.shape[1]


def test_an_adapter_needs_its_backbone(tmp_path: Path) -> None:
    """A tiny ViT of timm with the weights in a file, and a head of three classes in the adapter."""
    vit = timm.create_model("test_vit", num_classes=3)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    model = awaken(toast.wrap(vit, modules_to_save=["head"])).eval()
    toast.save_adapter(model, tmp_path / "adapter")
    Image.new("RGB", (200, 160), "olive").save(tmp_path / "picture.png")
    assert "does not say on which backbone" in refused("visualize", tmp_path / "adapter")
    named = ["--model", "test_vit", "--weights", tmp_path / "vit.safetensors"]
    done("visualize", tmp_path / "adapter", tmp_path / "picture.png", *named, "--out", tmp_path / "out",
         "--method", "grad-cam")  # fmt: skip
    opened = open_model(tmp_path / "adapter", "test_vit", tmp_path / "vit.safetensors")
    x = torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(look(opened.model, x).output, model(x).detach())
    with np.load(tmp_path / "out" / "picture.npz") as held:
        assert held["scores"].shape == (3,)
        assert str(held["shows"]) == "Grad-CAM, block 5 of 0-5"
    missing = refused("visualize", tmp_path / "adapter", *named)
    assert "names no test split; pass pictures of your own" in missing


def test_an_adapter_may_name_its_backbone(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    place = write_language_model(tmp_path / "model")
    model = toast.wrap(AutoModelForCausalLM.from_pretrained(place))
    toast.save_adapter(model, tmp_path / "adapter")
    opened = open_model(tmp_path / "adapter")
    assert opened.is_language
    assert opened.backbone.tokenizer.eos_token == "</s>"
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(opened.model(ids).logits, model.eval()(ids).logits)


def test_an_adapter_on_another_backbone_is_refused(tmp_path: Path) -> None:
    vit = timm.create_model("test_vit", num_classes=3)
    get_peft_model(vit, LoraConfig(r=2, target_modules=["qkv"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter does not fit the backbone of the demo: .* size mismatch"):
        open_model(tmp_path / "adapter", demo=True)
    with pytest.raises(ValueError, match="--demo is a backbone of its own"):
        open_model(tmp_path / "adapter", "test_vit", demo=True)
    with pytest.raises(ValueError, match="--weights is a file for a model of timm"):
        open_model(tmp_path / "adapter", "owner/name", tmp_path / "adapter")


def test_without_a_trained_head_no_class_is_said(tmp_path: Path) -> None:
    vit = timm.create_model("test_vit")
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    toast.save_adapter(toast.wrap(vit), tmp_path / "adapter")
    Image.new("RGB", (160, 160)).save(tmp_path / "picture.png")
    args = ["visualize", tmp_path / "adapter", tmp_path / "picture.png", "--model", "test_vit", "--weights",
            tmp_path / "vit.safetensors", "--out", tmp_path / "out", "--format", "svg"]  # fmt: skip
    assert "holds no head that says one" in refused(*args, "--method", "relevance")
    done(*args)
    assert "predicted" not in _text_of(tmp_path / "out" / "picture.svg")


def test_what_cannot_be_shown_is_refused(runs: Path, language_run: Path, tmp_path: Path) -> None:
    run_ = runs / "steered"
    other = vision(tmp_path, name="other", method="linear", seed=1, epochs=None, steps=1)
    run(other, "tune")
    empty, plain = tmp_path / "empty", tmp_path / "plain"
    empty.mkdir()
    plain.mkdir()
    Image.new("RGB", (16, 16)).save(plain / "a.png")
    (plain / "masks").mkdir()
    Image.new("L", (8, 8), 255).save(plain / "masks" / "a.png")
    for args, message in [
        (["visualize", empty], "is neither a run's folder, with config.yaml, nor an adapter's"),
        (["visualize", run_, "--demo"], "is a run, whose configuration names its backbone"),
        (["visualize", run_, "--split", "train"], "needs validation or test; got 'train'"),
        (["visualize", run_, "--split", "validation"], "names no validation split"),
        (["visualize", run_, empty], "holds no picture"),
        (["visualize", run_, tmp_path / "none.png"], "there is no file or folder"),
        (["visualize", run_, "--head", "all"], "--head: needs a number or mean; got 'all'"),
        (["visualize", run_, "--block", "7"], "has blocks 0 to 2; got 7"),
        (["visualize", run_, "--method", "gaze"], "'gaze' is not one of 'attention', 'rollout'"),
        (["visualize", run_, "--format", "bmp"], "needs some of png, svg, pdf"),
        (["visualize", language_run], "needs prompts, or @FILE"),
        (["visualize", language_run, "a", "--query", "mean", "--smooth"], "--query, --smooth: for pictures"),
        (["visualize", language_run, "@none.txt"], "@none.txt: needs a text file in UTF-8"),
        (["compare", run_, language_run], "is a language model; only vision models can be compared"),
        (["compare", run_, other.folder], "have different backbones, or prepare pictures differently"),
        (["compare", run_, run_], "needs each run once"),
        (["compare", run_, "--images", plain], "a mask needs the size of its picture"),
    ]:
        assert message in refused(*args, "--out", tmp_path / "out"), args
    assert not (tmp_path / "out").exists()


def test_runs_of_one_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    assert compare._names([runs / "steered", runs / "tuned"]) == ["steered", "tuned"]
    same = tmp_path / "other" / "steered"
    assert compare._names([runs / "steered", same, tmp_path / "frozen"]) == [
        "runs/steered",
        "other/steered",
        f"{tmp_path.name}/frozen",
    ]


def test_the_commands_load_no_torch_before_they_run() -> None:
    code = "import sys, toast.cli; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"
