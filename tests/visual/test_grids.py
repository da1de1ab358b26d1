"""Tokens come back to their place in the picture."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests import zoo
from tests.models import vit
from tests.visual.seen import steer
from toast.visual.grids import put_back, sequence_grid
from toast.visual.maps import look
from toast.visual.seeing import find_parts

near = torch.testing.assert_close


class Marks(nn.Module):
    """Stands for an attention, and keeps the coordinates of the tokens that it is given."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.seen = x
        return x


def coordinates(block: Any, rows: int, columns: int) -> Tensor:
    """Row and column of each token in the block's windows, as timm's own code arranges them; -1 fills up."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(1, rows, columns, 2)
    marks, attention = Marks(), block.attn
    block.attn = marks
    block._attn((grid + 1).float())
    block.attn = attention
    return marks.seen.long() - 1


@cache
def swin(kind: str, size: tuple[int, int]) -> Any:
    """A Swin transformer whose maps need filling up, and whose odd blocks shift their windows."""
    module, _, made = zoo.ROWS[kind].made.partition(".")
    model = getattr(getattr(timm.models, module), made)(**(zoo.ROWS[kind].options | {"img_size": size}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


@pytest.mark.parametrize("kind", ["timm-swin", "timm-swin-v2"])
@pytest.mark.parametrize("size", [(24, 24), (28, 44)])
@pytest.mark.parametrize("number", [0, 1, 3])
@torch.no_grad()
def test_windows_are_put_back_where_timm_took_them(kind: str, size: tuple[int, int], number: int) -> None:
    model = swin(kind, size)
    parts = find_parts(model)
    block: Any = parts.blocks[number]
    side = 4 if number < 2 else 8
    rows, columns = (-(-pixels // side) for pixels in size)
    places = coordinates(block, rows, columns)
    y, x = (put_back(places[..., i], block, rows, columns)[0] for i in range(2))
    assert torch.equal(y, torch.arange(rows)[:, None].expand(rows, columns))
    assert torch.equal(x, torch.arange(columns).expand(rows, columns))


@pytest.mark.parametrize("kind", ["timm-swin", "timm-swin-v2"])
@pytest.mark.parametrize("number", [0, 1, 3])
@torch.no_grad()
def test_the_map_of_windows_is_what_each_token_receives(kind: str, number: int) -> None:
    size = (28, 44)
    model, x = copy.deepcopy(swin(kind, size)), torch.randn(2, 3, *size).double()
    parts = find_parts(model)
    block: Any = parts.blocks[number]
    seen: list[Tensor] = []
    block.attn.fused_attn = False
    block.attn.attn_drop.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    views = look(model, x, block=number)
    rows, columns = views.attention.values.shape[1:]
    places = coordinates(block, rows, columns)
    received = [[[0.0] * columns for _ in range(rows)] for _ in range(2)]
    windows = len(places)
    for picture in range(2):
        for window in range(windows):
            attention = seen[0][picture * windows + window].mean(0).tolist()
            for query, (y, _) in enumerate(places[window].tolist()):
                for key, (to_y, to_x) in enumerate(places[window].tolist()):
                    if y >= 0 and to_y >= 0:
                        received[picture][to_y][to_x] += attention[query][key] / (rows * columns)
    expected = torch.tensor(received, dtype=torch.float64)
    near(views.on_patches, expected.sum((1, 2)))
    near(views.attention.values, expected / expected.sum((1, 2), keepdim=True))
    assert views.on_patches.max() < 1 + 1e-9
    assert views.attention.cell == ((4, 4) if number < 2 else (8, 8))


@torch.no_grad()
def test_grids_of_a_steered_swin_fit_the_picture() -> None:
    model, x = copy.deepcopy(swin("timm-swin", (28, 44))), torch.randn(1, 3, 28, 44).double()
    views = look(steer(model, x), x, block=1)
    shapes = {block: tuple(maps.values.shape[1:]) for block, maps in views.signals.items()}
    assert shapes == {0: (7, 11), 1: (7, 11), 2: (4, 6), 3: (4, 6)}
    assert tuple(views.selection.values.shape[1:]) == (4, 6)
    assert views.selection.cell == (8, 8)
    assert views.frozen.values.shape == views.attention.values.shape == (1, 7, 11)


@torch.no_grad()
def test_stages_of_convnext_have_cells_of_their_own() -> None:
    model, x = zoo.build("timm-convnext"), torch.randn(1, 3, 64, 96).double()
    views = [look(model, x, block=block).attention for block in range(4)]
    assert [maps.cell[0] for maps in views] == [4, 8, 16, 32]
    assert [tuple(maps.values.shape[1:]) for maps in views] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    signals = look(steer(model, x), x).signals
    assert [maps.cell[0] for maps in signals.values()] == [1, 4, 8, 16]
    assert [tuple(maps.values.shape[1:]) for maps in signals.values()] == [
        (64, 96),
        (16, 24),
        (8, 12),
        (4, 6),
    ]


@pytest.mark.parametrize(
    ("options", "size", "grid"),
    [
        ({"img_size": (8, 24)}, (8, 24), (2, 6)),
        ({"img_size": (16, 24), "patch_size": (8, 4)}, (16, 24), (2, 6)),
        ({"dynamic_img_size": True}, (8, 20), (2, 5)),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, (10, 21), (3, 6)),
        ({"img_size": 18, "patch_size": 4}, (18, 18), (4, 4)),
        ({"reg_tokens": 4, "class_token": False, "global_pool": "avg"}, (16, 16), (4, 4)),
    ],
    ids=["wide", "oblong-patches", "dynamic", "padded", "cut", "registers-alone"],
)
@torch.no_grad()
def test_patches_of_a_sequence(options: dict[str, Any], size: tuple[int, int], grid: tuple[int, int]) -> None:
    model, x = vit(**options), torch.randn(1, 3, *size).double()
    maps = look(steer(model, x), x, query="mean").attention
    assert tuple(maps.values.shape[1:]) == grid
    assert maps.cell == (model.patch_embed.patch_size[0], model.patch_embed.patch_size[1])


@torch.no_grad()
def test_a_bright_corner_is_in_the_corner_of_the_map() -> None:
    """Patches are laid out by rows, not by columns."""
    model = vit("average", img_size=(8, 16), pos_embed="none").eval()
    for block in model.blocks:
        block.attn.qkv.weight.zero_()
        block.attn.qkv.bias.zero_()
    model.patch_embed.proj.weight.fill_(1.0)
    x = torch.zeros(1, 3, 8, 16).double()
    x[..., :4, 12:] = 1
    energy = look(model, x, method="energy", block=0).attention.values[0]
    others = energy.clone()
    others[0, 3] = energy[1, 0]
    assert energy.shape == (2, 4)
    near(others, energy[1, 0].expand(2, 4))
    assert abs(energy[0, 3] - energy[1, 0]) > 1e-3


def test_rows_and_columns_of_transformers_follow_the_picture() -> None:
    model = zoo.build("vit")
    x = torch.randn(1, 3, 8, 20).double()
    maps = look(model, x, interpolate_pos_encoding=True).attention
    assert tuple(maps.values.shape[1:]) == (2, 5)


def test_tokens_without_a_place_are_refused() -> None:
    parts = find_parts(vit())
    with pytest.raises(
        ValueError, match=r"of 16 x 16 pixels in patches of 4 x 4 and 1 prefix tokens .* 12 tok"
    ):
        sequence_grid(parts, 12, (16, 16))
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, patch_drop_rate=0.5
    )
    with pytest.raises(ValueError, match="Tokens that are dropped or merged have no place"):
        look(model.train(), torch.randn(1, 3, 16, 16))
