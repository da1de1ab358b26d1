"""The shipped backbone: its size, what it computes, and what happens to a damaged file."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from toast.embedded import backbone
from toast.embedded.backbone import load_backbone

ASSETS = Path(str(resources.files("toast.embedded"))) / "assets"


@pytest.fixture
def replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes | None], None]:
    """Return a function that has the loader find other bytes, or no file."""

    def replace(content: bytes | None) -> None:
        (tmp_path / "assets").mkdir(exist_ok=True)
        if content is not None:
            (tmp_path / "assets" / "backbone.safetensors").write_bytes(content)
        monkeypatch.setattr(backbone.resources, "files", lambda _: tmp_path)

    return replace


def test_size_on_disk() -> None:
    assert (ASSETS / "backbone.safetensors").stat().st_size < 12e6


def test_output_is_finite() -> None:
    model = load_backbone()
    assert not model.training
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens = model.forward_features(images)
        logits = model(images)
    assert tokens.shape == (2, 65, 192)
    assert tokens.dtype == torch.float32
    assert tokens.isfinite().all()
    assert torch.equal(logits, torch.zeros(2, 10))


def test_pictures_are_told_apart() -> None:
    model = load_backbone(0)
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first, second = model(images)
    assert (first - second).norm() > 0.1 * first.norm()


@pytest.mark.parametrize("num_classes", [0, 3])
def test_head(num_classes: int) -> None:
    with torch.inference_mode():
        out = load_backbone(num_classes)(torch.zeros(1, 3, 112, 112))
    assert out.shape == (1, num_classes or 192)


def test_options_reach_the_architecture() -> None:
    assert load_backbone(drop_path_rate=0.2).blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


def test_missing_file(replaced: Callable[[bytes | None], None]) -> None:
    replaced(None)
    with pytest.raises(ValueError, match="cannot be read"):
        load_backbone()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file(replaced: Callable[[bytes | None], None], share: float) -> None:
    whole = (ASSETS / "backbone.safetensors").read_bytes()
    replaced(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="damaged"):
        load_backbone()


def test_foreign_file(replaced: Callable[[bytes | None], None], tmp_path: Path) -> None:
    state = load_file(ASSETS / "backbone.safetensors")
    state["stranger"] = state.pop("cls_token")
    save_file(state, tmp_path / "foreign")
    replaced((tmp_path / "foreign").read_bytes())
    with pytest.raises(ValueError, match=r"1 missing: .*1 unexpected|2 of another shape"):
        load_backbone()


def test_weights_of_another_shape(replaced: Callable[[bytes | None], None], tmp_path: Path) -> None:
    state = load_file(ASSETS / "backbone.safetensors")
    state["pos_embed"] = state["pos_embed"][:, :50].contiguous()
    save_file(state, tmp_path / "foreign")
    replaced((tmp_path / "foreign").read_bytes())
    with pytest.raises(ValueError, match="pos_embed"):
        load_backbone()
