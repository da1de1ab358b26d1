"""Load the teacher of the demonstration's backbone and compute the tokens that the student regresses."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from progress import Clock
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from views import SIDE, normalised

EARLY = 10  # the teacher's early target is the output of this many blocks


def read_teacher(assets: Path) -> VisionTransformer:
    """Load the ViT-S/14 teacher at SIDE pixels, float32, frozen."""
    model = timm.create_model(
        "vit_small_patch14_dinov2.lvd142m", pretrained=False, img_size=SIDE, num_classes=0
    )
    state = {k: v.float() for k, v in load_file(assets / "vit_small" / "model.safetensors").items()}
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [SIDE // 14] * 2, num_prefix_tokens=1)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def teacher_tokens(teacher: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the teacher's early and final tokens, both through the final norm, (n, tokens, width)."""
    x = teacher._pos_embed(teacher.patch_embed(images))
    early = x
    for index, block in enumerate(teacher.blocks):
        x = block(x)
        if index + 1 == EARLY:
            early = x
    return teacher.norm(early), teacher.norm(x)


def all_targets(teacher: VisionTransformer, images: Tensor, batch: int = 64) -> Tensor:
    """Compute the targets of all views, float16 (n, tokens, 2 * width): early, then final."""
    light = teacher.bfloat16()
    width, tokens = teacher.embed_dim, teacher.pos_embed.shape[1]
    out = torch.empty(len(images), tokens, 2 * width, dtype=torch.float16)
    clock = Clock(len(images), "targets")
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            part = normalised(images[start : start + batch]).bfloat16()
            out[start : start + batch] = torch.cat(teacher_tokens(light, part), -1).half()
            clock.tick(len(part))
    teacher.float()
    return out
