"""Whether a live model keeps packed documents apart."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

LENGTH: Final = 8
"""Tokens of each of the two documents of the probe."""
SHARE: Final = 0.01
"""Smallest influence that is taken for a leak, as a share of the influence within one document.

Above rounding: where experts are chosen by token, other tokens make products of other shapes.
"""


def leaks(model: nn.Module, vocabulary: Any, **call: Any) -> bool:
    """Probes whether a document in a packed row sees the one before it.

    The tokens of the first document are changed; if the logits of the second move, the model leaks. It does
    where its attention kernel takes no notice of restarting positions, and in any model of transformers that
    is called with a key-value cache, which is the default of most (`use_cache`): masking_utils looks for
    packed documents only if there is neither a cache nor an attention mask.

    Args:
        model: A causal language model, wrapped or not; probed in evaluation mode, and left as it was.
        vocabulary: The tokenizer, or the number of tokens.
        **call: How the model is called in training, beside tokens and positions; `use_cache=False` unless
            it is given.

    Returns:
        Whether it leaks.
    """
    size = vocabulary if isinstance(vocabulary, int) else len(vocabulary)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(size, (1, 2 * LENGTH), generator=generator)
    other = row.clone()
    steps = torch.randint(1, size, (1, LENGTH), generator=generator)
    other[:, :LENGTH] = (row[:, :LENGTH] + steps) % size  # another token at every place
    apart = torch.arange(LENGTH).repeat(2)[None]
    joined = torch.arange(2 * LENGTH)[None]

    @torch.no_grad()
    def logits(tokens: Tensor, positions: Tensor) -> Tensor:
        inputs = {"input_ids": tokens.to(device), "position_ids": positions.to(device)}
        output: Tensor = model(**inputs, **({"use_cache": False} | call)).logits
        return output[:, LENGTH:].double()

    def moved(positions: Tensor) -> float:
        return float((logits(row, positions) - logits(other, positions)).abs().mean())

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return moved(apart) > SHARE * moved(joined)
    finally:
        for module, training in modes:
            module.training = training
