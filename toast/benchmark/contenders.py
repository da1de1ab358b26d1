"""The models that are compared: the plain one, TOAST in its forms, and peers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import toast
from toast.baselines.applying import apply_method
from toast.benchmark.textbook import TextbookLlama, TextbookVit

CLASSES = 100
PROMPTS = 10


@dataclass(frozen=True)
class Place:
    """Where and how contenders run.

    Args:
        device: The device.
        dtype: Precision of the products; anything but float32 runs under autocast.
        compiled: Whether models are compiled.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    compiled: bool = False

    def put(self, model: Any) -> Any:
        """Returns a model on the device, compiled if that is asked for."""
        model = model.to(self.device)
        if self.compiled:
            model.compile()
        return model

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context that models are called in."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True)
class Size:
    """Sizes of the models and inputs.

    Args:
        vit: Name of the timm model.
        image: Pixels of a side.
        llama: Sizes of the Llama, fields of its configuration.
        prompt: Tokens of the prompt, and tokens that are added.
        prefill: Tokens of the long prompt.
        place: Where and how they run.
    """

    vit: str
    image: int
    llama: dict[str, int]
    prompt: int
    prefill: int
    place: Place = field(default_factory=Place)

    def images(self, batch: int) -> Tensor:
        """Returns random pictures on the device."""
        return torch.randn(batch, 3, self.image, self.image, device=self.place.device)

    def text(self, tokens: int) -> Tensor:
        """Returns a random text on the device."""
        return torch.randint(1, self.llama["vocab_size"], (1, tokens), device=self.place.device)


FULL = Size(
    vit="vit_base_patch16_224",
    image=224,
    llama={
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
    prompt=64,
    prefill=512,
)  # fmt: skip
SMALL = Size(
    vit="test_vit",
    image=32,
    llama={
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64,
    },
    prompt=8,
    prefill=16,
)  # fmt: skip


def vit(size: Size) -> Any:
    """Returns a ViT with random weights."""
    import timm

    return timm.create_model(size.vit, num_classes=CLASSES, img_size=size.image)


def llama(size: Size) -> Any:
    """Returns a Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**size.llama, max_position_embeddings=4096)).eval()


def vpt_deep(model: nn.Module) -> nn.Module:
    """Returns a ViT with visual prompts before every block (VPT-deep); its head is trained too."""
    return apply_method(model, "vpt-deep", prompts=PROMPTS)[0]


def lora(model: nn.Module, **options: Any) -> nn.Module:
    """Returns a model with PEFT's LoRA of rank 4."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=4, **options))  # type: ignore[no-any-return]


def fused(model: Any) -> Any:
    """Returns a wrapped model for inference."""
    return toast.fuse(model.eval().requires_grad_(False))


def half(model: Any) -> int:
    """Returns the block from which the top half is steered."""
    return len(model.blocks if hasattr(model, "blocks") else model.model.layers) // 2


def without_lower(model: Any, blocks: int) -> Any:
    """Takes the lowest blocks out of a model: what is left is what a partly steered one runs twice."""
    if hasattr(model, "blocks"):
        model.blocks = model.blocks[blocks:]
    else:
        model.model.layers = model.model.layers[blocks:]
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = number
        model.config.num_hidden_layers -= blocks
    return model


def visions(size: Size) -> dict[str, Callable[[], Any]]:
    """Returns how to make each vision model, by name."""

    def steered(**options: Any) -> Any:
        model = vit(size)
        if options.pop("top_half", False):
            options["steer_from"] = half(model)
        return toast.wrap(model, modules_to_save=["head"], **options)

    return _placed(
        size,
        {
            "plain": lambda: vit(size),
            "plain, top half": lambda: without_lower(vit(size), half(vit(size))),
            "LoRA, top half": lambda: lora(
                without_lower(vit(size), half(vit(size))), target_modules=["qkv"], modules_to_save=["head"]
            ),
            "full tuning": lambda: vit(size),
            "LoRA": lambda: lora(vit(size), target_modules=["qkv"], modules_to_save=["head"]),
            "VPT-deep": lambda: vpt_deep(vit(size)),
            "textbook": lambda: TextbookVit(vit(size)),
            "TOAST": lambda: steered(),
            "TOAST-Lite": lambda: steered(lora_rank=4),
            "TOAST, top half": lambda: steered(top_half=True),
            "TOAST, fused": lambda: fused(steered()),
            "TOAST, fused, top half": lambda: fused(steered(top_half=True)),
        },
    )


def languages(size: Size) -> dict[str, Callable[[], Any]]:
    """Returns how to make each language model, by name."""

    def steered(top_half: bool = False, tokens: str = "all") -> Any:
        model = llama(size)
        return toast.wrap(model, steer_from=half(model) if top_half else 0, steer_tokens=tokens).eval()

    return _placed(
        size,
        {
            "plain": lambda: llama(size),
            "plain, top half": lambda: without_lower(llama(size), half(llama(size))),
            "LoRA": lambda: lora(llama(size), target_modules=["q_proj", "k_proj", "v_proj"]).eval(),
            "textbook": lambda: TextbookLlama(llama(size)).eval(),
            "TOAST": steered,
            "TOAST, prompt alone": lambda: steered(tokens="prompt"),
            "TOAST, fused": lambda: fused(steered()),
            "TOAST, fused, top half": lambda: fused(steered(top_half=True)),
        },
    )


def _placed(size: Size, makers: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Returns makers of the same models where and how they are to run."""

    def placed(make: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: size.place.put(make())

    return {name: placed(make) for name, make in makers.items()}
