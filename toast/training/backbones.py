"""Opens the backbone that a configuration names, with what has to be known to feed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from toast.data.vision.channels import channels_of, with_channels
from toast.training.run_config import ModelConfig, RunConfig

#: Maps a batch to a model's arguments, positional and by name.
Feed = Callable[[dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass
class Backbone:
    """A model and how it is fed.

    Args:
        model: The model, in evaluation mode.
        data: Vision: what timm calls the data configuration: `input_size`, `mean`, `std`, `crop_pct`,
            `interpolation`. Empty for language.
        feed: Maps a batch to the model's arguments, positional and by name.
        logits: Maps the model's output to its logits.
        tokenizer: Language: the tokenizer.
    """

    model: nn.Module
    data: dict[str, Any]
    feed: Feed
    logits: Callable[[Any], Tensor]
    tokenizer: Any = None


def open_backbone(
    config: RunConfig, classes: int | None, empty: bool = False, tokenizer: bool = True
) -> Backbone:
    """Opens a backbone, in the mode in which its library gives it: timm for training, transformers not.

    Args:
        config: The run's configuration.
        classes: Outputs of the head; not of a language model without heads.
        empty: Leave the parameters on the meta device, for another process sends them.
        tokenizer: Language: whether the tokenizer is opened, too.

    Raises:
        ValueError: If the library has no such model, or its weights are not to be had.
    """
    if empty and config.model.library != "demo" and not _is_quantised(config.model):
        bare = config.model.model_copy(update={"pretrained": False, "weights": None})
        with init_empty_weights(include_buffers=False):
            backbone = open_backbone(config.model_copy(update={"model": bare}), classes)
        tie: Any = getattr(backbone.model, "tie_weights", None)
        if tie is not None:  # each was made a parameter of its own
            tie()
        return backbone
    model = config.model
    if config.task == "language":
        if model.library != "transformers":
            raise ValueError(f"model.library: language models come from transformers; got {model.library!r}.")
        if config.heads:
            assert classes is not None
            return _text_classifier(model, classes)
        return _language(model, tokenizer)
    assert classes is not None
    return _VISION[model.library](model, classes)


def _timm(config: ModelConfig, classes: int) -> Backbone:
    import timm

    assert config.name is not None
    options: dict[str, Any] = {"num_classes": classes, **config.options}
    if config.weights is not None:
        if not config.weights.is_file():
            raise ValueError(f"model.weights: {config.weights} does not exist.")
        # num_classes=0 of the file: its head, if it has one, is of other classes and stays behind.
        options["pretrained_cfg_overlay"] = {"file": str(config.weights), "num_classes": 0}
    try:
        model = timm.create_model(
            config.name, pretrained=config.pretrained or config.weights is not None, **options
        )
    except (RuntimeError, TypeError, OSError) as error:
        raise ValueError(
            f"model: timm could not make {config.name!r}: {error}. Without access to a hub, give "
            "model.weights a local file, or set model.pretrained=false for random weights."
        ) from error
    data = timm.data.resolve_model_data_config(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:  # timm's own answer is the size of the pre-training, whatever img_size was asked for
        data["input_size"] = (data["input_size"][0], *size)
    data = with_channels(data, channels_of(model))
    return Backbone(model.to(_dtype(config)), data, _pixels(_dtype(config)), _itself)


def _demo(config: ModelConfig, classes: int) -> Backbone:
    from toast.embedded.backbone import MEAN, STD, load_backbone

    data = {
        "input_size": (3, 112, 112), "mean": MEAN, "std": STD, "crop_pct": 1.0, "crop_mode": "center",
        "interpolation": "bicubic",
    }  # fmt: skip
    model = load_backbone(classes, **config.options).to(_dtype(config))
    return Backbone(model, data, _pixels(_dtype(config)), _itself)


def _of_transformers(auto: Any, config: ModelConfig, outputs: int | None = None) -> Any:
    """Opens a model by one of transformers' automatic classes, pre-trained or with random weights.

    Args:
        auto: The class.
        config: What is opened.
        outputs: Outputs of a new head, in the place of the file's own; None keeps that.
    """
    from transformers import AutoConfig

    options: dict[str, Any] = ({} if outputs is None else {"num_labels": outputs}) | config.options
    if config.pretrained:
        return auto.from_pretrained(
            config.name, dtype=_dtype(config), ignore_mismatched_sizes=outputs is not None, **options
        )
    return auto.from_config(AutoConfig.from_pretrained(config.name, **options), dtype=_dtype(config))


def _transformers_vision(config: ModelConfig, classes: int) -> Backbone:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        model = _of_transformers(AutoModelForImageClassification, config, classes)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: transformers could not make {config.name!r}: {error}") from error
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    mean, std = (0.5,) * 3, (0.5,) * 3
    try:
        processor = AutoImageProcessor.from_pretrained(config.name)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    except (OSError, ValueError):  # a folder with a model alone: transformers' default of ViT
        pass
    data = {
        "input_size": (3, height, width), "mean": mean, "std": std, "crop_pct": 1.0, "crop_mode": "squash",
        "interpolation": "bicubic",
    }  # fmt: skip
    data = with_channels(data, getattr(model.config, "num_channels", 3))
    return Backbone(model, data, _pixel_values(_dtype(config)), _named_logits)


def _language(config: ModelConfig, with_tokenizer: bool) -> Backbone:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert config.name is not None
    name: str | Path = config.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(name) if with_tokenizer else None
        model = _of_transformers(AutoModelForCausalLM, config)
    except (OSError, ValueError) as error:
        needed = (
            "a causal language model and its tokenizer" if with_tokenizer else "a causal model's config.json"
        )
        raise ValueError(
            f"model: transformers could not open {str(name)!r}: {error}. Needs a folder with {needed}, or a "
            "Hub name that can be reached."
        ) from error
    return Backbone(model, {}, _tokens, _named_logits, tokenizer)


def _text_classifier(config: ModelConfig, outputs: int) -> Backbone:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.name)
        model = _of_transformers(AutoModelForSequenceClassification, config, outputs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model: transformers could not open {config.name!r} as a text classifier: {error}. Needs "
            "a folder with an encoder or a causal model and its tokenizer, or a Hub name that can be reached."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id  # a decoder reads the last token before it
    model.config.use_cache = False
    return Backbone(model, {}, _whole_texts, _named_logits, tokenizer)


def _is_quantised(config: ModelConfig) -> bool:
    """Whether a model of transformers is quantised, which is known of its parameters when they are read."""
    if config.library != "transformers" or not config.pretrained:
        return False
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(config.name), "quantization_config", None) is not None


_VISION = {"timm": _timm, "demo": _demo, "transformers": _transformers_vision}


def _dtype(config: ModelConfig) -> torch.dtype:
    return getattr(torch, config.dtype)  # type: ignore[no-any-return]


def _pixels(dtype: torch.dtype) -> Feed:
    return lambda batch: ((batch["pixels"].to(dtype),), {})


def _pixel_values(dtype: torch.dtype) -> Feed:
    return lambda batch: ((), {"pixel_values": batch["pixels"].to(dtype)})


def _tokens(batch: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    names = ("input_ids", "attention_mask", "position_ids")
    return (), {name: batch[name] for name in names if name in batch} | {"use_cache": False}


def _whole_texts(batch: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {name: batch[name] for name in ("input_ids", "attention_mask")}


def _itself(output: Any) -> Tensor:
    return output  # type: ignore[no-any-return]


def _named_logits(output: Any) -> Tensor:
    return output.logits  # type: ignore[no-any-return]
