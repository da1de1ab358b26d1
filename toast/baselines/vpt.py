"""Visual prompt tuning (Jia et al., arXiv 2203.12119): learnt tokens beside those of a picture.

The model's own forward runs; hooks on its blocks put the prompts behind the tokens and take them off again.
The paper has them between class token and patches; in blocks that know no order of tokens the place makes no
difference, and at the end every token, and every row of an attention map, keeps its number.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from toast.baselines.added import Added, find_added, remove_added
from toast.families.anatomy import Anatomy, find_anatomy

#: Rows of `toast.families.table` whose blocks take any number of tokens, and in any order.
PROMPTABLE = (
    "timm-vit", "timm-vit-parallel", "timm-vit-parallel-attentions", "timm-cait", "vit", "deit", "dinov2",
    "clip-vision", "siglip-vision",
)  # fmt: skip

#: Where the prompts stand in the trunk.
NAME = "prompts"


class Prompts(Added):
    """The prompts of a model, and how they meet its tokens.

    Shallow: `x_1 = B_1([x_0, P])`, and what the blocks make of the prompts goes along to the last.
    Deep: `x_l = B_l([x_{l-1}, P_{l-1}])`; what a block makes of its prompts is dropped.

    Args:
        blocks: Blocks with prompts of their own: 1 for shallow, all for deep.
        count: Prompts a block, `p` in the paper.
        width: Channels of a token, `d`.
        fan_in: Channels times pixels of a patch. Prompts start uniform in ±√(6 / (fan_in + width)), as the
            paper's patch projection does.
        dropout: Share of the prompts' channels that training drops. The authors' default is 0.
    """

    def __init__(self, blocks: int, count: int, width: int, fan_in: int, dropout: float = 0.0) -> None:
        super().__init__()
        bound = math.sqrt(6 / (fan_in + width))
        self.tokens = nn.Parameter(torch.empty(blocks, count, width).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    @property
    def count(self) -> int:
        """Prompts a block."""
        return self.tokens.shape[1]

    @property
    def is_deep(self) -> bool:
        """Whether every block has its own; one block alone can be seen as either."""
        return len(self.tokens) > 1

    @property
    def options(self) -> dict[str, Any]:
        """What `add_prompts` has to be given to make the same again."""
        return {"count": self.count, "deep": self.is_deep, "dropout": self.dropout.p}

    def stand_at(self, blocks: list[nn.Module]) -> None:
        """Puts the hooks on the blocks: insertion before a block, removal after one."""
        inserts = blocks if self.is_deep else blocks[:1]
        removes = blocks if self.is_deep else blocks[-1:]
        for index, block in enumerate(inserts):
            hook = partial(self.insert, index)
            self.handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        for block in removes:
            self.handles.append(block.register_forward_hook(self.take_off))

    def insert(
        self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Puts prompts behind the tokens that enter a block.

        Raises:
            ValueError: If the call restricts the attention, which says nothing of prompts.
        """
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise ValueError(
                "attn_mask, is_causal: a model with prompts needs full attention, since a mask does not "
                "cover them; got a restricted one. Remove the prompts with remove_prompts, or call without a "
                "mask."
            )
        x, *rest = args
        prompts = self.dropout(self.tokens[index].expand(len(x), -1, -1)).to(x.dtype)
        return (torch.cat([x, prompts], dim=1), *rest), kwargs

    def take_off(self, block: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Returns the tokens of the picture alone."""
        return out[:, : -self.count]

    def extra_repr(self) -> str:
        """Says how many there are."""
        return f"{'deep' if self.is_deep else 'shallow'}, count={self.count}"


def make_prompts(model: nn.Module, count: int, deep: bool, dropout: float = 0.0) -> tuple[Anatomy, Prompts]:
    """Makes the prompts for a model, and leaves the model as it is.

    Returns:
        The model's parts and the prompts, on the device of the first block, in its precision or float32
        if that is coarser.

    Raises:
        ValueError: If the model's blocks cannot take prompts, has some, or an option is out of range.
    """
    if count < 1:
        raise ValueError(f"count: needs at least 1 prompt; got {count}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: needs a fraction from 0 to below 1; got {dropout}.")
    anatomy = find_anatomy(model)
    trunk: Any = anatomy.trunk
    if anatomy.family.name not in PROMPTABLE:
        raise ValueError(
            f"{type(trunk).__name__} (family {anatomy.family.name}) cannot take visual prompts: its blocks "
            f"know a grid or an order of tokens. Families that can: {', '.join(PROMPTABLE)}. Language models "
            "have PEFT's PromptTuningConfig and PrefixTuningConfig."
        )
    if NAME in trunk._modules:
        raise ValueError(f"{type(trunk).__name__} has prompts already; remove_prompts(model) removes them.")
    first = next(p for p in trunk.get_submodule(anatomy.blocks[0]).parameters() if p.is_floating_point())
    blocks = len(anatomy.blocks) if deep else 1
    prompts = Prompts(blocks, count, anatomy.width, _patch_size(trunk), dropout)
    return anatomy, prompts.to(first.device, torch.promote_types(first.dtype, torch.float32))


def attach_prompts(anatomy: Anatomy, prompts: Prompts) -> None:
    """Puts prompts into the model that they were made for, and freezes all else."""
    trunk: Any = anatomy.trunk
    trunk.requires_grad_(False)
    trunk.add_module(NAME, prompts.train(trunk.training))
    prompts.stand_at([trunk.get_submodule(path) for path in anatomy.blocks])
    if not prompts.is_deep and len(anatomy.blocks) > 1 and hasattr(trunk, "forward_intermediates"):
        trunk.forward_intermediates = _refuse_intermediates


def add_prompts(model: nn.Module, count: int, deep: bool, dropout: float = 0.0) -> nn.Module:
    """Puts prompts into a frozen ViT, in place.

    Only the prompts are trained then; `train_only(model, "prompts")` adds the head.

    Args:
        model: A ViT of timm or transformers (`PROMPTABLE`), whatever its prefix tokens and pooling.
        count: Prompts a block.
        deep: Whether every block gets its own (VPT-deep), or the first alone (VPT-shallow).
        dropout: Share of the prompts' channels that training drops.

    Returns:
        The same model. Of shallow prompts `forward_intermediates` is refused: they travel with the tokens.

    Raises:
        ValueError: If the model's blocks cannot take prompts, has some, or an option is out of range.
    """
    anatomy, prompts = make_prompts(model, count, deep, dropout)
    model.requires_grad_(False)
    attach_prompts(anatomy, prompts)
    return model


def find_prompts(model: nn.Module) -> Prompts | None:
    """Returns the prompts of a model; None if it has none."""
    return next(iter(find_added(model, Prompts)), None)


def remove_prompts(model: nn.Module) -> nn.Module:
    """Takes the prompts off again; the model then computes what it did, to the bit. It stays frozen.

    Returns:
        The same model.

    Raises:
        ValueError: If it has none.
    """
    for trunk in remove_added(model, Prompts, NAME, "no prompts; add_prompts adds some"):
        trunk.__dict__.pop("forward_intermediates", None)
    return model


def _patch_size(trunk: nn.Module) -> int:
    """Returns the numbers that make a patch: channels times pixels."""
    projection = next(m for m in trunk.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    return projection.weight[0].numel()


def _refuse_intermediates(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "forward_intermediates: between the blocks, shallow prompts are among the tokens. Use deep ones, "
        "which are not passed from block to block."
    )
