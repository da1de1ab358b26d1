"""What is looked at, and how pictures are chosen."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.report.reports import run_on_pictures
from toast.report import held_out
from toast.report.held_out import HeldOutLooks, look_at_split
from toast.training.data import vision_sources, vision_splits
from toast.training.loaded import load_run
from toast.training.preparing import open_seeded
from toast.visual.grids import Map
from toast.visual.looks import Look
from toast.visual.maps import look


def seen(index: int, is_right: bool) -> Look:
    return Look(
        index, Map(torch.ones(1, 1), (1.0, 1.0)), scores=torch.tensor([0.0, 1.0]), label=int(is_right)
    )


@pytest.mark.parametrize(
    ("right", "wrong", "count", "expected"),
    [(50, 50, 8, (4, 4)), (50, 1, 8, (7, 1)), (1, 50, 8, (1, 7)), (2, 1, 8, (2, 1)), (50, 50, 1, (1, 0))],
)
def test_half_of_the_pictures_are_wrong_ones_if_there_are(
    right: int, wrong: int, count: int, expected: tuple[int, int]
) -> None:
    looks = HeldOutLooks("test", 0, "", [seen(i, i < right) for i in range(right + wrong)])
    chosen = looks.chosen(count)
    counted = Counter(look.is_right for look in chosen)
    assert (counted[True], counted[False]) == expected
    assert len({look.index for look in chosen}) == len(chosen)
    if right == wrong == 50 and count == 8:
        assert [look.index for look in chosen] == [0, 12, 25, 37, 50, 62, 75, 87]


def test_attention_behind_prompts_is_that_of_the_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed by hand from the last block's queries and keys; the frozen map is that of a fresh backbone."""
    monkeypatch.setattr(held_out, "BATCH", 3)  # 8 pictures in 3 batches
    loaded = load_run(
        run_on_pictures(tmp_path, method="vpt-deep", method__name="vpt-deep", method__prompts=3)
    )
    splits = vision_splits(loaded.config, vision_sources(loaded.config), loaded.backbone)
    frozen = open_seeded(loaded.config, 3).model.eval()
    with torch.no_grad():  # random weights attend to all alike: sharpen both
        for model in (loaded.model, frozen):
            model.blocks[-1].attn.qkv.weight.mul_(30)
    looks = look_at_split(loaded.model, frozen, splits)
    assert [each.index for each in looks.seen] == list(range(8))
    pixels = torch.stack([splits.test[i]["pixels"] for i in range(8)])
    entering: list[torch.Tensor] = []
    last = loaded.model.blocks[-1].attn
    handle = last.qkv.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    with torch.inference_mode():
        scores = loaded.model(pixels)
        handle.remove()
        q, k, _ = last.qkv(entering[0]).reshape(8, -1, 3, 3, 8).permute(2, 0, 3, 1, 4)
        attention = F.softmax(q @ k.transpose(-1, -2) * last.scale, -1).mean(1)[:, 0, 1:17]
    expected = attention / attention.sum(1, keepdim=True)
    found = torch.stack([each.attention.values for each in looks.seen]).flatten(1)
    torch.testing.assert_close(found, expected)
    assert [each.predicted for each in looks.seen] == scores.argmax(-1).tolist()
    before = torch.stack([each.frozen.values for each in looks.seen if each.frozen is not None])
    torch.testing.assert_close(before, look(frozen, pixels).attention.values)
    moved = torch.tensor([each.moved for each in looks.seen])
    torch.testing.assert_close(moved, (found - before.flatten(1)).abs().sum(1) / 2)
    covered = F.avg_pool2d(torch.stack([splits.test[i]["target"] for i in range(8)])[:, None], 4).flatten(1)
    for maps, shares in (
        (found, [each.on_target for each in looks.seen]),
        (before.flatten(1), [each.frozen_on_target for each in looks.seen]),
    ):
        torch.testing.assert_close(torch.tensor(shares), (maps * covered).sum(1))
    assert (moved > 1e-3).all()  # so one cannot be taken for the other


def test_pictures_are_spread_over_the_split(tmp_path: Path) -> None:
    loaded = load_run(run_on_pictures(tmp_path, method="linear", steps=1))
    splits = vision_splits(loaded.config, vision_sources(loaded.config), loaded.backbone)
    looks = look_at_split(loaded.model, None, splits, most=4)
    assert [each.index for each in looks.seen] == [0, 2, 4, 6]
    assert (looks.split, looks.of) == ("test", 8)
    assert {each.frozen for each in looks.seen} == {None}
