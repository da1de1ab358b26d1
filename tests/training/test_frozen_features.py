"""A stored first pass gives the losses of a computed one; a stale, half-built or unfitting one is seen."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from torch import nn

from tests.training.settings import TINY_RESNET, language, losses, vision
from toast.training.run import Run, run
from toast.training.run_config import RunConfig
from toast.training.tensor_store import Store

METHODS: dict[str, dict[str, Any]] = {
    "toast": {"method": "toast"},
    "steer_from": {"method": {"name": "toast", "options": {"steer_from": 1}}},
    "select_from": {"method": {"name": "toast", "options": {"select_from": 0}}},
    "lite": {"method": {"name": "toast-lite", "rank": 2}},
    "linear": {"method": "linear"},
    "attentive": {"method": {"name": "attentive", "options": {"queries": 2}}},
}


def _both(make: Any, tmp_path: Path, **settings: Any) -> tuple[RunConfig, RunConfig]:
    computed = make(tmp_path, name="computed", **settings)
    cached = make(tmp_path, name="cached", first_pass__mode="cached", **settings)
    run(computed, "tune")
    run(cached, "tune")
    return computed, cached


def _store(config: RunConfig) -> Path:
    (folder,) = (config.out / "first-pass").iterdir()
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_losses_on_pictures_are_those_of_a_computed_first_pass(tmp_path: Path, name: str) -> None:
    computed, cached = _both(vision, tmp_path, **METHODS[name])
    assert losses(cached.folder) == pytest.approx(losses(computed.folder), abs=1e-6)
    header = json.loads((_store(cached) / "header.json").read_text())
    assert header["samples"] == 24
    assert set(header["tensors"]) == {
        "steer_from": {"normed", "entering"}, "linear": {"features"}, "attentive": {"features"}
    }.get(name, {"normed"})  # fmt: skip


@pytest.mark.parametrize("packing", ["none", "documents", "blocks"])
@pytest.mark.parametrize("start", [0, 1])
def test_losses_on_text_are_those_of_a_computed_first_pass(tmp_path: Path, packing: str, start: int) -> None:
    settings = {
        "data.packing": packing,
        "method": {"name": "toast", "options": {"steer_from": start}},
        "batch_size": 2,
    }
    settings["data.block"] = 64 if packing == "documents" else 24
    computed, cached = _both(language, tmp_path, **settings)
    assert losses(cached.folder) == pytest.approx(losses(computed.folder), abs=1e-6)


def test_a_fixed_number_of_views_is_stored(tmp_path: Path) -> None:
    settings = {"augment.preset": "crop-flip", "augment.views": 2, "epochs": 3}
    computed, cached = _both(vision, tmp_path, **settings)
    assert losses(cached.folder) == pytest.approx(losses(computed.folder), abs=1e-6)
    assert json.loads((_store(cached) / "header.json").read_text())["samples"] == 48


def test_it_is_stored_in_the_precision_of_the_run(tmp_path: Path) -> None:
    config = vision(tmp_path, precision="bf16", model__dtype="bfloat16", first_pass__mode="cached")
    run(config, "tune")
    assert json.loads((_store(config) / "header.json").read_text())["tensors"]["normed"][1] == "bfloat16"


def test_a_second_run_reads_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(vision(tmp_path, name="one", first_pass__mode="cached"), "tune")
    monkeypatch.setattr(Store, "write", lambda *_, **__: pytest.fail("computed again"))
    run(vision(tmp_path, name="two", first_pass__mode="cached", optimizer__learning_rate=1e-3), "tune")


def test_a_half_built_one_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of four samples; the power goes at the fourth part."""
    monkeypatch.setattr("toast.training.tensor_store._PART", 4)
    written: list[int] = []
    write = Store.write

    def until(self: Store, part: int, samples: Any, **options: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(part)
        write(self, part, samples, **options)

    monkeypatch.setattr(Store, "write", until)
    config = vision(tmp_path, name="run", first_pass__mode="cached")
    with pytest.raises(KeyboardInterrupt):
        run(config, "tune")
    rest: list[int] = []

    def noted(self: Store, part: int, samples: Any, **options: Any) -> None:
        rest.append(part)
        write(self, part, samples, **options)

    monkeypatch.setattr(Store, "write", noted)
    run(config, "tune")
    assert (written, rest) == ([0, 1, 2], [3, 4, 5])
    computed = vision(tmp_path, name="computed")
    run(computed, "tune")
    assert losses(config.folder) == pytest.approx(losses(computed.folder), abs=1e-6)


def test_a_stale_one_is_refused(tmp_path: Path) -> None:
    config = vision(tmp_path, first_pass__mode="cached")
    run(config, "tune")
    place = _store(config) / "header.json"
    header = json.loads(place.read_text())
    header["fingerprint"]["backbone"] = "another"
    place.write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"computed from another backbone\. Delete the folder"):
        run(vision(tmp_path, name="again", first_pass__mode="cached"), "tune")


def test_other_data_or_weights_are_stored_elsewhere(tmp_path: Path) -> None:
    def stores(**settings: Any) -> int:
        run(vision(tmp_path, name=str(settings), first_pass__mode="cached", **settings), "tune")
        return len(list((tmp_path / "runs" / "first-pass").iterdir()))

    assert stores() == 1
    assert stores(epochs=1) == 1
    assert stores(seed=1) == 2  # a random backbone has other weights
    assert stores(data__limit=16) == 3
    assert stores(method={"name": "toast", "options": {"steer_from": 1}}) == 4


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"augment.preset": "flip"}, "augmentation draws each sample anew.*augment.views"),
        (
            {"model.options.drop_path_rate": 0.1},
            r"blocks\.1\.drop_path1 drops at random in training \(rate 0\.05",
        ),
        ({"model.options.proj_drop_rate": 0.1}, "drops at random in training"),
    ],
)
def test_what_would_differ_is_refused_or_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"(?s)what is stored would differ.*{reason}"):
        run(vision(tmp_path, first_pass__mode="cached", **settings), "tune")
    auto = vision(tmp_path, name="auto", first_pass__mode="auto", **settings)
    run(auto, "tune")
    assert "computed in every step, for what is stored would differ" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "first-pass").exists()


def test_frozen_batch_norms_are_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation mode, in which they stay, they normalise each sample by itself."""
    with pytest.raises(ValueError, match="bn1 normalises by the statistics of the batch in training"):
        run(vision(tmp_path, model=TINY_RESNET, method="linear", first_pass__mode="cached"), "tune")
    create = timm.create_model

    def frozen(*args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = create(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return model

    monkeypatch.setattr(timm, "create_model", frozen)
    computed, cached = _both(vision, tmp_path, model=TINY_RESNET, method="linear")
    assert losses(cached.folder) == pytest.approx(losses(computed.folder), abs=1e-6)


def test_auto_stores_up_to_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(vision(tmp_path, name="small", first_pass__mode="auto", first_pass__limit=1e-6), "tune")
    assert "stored it needs" in capsys.readouterr().out
    run(vision(tmp_path, name="large", first_pass__mode="auto"), "tune")
    assert "24 samples, 0.000 GiB, in" in capsys.readouterr().out


def test_pre_tuning_computes_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pre-tuning measures the task loss on the first pass's output"):
        run(vision(tmp_path, first_pass__mode="cached"), "pretune")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda place: (place / "normed.bin").unlink(), "6 of 6 parts in .* those of the samples 0-3, 4-7"),
        (lambda place: _flip(place / "normed.bin"), "1 of 6 parts in .* the samples 12-15; computing them"),
        (lambda place: _flip(place / "parts.bin"), "1 of 6 parts in .* the samples 12-15; computing them"),
        (lambda place: (place / "header.json").write_text("[]"), "header.json needs a JSON object"),
        (lambda place: (place / "header.json").unlink(), "header.json does not exist"),
    ],
)
def test_what_is_damaged_is_said_and_computed_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    monkeypatch.setattr("toast.training.tensor_store._PART", 4)
    whole, again = (vision(tmp_path, name=name, first_pass__mode="cached") for name in ("whole", "again"))
    run(whole, "tune")
    held = (_store(whole) / "normed.bin").read_bytes()
    damage(_store(whole))
    run(again, "tune")
    assert re.search(said, capsys.readouterr().out)
    assert losses(again.folder) == losses(whole.folder)
    assert (_store(whole) / "normed.bin").read_bytes() == held
    run(vision(tmp_path, name="third", first_pass__mode="cached"), "tune")
    assert "computed again" not in capsys.readouterr().out


def _break(picture: Path) -> Callable[[], None]:
    """Makes a picture unreadable; returns what mends it, its time of change included."""
    held, state = picture.read_bytes(), picture.stat()
    times = (state.st_atime_ns, state.st_mtime_ns)
    picture.write_bytes(bytes(len(held)))
    os.utime(picture, ns=times)

    def mend() -> None:
        picture.write_bytes(held)
        os.utime(picture, ns=times)

    return mend


def test_what_could_not_be_read_is_computed_when_it_can(tmp_path: Path) -> None:
    whole = vision(tmp_path, name="whole", first_pass__mode="cached", first_pass__folder=str(tmp_path / "a"))
    run(whole, "tune")
    mend = _break(next((tmp_path / "pictures" / "train" / "class0").iterdir()))
    settings = {"first_pass.mode": "cached", "first_pass.folder": str(tmp_path / "b"), "data.bad_share": 0.1}
    result = run(vision(tmp_path, name="broken", **settings), "tune")
    assert len(result["bad_samples"]) == 1
    mend()
    mended = vision(tmp_path, name="mended", **settings)
    run(mended, "tune")
    assert len(list((tmp_path / "b").iterdir())) == 1  # the same store
    assert losses(mended.folder) == losses(whole.folder)


def test_what_becomes_readable_in_a_run_is_not_trained_on_as_zeros(tmp_path: Path) -> None:
    vision(tmp_path)
    mend = _break(next((tmp_path / "pictures" / "train" / "class0").iterdir()))
    config = vision(tmp_path, first_pass__mode="cached", data__bad_share=0.1)
    prepared = Run(config, "tune")
    mend()
    with pytest.raises(ValueError, match=r"first_pass: training sample \d+ could not be read .*--resume"):
        prepared.execute(resume=False)
    assert "bad_samples" in run(config, "tune", resume=True)


@pytest.mark.parametrize("number", [0, 5])
def test_bad_pictures_are_left_out(tmp_path: Path, number: int) -> None:
    vision(tmp_path)
    bad = sorted((tmp_path / "pictures" / "train").rglob("*.png"))[number]
    bad.write_bytes(b"nothing")
    computed, cached = _both(vision, tmp_path, data__bad_share=0.1)
    assert losses(cached.folder) == pytest.approx(losses(computed.folder), abs=1e-6)
