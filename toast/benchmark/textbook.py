"""The method as its equations stand, token by token: what an implementation costs that does nothing clever.

Parameters are those of the paper: task embedding ξ, channel transform P, and A_l, B_l for every block.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toast.calls.arguments import cache_name


class Feedback(nn.Module):
    """w = clamp(cos(h, ξ), 0, 1),  z = (w · h) P,  y_l = A_l y_{l+1},  s_l = B_l y_l.

    Args:
        width: Channels.
        blocks: Number of blocks.
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.task_embedding = nn.Parameter(torch.randn(width))
        self.channel_transform = nn.Parameter(torch.eye(width))
        self.to_state = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(blocks))
        self.to_signal = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(blocks))

    def forward(self, features: Tensor) -> list[Tensor]:
        """Returns the signal of every block, bottom first."""
        weights = F.cosine_similarity(features, self.task_embedding, dim=-1).clamp(0, 1)
        state = (weights[..., None] * features) @ self.channel_transform
        signals = []
        for to_state, to_signal in zip(reversed(self.to_state), reversed(self.to_signal), strict=True):
            state = to_state(state)
            signals.append(to_signal(state))
        return signals[::-1]


class TextbookVit(nn.Module):
    """TOAST on a timm ViT.

    Args:
        vit: The frozen model; its head is trained.
    """

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit.requires_grad_(False)
        self.vit.head.requires_grad_(True)
        self.feedback = Feedback(vit.embed_dim, len(vit.blocks))

    def forward(self, images: Tensor) -> Tensor:
        """Runs both passes; `(batch, classes)`."""
        with torch.no_grad():
            features = self.vit.forward_features(images)
        signals = self.feedback(features)
        x = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(images)))
        for block, signal in zip(self.vit.blocks, signals, strict=True):
            x = x + block.ls1(self._attention(block.attn, block.norm1(x), signal))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return self.vit.forward_head(self.vit.norm(x))  # type: ignore[no-any-return]

    @staticmethod
    def _attention(attention: Any, x: Tensor, signal: Tensor) -> Tensor:
        """Q and K of x; V = W_V (x + s) + b."""
        weight, bias, width = attention.qkv.weight, attention.qkv.bias, x.shape[-1]
        query_key = F.linear(x, weight[: 2 * width], bias[: 2 * width])
        value = F.linear(x + signal, weight[2 * width :], bias[2 * width :])
        heads = [
            part.view(*x.shape[:2], attention.num_heads, -1).transpose(1, 2)
            for part in (*query_key.chunk(2, dim=-1), value)
        ]
        query, key, values = heads
        out = F.scaled_dot_product_attention(query, key, values).transpose(1, 2).flatten(2)
        return attention.proj(out)  # type: ignore[no-any-return]


def cache_keyword(llama: Any) -> str:
    """Returns the argument of a language model of transformers that takes a cache; it changed in 5.24."""
    name = cache_name(inspect.signature(llama.forward).parameters)
    assert name is not None
    return name


class TextbookLlama(nn.Module):
    """TOAST on a Llama of transformers, with a cache for each pass.

    Args:
        llama: The frozen model.
    """

    def __init__(self, llama: Any) -> None:
        super().__init__()
        self.llama = llama.requires_grad_(False)
        self.cache_keyword = cache_keyword(llama)
        self.feedback = Feedback(llama.config.hidden_size, llama.config.num_hidden_layers)
        self.signals: list[Tensor] = []
        for index, layer in enumerate(llama.model.layers):
            layer.self_attn.v_proj.register_forward_pre_hook(self._steer(index))

    def _steer(self, index: int) -> Any:
        return lambda _, args: (args[0] + self.signals[index],) if self.signals else None

    def forward(self, tokens: Tensor, caches: tuple[Any, Any] | None = None) -> Tensor:
        """Runs both passes over the tokens; `(batch, tokens, vocabulary)`."""
        first, second = caches or (None, None)
        keeps = caches is not None
        with torch.no_grad():
            given = {self.cache_keyword: first, "use_cache": keeps}
            features = self.llama.model(tokens, **given).last_hidden_state
        self.signals = self.feedback(features)
        logits = self.llama(tokens, **{self.cache_keyword: second, "use_cache": keeps}).logits
        self.signals = []
        return logits  # type: ignore[no-any-return]
