"""Models without weights: of the sizes that a configuration names, and of no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from toast.training.backbones import Backbone, open_backbone
from toast.training.memory import without_memory
from toast.training.run_config import RunConfig
from toast.training.shipped import find_config

#: Of the vision head, where nothing says how many classes the data have.
CLASSES = 1000


def empty_backbone(config: RunConfig, classes: int = CLASSES) -> Backbone:
    """Makes the backbone of a configuration on the meta device; no weights are read or downloaded.

    Of transformers' models a folder with `config.json` is enough. Attention is PyTorch's own where the
    configuration asks for a kernel of another package, which keeps as much.

    Args:
        config: The run's configuration.
        classes: Vision: outputs of the head.

    Raises:
        ValueError: If the library has no such model, or its configuration is not to be had.
    """
    options = {name: value for name, value in config.model.options.items() if name != "quantization_config"}
    if str(options.get("attn_implementation", "")).startswith("flash"):
        options["attn_implementation"] = "sdpa"
    settings: dict[str, Any] = {"pretrained": False, "weights": None, "options": options}
    if config.model.library == "transformers" and config.model.name is not None:
        settings["name"] = str(find_config(Path(config.model.name)))
    config = config.model_copy(update={"model": config.model.model_copy(update=settings)})
    if config.model.library == "demo":  # its weights come with its constructor
        backbone = open_backbone(config, classes)
        backbone.model.to("meta")
        return backbone
    with torch.device("meta"):
        return open_backbone(config, classes, tokenizer=False)


def drop_memory(model: nn.Module, mode: FakeTensorMode) -> None:
    """Puts tensors without memory in the place of a model's parameters and buffers; tied ones stay tied.

    Args:
        model: A model on the meta device. It then runs, under `mode`, as one on the CPU would.
        mode: What its tensors belong to.
    """
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty: Any = without_memory(tensor, mode)
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = empty, tensor  # the old one lives on, so that no other gets its id
                held[name] = made[id(tensor)][0]
