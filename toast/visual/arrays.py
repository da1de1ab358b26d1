"""The arrays behind a drawing, as a `.npz` file that loads without running code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from toast.files.atomic import beside
from toast.visual.attention_maps import AttentionMaps


def arrays(maps: AttentionMaps, index: int, picture: Tensor) -> dict[str, Any]:
    """Returns what is shown of one picture as arrays of NumPy, by name.

    Every map `name` comes with `name_cell`, height and width of a token's place in pixels; `signal_N` is the
    norm of the signal of block N.

    Args:
        maps: Of a batch.
        index: The picture's place in it.
        picture: `(height, width, 3)`, 0 to 1.
    """
    import numpy as np

    found: dict[str, Any] = {"picture": picture.numpy(), "shows": np.array(maps.name)}
    shown = {
        "attention": maps.attention, "frozen": maps.frozen, "difference": maps.difference,
        "selection": maps.selection, **{f"signal_{block}": norm for block, norm in maps.signals.items()},
    }  # fmt: skip
    for name, each in shown.items():
        if each is not None:
            found[name] = each.values[index].numpy()
            found[f"{name}_cell"] = np.array(each.cell)
    found["on_patches"] = maps.on_patches[index].numpy()
    if maps.frozen_on_patches is not None:
        found["frozen_on_patches"] = maps.frozen_on_patches[index].numpy()
    if maps.scores is not None:
        found["scores"] = maps.scores[index].detach().float().cpu().numpy()
    return found


def save_arrays(maps: AttentionMaps, index: int, picture: Tensor, path: Path) -> Path:
    """Writes what `arrays` returns; read it with `numpy.load(path)`.

    Args:
        maps: Of a batch.
        index: The picture's place in it.
        picture: `(height, width, 3)`, 0 to 1.
        path: A `.npz` file; written beside and renamed.
    """
    import numpy as np

    with beside(path) as new, new.open("wb") as file:
        np.savez_compressed(file, **arrays(maps, index, picture))
    return path
