"""What a vision run's model says of held-out pictures, and where it looks before and after."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm

from toast.baselines.attentive import find_probe
from toast.baselines.vpt import find_prompts
from toast.training.data import Splits
from toast.training.many_heads import Heads
from toast.training.on_target import LastBlockWatcher
from toast.visual.attention_maps import AttentionMaps
from toast.visual.looks import Look, looks_of
from toast.visual.maps import look

#: Most pictures that are looked at, spread over the split, and how many at a time.
MOST, BATCH = 200, 20


@dataclass(frozen=True)
class HeldOutLooks:
    """All pictures that were looked at.

    Args:
        split: Where they come from: `test`, `validation`, or `train` if there is no other.
        of: Pictures of the split.
        shows: What the maps show.
        seen: The pictures.
    """

    split: str
    of: int
    shows: str
    seen: list[Look]

    def chosen(self, count: int) -> list[Look]:
        """Returns pictures to show, half of them right and half wrong if there are, spread over the split."""
        right = [look for look in self.seen if look.is_right]
        wrong = [look for look in self.seen if not look.is_right]
        wrongs = min(len(wrong), max(count // 2, count - len(right)))
        return _spread(right, count - wrongs) + _spread(wrong, wrongs)


def _spread(looks: list[Look], count: int) -> list[Look]:
    count = min(count, len(looks))
    return [looks[i * len(looks) // count] for i in range(count)]


def look_at_split(
    model: nn.Module, frozen: nn.Module | None, splits: Splits, most: int = MOST
) -> HeldOutLooks:
    """Looks at pictures that the model was not trained on.

    Args:
        model: The model, in evaluation mode.
        frozen: The backbone as it was before, where the model holds it no more (full tuning, VPT, …).
        splits: The run's data.
        most: Pictures to look at.

    Raises:
        ValueError: If the model is one whose looking cannot be shown; the message says why.
    """
    name = next(n for n in ("test", "validation", "train") if getattr(splits, n) is not None)
    data = getattr(splits, name)
    count = min(most, len(data))
    seen: list[Look] = []
    shows = ""
    for start in tqdm(range(0, count, BATCH), f"{name}, looking", unit="batch", leave=False, disable=None):
        rows = [i * len(data) // count for i in range(start, min(start + BATCH, count))]
        items = [item for item in (data[0, row] for row in rows) if "bad" not in item]
        if not items:
            continue
        pixels = torch.stack([item["pixels"] for item in items])
        maps = _maps(model, pixels)
        shows = shows or maps.name
        unknown = torch.full(pixels.shape[-2:], torch.nan)
        seen += looks_of(
            maps,
            torch.stack([item.get("target", unknown) for item in items]),
            # Labels of heads are no classes.
            None if isinstance(splits.answers, Heads) else torch.tensor([int(i["label"]) for i in items]),
            reference=None if frozen is None else _maps(frozen, pixels).attention,
            indices=[int(item["index"]) for item in items],
        )
    return HeldOutLooks(name, len(data), shows, seen)


def _maps(model: nn.Module, pixels: Tensor) -> AttentionMaps:
    if not isinstance(model, PeftModel) and (find_prompts(model) or find_probe(model)) is not None:
        return _of_last_attention(model, pixels)
    return look(model, pixels)


@torch.no_grad()
def _of_last_attention(model: nn.Module, pixels: Tensor) -> AttentionMaps:
    """Returns the attention of a probe over the patches, or VPT's last block's without that on prompts."""
    watcher = LastBlockWatcher(model)
    with watcher.watching() as seen:
        output = model(pixels.to(next(model.parameters())))
    return watcher.attention_maps(seen, (pixels.shape[-2], pixels.shape[-1]), output)
