"""Tiny random models of every supported family, from the libraries' own configurations."""

from __future__ import annotations

import inspect
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn

WIDTH, DEPTH, VOCABULARY = 24, 3, 37

#: Name of the argument that takes a cache and of the output's field; another before transformers 5.24.
CACHE = next(
    name
    for name in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    if name in ("cache", "past_key_values")
)

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 3}),
    "llama-grouped": ("LlamaConfig", {"num_key_value_heads": 1, "attention_bias": True}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 1, "sliding_window": 6}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 1, "head_dim": 8}),
    "gemma": ("GemmaConfig", {"num_key_value_heads": 1, "head_dim": 8}),
}

#: Options of `timm.create_model` beside sizes; the names say what is special.
VITS: dict[str, dict[str, Any]] = {
    "class-token": {},
    "average": {"global_pool": "avg", "class_token": False},
    "average-fc-norm": {"global_pool": "avg", "fc_norm": True},
    "registers-layer-scale": {"reg_tokens": 2, "init_values": 1e-1, "no_embed_class": True},
    "no-value-bias": {"qkv_bias": False},
    "norm-pre": {"pre_norm": True},
    "attention-pool": {"global_pool": "map", "class_token": False},
    "qk-norm": {"qk_norm": True},
}


def vit(kind: str = "class-token", classes: int = 5, **options: Any) -> nn.Module:
    """A ViT of three blocks of width 24 on pictures of 16 pixels, in evaluation mode, double precision."""
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 3}
    model = timm.models.vision_transformer.VisionTransformer(
        num_classes=classes, **(sizes | VITS[kind] | options)
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def decoder(kind: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A causal language model of three blocks of width 24 with random weights, in evaluation mode."""
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=WIDTH, n_layer=DEPTH, n_head=3, vocab_size=VOCABULARY, n_positions=64,
            bos_token_id=1, eos_token_id=None, pad_token_id=0, **options,
        )  # fmt: skip
    else:
        name, special = DECODERS[kind]
        sizes = {
            "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": DEPTH,
            "num_attention_heads": 3, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
            "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
        }  # fmt: skip
        config = getattr(transformers, name)(**(sizes | special | options))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


def images(batch: int = 4, size: int = 16) -> Tensor:
    """Random pictures, `(batch, 3, size, size)`."""
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def tokens(batch: int = 3, length: int = 9) -> Tensor:
    """Random tokens without the padding token, `(batch, length)`."""
    return torch.randint(1, VOCABULARY, (batch, length))


def awaken(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Gives every adapter parameter a random value, so that the signals are far from zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".toast_" in name:
                parameter.normal_(std=scale)
                if "task_embedding" in name:
                    parameter.abs_()
    return model
