"""The demonstration's backbone: a small vision transformer with real weights, shipped in the package."""

from __future__ import annotations

from importlib import resources
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from toast.files.shapes import refuse_misfits

ARCHITECTURE: Final = "vit_tiny_patch14_112"
"""Name that the weight file carries in its metadata."""
MEAN: Final = (0.485, 0.456, 0.406)
"""Per-channel mean of the images that the backbone expects, as a share of full intensity."""
STD: Final = (0.229, 0.224, 0.225)
"""Per-channel standard deviation, as a share of full intensity."""


def new_backbone(num_classes: int = 10, **kwargs: Any) -> VisionTransformer:
    """Create the backbone's architecture with fresh weights.

    Args:
        num_classes: Number of outputs of the head; 0 for none.
        **kwargs: Further arguments of timm's `VisionTransformer`, such as `drop_path_rate`.

    Returns:
        A model for images of (n, 3, 112, 112): 64 patch tokens and one class token of width 192.
    """
    return VisionTransformer(
        img_size=112,
        patch_size=14,
        embed_dim=192,
        depth=12,
        num_heads=3,
        num_classes=num_classes,
        init_values=1.0,
        **kwargs,
    )


def load_backbone(num_classes: int = 10, **kwargs: Any) -> VisionTransformer:
    """Load the backbone that ships in the package.

    Args:
        num_classes: Number of outputs of the head, which is set to zeros; 0 for none.
        **kwargs: Further arguments of timm's `VisionTransformer`, such as `drop_path_rate`. They must
            leave the shapes of the weights as they are.

    Returns:
        The model, float32, in evaluation mode. It expects float images (n, 3, 112, 112), normalised with
        `MEAN` and `STD`.

    Raises:
        ValueError: The weight file is missing, damaged or of another architecture.
    """
    file = resources.files("toast.embedded") / "assets" / "backbone.safetensors"
    try:
        state: dict[str, Tensor] = load(file.read_bytes())
    except OSError as error:
        raise ValueError(f"the demonstration's backbone cannot be read: {error}") from error
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error
    # the fresh weights are overwritten, so drawing them would be time lost
    model = new_backbone(num_classes, **{"weight_init": "skip", **kwargs})
    expected = {
        name: value.shape for name, value in model.state_dict().items() if not name.startswith("head.")
    }
    found = {name: value.shape for name, value in state.items()}
    refuse_misfits(str(file), expected, found, to=ARCHITECTURE)
    model.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    if num_classes > 0:
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter.zero_()
    return model.eval()
