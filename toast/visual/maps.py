"""`look`: where a vision model looks, as maps over the picture; computing only, nothing is drawn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from toast.families.tokens import channels_last
from toast.thread_state import running
from toast.visual import relevance
from toast.visual.attention_maps import AttentionMaps, Target
from toast.visual.grids import (
    Grid,
    Maps,
    cell_in,
    has_token_attention,
    put_back,
    real_tokens,
    sequence_grid,
)
from toast.visual.methods import METHODS, Method, Query
from toast.visual.patch_attention import (
    AnyQuery,
    PatchAttention,
    fine,
    no_class_token,
    patch_attention,
    shares,
)
from toast.visual.relevance import attention_gradients, class_scores, of_head
from toast.visual.seeing import CallRecord, Parts, PassRecord, find_parts, record_call

_OVER_SEQUENCES = ("rollout", "relevance")
_WITH_GRADIENT = ("relevance", "grad-cam")


def look(
    model: nn.Module,
    pixels: Tensor,
    *,
    block: int = -1,
    head: int | Literal["mean"] = "mean",
    query: Query | None = None,
    method: Method | None = None,
    target: Target | None = None,
    **inputs: Any,
) -> AttentionMaps:
    """Looks at a vision model while it computes, in the mode (training or evaluation) that it is in.

    Of a steered model the frozen one is the first pass of the same call; of a model with another PEFT adapter
    it is the model without it; a plain model has none. The maps are those that the model's own attention
    kernel applies (before dropout), and cost nothing when nobody looks: nothing stays at the model.

    Args:
        model: A timm or transformers vision model: plain, wrapped, or with another adapter.
        pixels: As the model takes them, `(batch, channels, height, width)`; brought to its device and dtype.
        block: The block, counted from 0, or from the top if negative. Where a block has several attentions,
            each counts. In ConvNeXt, a stage.
        head: A head, or "mean" over heads.
        query: "class": what the class token attends to; "mean": what the patches attend to, on average. None
            is the class token where there is one.
        method: "attention", of one block; "rollout", of all blocks up to it (Abnar and Zuidema 2020, heads
            averaged); "relevance" of these for a class (Chefer, Gur and Wolf 2021); "grad-cam", of what
            enters the block (of a hierarchy, of what leaves it), for a class; "energy", of what leaves the
            block. None is attention where tokens attend to tokens, and else energy.
        target: The class whose score counts for relevance and Grad-CAM, one for all or one each, `(batch,)`,
            or what makes scores `(batch,)` of the output. None is the class that the model says, for the
            frozen model too.
        **inputs: Further inputs, such as `interpolate_pos_encoding=True`.

    Returns:
        Maps of both passes, the selection weights and the signals.

    Raises:
        ValueError: If the model is none of vision, or lacks the block, the head, the query or what the method
            needs; the message says what there is.
    """
    parts = find_parts(model)
    method = _method(parts, method)
    number = _number(parts, block)
    if head != "mean" and method in ("rollout", "grad-cam", "energy"):
        raise ValueError(f"head: {METHODS[method]} has no single heads; needs 'mean', got {head!r}.")
    wanted = set[int]()
    if method in ("attention", *_OVER_SEQUENCES):
        wanted = set(range(0 if method in _OVER_SEQUENCES else number, number + 1))
    gradient = method in _WITH_GRADIENT
    like = next(parameter for parameter in parts.trunk.parameters() if parameter.is_floating_point())
    with torch.inference_mode(False), torch.set_grad_enabled(gradient):
        pixels = pixels.detach().clone().to(like).requires_grad_(gradient)
        record = record_call(
            model, parts, pixels, inputs, wanted=wanted,
            states=method in ("grad-cam", "energy"), whole=gradient,
        )  # fmt: skip
        for seen in (record.output, record.frozen):
            missing = [] if seen is None else sorted(wanted - seen.attention.keys())
            if missing:
                raise ValueError(
                    f"no attention was seen in block {missing[0]}: the model's kernel hides its queries "
                    "and keys. Load the model with attn_implementation='sdpa' or 'eager'."
                )
        size = (pixels.shape[-2], pixels.shape[-1])
        view = _View(parts, number, head, method, size)
        view.settle(record.output, query)
        if gradient:
            view.target = _target(record.output.output, target)
        attention, on_patches = view.maps(record.output)
        frozen, frozen_on_patches = None, None
        if record.frozen is not None:
            # Where the trunk checkpoints its blocks, the gradient runs them once more.
            with nullcontext() if record.frozen.call is None else running(record.frozen.call):
                frozen, frozen_on_patches = view.maps(record.frozen)
        selection, signals = _steering_maps(parts, record, size)
    return AttentionMaps(
        attention=attention,
        frozen=frozen,
        selection=selection,
        signals=signals,
        on_patches=on_patches,
        frozen_on_patches=frozen_on_patches,
        output=record.output.output,
        frozen_output=None if record.frozen is None else record.frozen.output,
        size=size,
        block=number,
        blocks=len(parts.values),
        head=head,
        query=view.query,
        method=method,
    )


def _method(parts: Parts, method: Method | None) -> Method:
    """Returns the method, or the one that the family suggests.

    Raises:
        ValueError: If it is unknown, or needs what the family does not have.
    """
    attends = has_token_attention(parts)
    if method is None:
        return "attention" if attends else "energy"
    if method not in METHODS:
        raise ValueError(f"method: needs one of {', '.join(METHODS)}; got {method!r}.")
    if method in ("attention", *_OVER_SEQUENCES) and not attends:
        raise ValueError(
            f"method={method!r} needs attention between tokens, which {type(parts.trunk).__name__} does not "
            "have; use 'energy' or 'grad-cam'."
        )
    if method in _OVER_SEQUENCES and parts.family.tokens != "sequence":
        raise ValueError(
            f"method={method!r} follows tokens through all blocks, which windows and merging of "
            f"{type(parts.trunk).__name__} interrupt; use 'attention', 'grad-cam' or 'energy'."
        )
    return method


def _number(parts: Parts, block: int) -> int:
    """Returns the block counted from 0.

    Raises:
        ValueError: If it is not there.
    """
    count = len(parts.values)
    if not -count <= block < count:
        raise ValueError(f"block: {type(parts.trunk).__name__} has blocks 0 to {count - 1}; got {block}.")
    return block % count


def _target(output: Any, target: Target | None) -> Callable[[Any], Tensor]:
    """Returns what makes the scores that gradients are taken of.

    Raises:
        ValueError: If the model gives no scores of classes, or has no such class.
    """
    if callable(target) and not isinstance(target, Tensor):
        return target
    scores = class_scores(output)
    if scores is None:
        raise ValueError(
            "the model gives no scores of classes, (batch, classes), that relevance and Grad-CAM could "
            "explain; pass target=, a function from its output to scores (batch,)."
        )
    classes = scores.argmax(-1) if target is None else torch.as_tensor(target, device=scores.device)
    classes = classes.expand(len(scores))
    if not ((classes >= 0) & (classes < scores.shape[1])).all():
        raise ValueError(f"target: the model has classes 0 to {scores.shape[1] - 1}; got {classes.tolist()}.")

    def chosen(output: Any) -> Tensor:
        found = class_scores(output)
        assert found is not None
        return found.gather(1, classes[:, None])[:, 0]

    return chosen


class _View:
    """What is asked of each pass.

    Args:
        parts: Of the model.
        number: The block.
        head: The head.
        method: The method.
        size: Height and width of the picture in pixels.
    """

    def __init__(
        self, parts: Parts, number: int, head: int | Literal["mean"], method: Method, size: tuple[int, int]
    ) -> None:
        self.parts = parts
        self.number = number
        self.head = head
        self.method = method
        self.size = size
        self.query: AnyQuery | None = None
        self.patches: PatchAttention | None = None
        self.target: Callable[[Any], Tensor] | None = None

    def settle(self, seen: PassRecord, query: Query | None) -> None:
        """Finds the grid of the tokens and chooses the query.

        Raises:
            ValueError: If the query is not there.
        """
        if query not in ("class", "mean", None):
            raise ValueError(f"query: needs 'class' or 'mean'; got {query!r}.")
        shape = seen.shapes[self.parts.block_of[self.number]]
        if self.parts.family.tokens == "sequence":
            self.patches = patch_attention(self.parts, shape[1], self.size, query)
        elif query == "class":
            raise no_class_token(self.parts)
        if self.method not in ("grad-cam", "energy"):
            self.query = "mean" if self.patches is None else self.patches.query

    @property
    def grid(self) -> Grid | None:
        """Where the patches lie in the sequence; None where tokens form a map or windows."""
        return None if self.patches is None else self.patches.grid

    def maps(self, seen: PassRecord) -> tuple[Maps, Tensor]:
        """Returns the maps of one pass, each summing to 1, and the share that was on patches before."""
        if self.query is None:
            found, total = shares(self._of_states(seen))
        elif self.patches is None:
            found, total = shares(self._of_windows(seen))
        elif self.method == "attention":
            found, total = self.patches.of_heads(seen.attention[self.number](), self.head)
        else:
            found, total = self.patches.of_tokens(self._through_blocks(seen))
        return found, total if self.method in ("attention", "rollout") else torch.ones_like(total)

    def _through_blocks(self, seen: PassRecord) -> Tensor:
        """Returns rollout or relevance, how much of each token arrives in each, `(batch, tokens, tokens)`."""
        attentions = [seen.attention[number] for number in range(self.number + 1)]
        if self.method == "rollout":
            return relevance.rollout([of_head(attention(), "mean") for attention in attentions])
        assert self.target is not None
        gradients = attention_gradients(self.target(seen.output), attentions)
        with torch.no_grad():
            return relevance.relevance([attention() for attention in attentions], gradients, self.head)

    def _of_windows(self, seen: PassRecord) -> Maps:
        """Returns the mean row of the patches where each attends within its window."""
        attention = of_head(seen.attention[self.number](), self.head)
        block = self.parts.blocks[self.parts.block_of[self.number]]
        batch, rows, columns, _ = seen.shapes[self.parts.block_of[self.number]]
        real = real_tokens(block, batch, rows, columns, attention)
        received = (attention * real[:, :, None]).sum(1) / (rows * columns)
        return Maps(put_back(received, block, rows, columns), cell_in(self.parts, self.number, seen.shapes))

    def _of_states(self, seen: PassRecord) -> Maps:
        """Returns energy or Grad-CAM of what enters or leaves the block."""
        block = self.parts.block_of[self.number]
        order = self.parts.family.tokens
        if self.method == "energy":
            leaving = channels_last(seen.leaving[block], order)
            return self._placed(relevance.energy(fine(leaving)), seen)
        # Above the last block of a sequence only the class token counts, so what leaves it has no gradient.
        states = (seen.leaving if self.grid is None else seen.entering)[block]
        assert self.target is not None
        if not states.requires_grad:
            raise ValueError(
                f"grad-cam needs the gradient of block {self.number}, which runs once, without a graph, in a "
                "model with steer_from; choose a higher block."
            )
        (gradient,) = torch.autograd.grad(self.target(seen.output).sum(), states)
        states, gradient = (channels_last(x.detach(), order) for x in (states, gradient))
        if self.grid is not None:
            states, gradient = states[:, self.grid.prefix :], gradient[:, self.grid.prefix :]
        values = relevance.grad_cam(states, gradient)
        return self._placed(values, seen)

    def _placed(self, values: Tensor, seen: PassRecord) -> Maps:
        """Lays values of a block's tokens out as maps."""
        if self.grid is None:
            return Maps(values, cell_in(self.parts, self.number, seen.shapes, entering=False))
        patches = self.grid.rows * self.grid.columns
        return Grid(0, self.grid.rows, self.grid.columns, self.grid.cell).lay_out(values[:, -patches:])


def _steering_maps(
    parts: Parts, record: CallRecord, size: tuple[int, int]
) -> tuple[Maps | None, dict[int, Maps]]:
    """Returns the selection weights and the norms of the signals as maps; none of a plain model."""
    trace, steering = record.trace, parts.steering
    if trace is None or steering is None:
        return None, {}
    shapes, last = record.output.shapes, len(parts.values) - 1
    numbers = [value.unit.number for value in steering.values]
    with torch.no_grad():
        weights = fine(trace.selection_weights)
        norms = [fine(signal).norm(dim=-1) for signal in trace.signals]
    if parts.family.tokens == "sequence":
        grid = sequence_grid(parts, weights.shape[1], size)
        return grid.lay_out(weights), {
            number: grid.lay_out(norm) for number, norm in zip(numbers, norms, strict=True)
        }
    signals = {}
    for number, norm in zip(numbers, norms, strict=True):
        is_picture = parts.family.tokens == "map" and number == 0  # the stem's input is the picture itself
        rows, columns = size if is_picture else shapes[parts.block_of[number]][1:3]
        # Where a coarser grid was padded, refining it gives more rows than there are.
        signals[number] = Maps(norm[:, :rows, :columns], cell_in(parts, number, shapes))
    return Maps(weights, cell_in(parts, last, shapes, entering=False)), signals
