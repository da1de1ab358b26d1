"""Where the values lie in the output of the module that makes them, and how a signal is added there.

Shapes: `width` input channels of the projection, `value_width` channels of the values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Layout:
    """The values are the last `1 / parts` of the output channels of a linear map.

    Args:
        name: Name of the layout.
        parts: 1 for a projection of its own; 3 for queries, keys and values fused in this order.
    """

    name: str
    parts: int

    def widths(self, projection: nn.Module, name: str) -> tuple[int, int]:
        """Returns `(width, value_width)` of a projection.

        Raises:
            ValueError: If it is not a linear map, or its output does not divide into `parts`.
        """
        weight = getattr(projection, "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(f"{name} is a {type(projection).__name__} with no weight; needs a linear map.")
        if hasattr(projection, "in_features") and hasattr(projection, "out_features"):
            width, out = int(projection.in_features), int(projection.out_features)
        elif weight.ndim == 2 and is_transposed(projection):
            width, out = weight.shape
        else:
            raise ValueError(
                f"{name} is a {type(projection).__name__} with a weight of shape {tuple(weight.shape)}; "
                "needs nn.Linear, or Conv1D of transformers."
            )
        if out % self.parts or (self.parts > 1 and out < self.parts):
            raise ValueError(f"{name} has {out} outputs, which do not divide into {self.parts} parts.")
        return width, out // self.parts

    def steer(self, projection: nn.Module, x: Tensor, signal: Tensor, bias_twice: bool) -> Tensor:
        """Runs a projection so that its values are those of `x + signal`; queries and keys those of `x`.

        Args:
            projection: The projection, which may itself be wrapped or quantised.
            x: Its input, `(batch, tokens, width)`.
            signal: The top-down signal, `(batch, tokens, width)`.
            bias_twice: Whether the values get the bias a second time, as in the official ViT code.

        Returns:
            `(batch, tokens, parts * value_width)`.
        """
        signal = signal.to(x.dtype)
        if self.parts == 1:
            out = projection(x + signal)
            bias = getattr(projection, "bias", None)
            return out + bias if bias_twice and bias is not None else out
        out: Tensor = projection(x)
        start = out.shape[-1] - out.shape[-1] // self.parts
        shift = self._project(projection, signal, start, bias_twice)
        # The output is fresh and no backward of a linear map needs it: adding in place saves a copy of q and k.
        out[..., start:] += shift.to(out.dtype)
        return out

    def _project(self, projection: nn.Module, signal: Tensor, start: int, with_bias: bool) -> Tensor:
        """Returns `W_V signal`, plus the values' bias if asked, `(batch, tokens, value_width)`."""
        bias = getattr(projection, "bias", None)
        plain = isinstance(projection, nn.Linear) and type(projection).forward is nn.Linear.forward
        if plain or is_transposed(projection):
            weight = (
                projection.weight[:, start:].T if is_transposed(projection) else projection.weight[start:]
            )
            return F.linear(signal, weight, bias[start:] if with_bias and bias is not None else None)
        # A wrapped or quantised map: only its own forward knows what it computes.
        shift: Tensor = projection(signal)[..., start:]
        return shift if with_bias or bias is None else shift - bias[start:]


def is_transposed(projection: nn.Module) -> bool:
    """Whether the weight is stored `(in, out)`, as in `Conv1D` of transformers."""
    return type(projection).__name__ == "Conv1D" and hasattr(projection, "nf")


def fresh_weight_like(projection: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Returns the device and the floating dtype that parameters beside a projection should have."""
    weight = projection.weight
    dtype = getattr(projection, "compute_dtype", None) or weight.dtype
    return weight.device, dtype if dtype.is_floating_point else torch.get_default_dtype()


LAYOUTS = {layout.name: layout for layout in (Layout("separate", 1), Layout("last_third", 3))}
