"""`toast export`: the file computes what the model does, says what it was made of, and is kept only then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import toast
from tests.models import awaken, decoder, images, tokens, vit
from toast import exporting
from toast.report.opening import OpenedModel
from toast.saving.contents import save_adapter
from toast.training.backbones import Backbone
from toast.training.config_files import make_config

DATA = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.2,) * 3}


def opened(bare: Any, folder: Path) -> OpenedModel:
    """A steered model as the command opens it, saved."""
    model = awaken(toast.wrap(bare.float().eval())).eval()
    language = hasattr(bare, "generate")
    if language:
        toast.calibrate(model, input_ids=tokens(), use_cache=False)
    else:
        toast.calibrate(model, images(4).float())
    save_adapter(model, folder)
    kind = "language" if language else "vision"
    library = {"library": "transformers", "name": "tiny"} if language else {"library": "demo"}
    config = make_config({"task": kind, "model": library, "data": {"source": "folder"}})
    backbone = Backbone(
        model, {} if language else DATA,
        feed=(lambda b: ((), b | {"use_cache": False})) if language else (lambda b: ((b["pixels"],), {})),
        logits=(lambda out: out.logits) if language else (lambda out: out),
    )  # fmt: skip
    return OpenedModel("my-task", model, backbone, config)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_a_program_computes_what_the_model_does(kind: str, tmp_path: Path) -> None:
    model = opened(vit() if kind == "vit" else decoder(), tmp_path / "adapter")
    x = (tokens(5), torch.ones(5, 9, dtype=torch.int64)) if kind == "llama" else (images(5).float(),)
    with torch.no_grad():
        expected = model.model(*x)
    done = exporting.export(model, tmp_path / "adapter", tmp_path / "a.pt2")
    assert done.fused and done.difference < 1e-3 < done.moved
    assert done.files == [tmp_path / "a.pt2"] and {each.name for each in tmp_path.iterdir()} == {
        "a.pt2", "adapter",
    }  # fmt: skip
    extra = {"toast.json": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    expected = expected.logits if kind == "llama" else expected
    torch.testing.assert_close(program.module()(*x), expected, rtol=1e-3, atol=1e-3)
    origin = json.loads(extra["toast.json"])
    assert origin["toast.adapter"] == "my-task" and len(origin["toast.adapter.sha256"]) == 64
    assert json.loads(origin["toast.versions"])["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_pictures_of_any_size(tmp_path: Path) -> None:
    model = opened(vit(dynamic_img_size=True), tmp_path / "adapter")
    exporting.export(model, tmp_path / "adapter", tmp_path / "a.pt2", any_size=True)
    program = torch.export.load(tmp_path / "a.pt2").module()
    for height, width in ((16, 16), (24, 40)):
        x = torch.randn(3, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model.model(x))


@pytest.mark.filterwarnings("ignore")  # of the exporters
@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_an_onnx_file_computes_what_the_model_does(kind: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    model = opened(vit() if kind == "vit" else decoder(), tmp_path / "adapter")
    given = {"pixels": images(5).float()}
    if kind == "llama":
        given = {"input_ids": tokens(5), "attention_mask": torch.ones(5, 9, dtype=torch.int64)}
    with torch.no_grad():
        expected = model.model(*given.values())
    exporting.export(model, tmp_path / "adapter", tmp_path / "a.onnx")
    session = runtime.InferenceSession(tmp_path / "a.onnx")
    (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in given.items()})
    expected = expected.logits if kind == "llama" else expected
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)
    assert session.get_modelmeta().custom_metadata_map["toast.adapter"] == "my-task"


def test_what_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrongly(model: Any) -> bool:
        model.get_base_model().head.weight.data.mul_(1.1)
        return fuse(model)

    model, fuse = opened(vit(), tmp_path / "adapter"), exporting._fuse
    monkeypatch.setattr(exporting, "_fuse", wrongly)
    (tmp_path / "a.pt2").write_text("before")
    with pytest.raises(ValueError, match=r"a.pt2 was not written: it computes something else than my-task"):
        exporting.export(model, tmp_path / "adapter", tmp_path / "a.pt2")
    assert (tmp_path / "a.pt2").read_text() == "before" and len([*tmp_path.iterdir()]) == 2
    with pytest.raises(ValueError, match="takes pictures of one size alone"):
        exporting.export(model, tmp_path / "adapter", tmp_path / "a.pt2", any_size=True)
