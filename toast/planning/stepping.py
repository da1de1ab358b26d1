"""Runs a step of a run on tensors without memory, and notes what it holds and how much it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from toast.families.anatomy import find_anatomy
from toast.feedback import can_compose, composing_pays
from toast.planning.empty_models import drop_memory, empty_backbone
from toast.planning.flops import Flops
from toast.planning.weight_sizes import places_of
from toast.reusing import first_pass
from toast.steering import find_steering
from toast.thread_state import running_pass
from toast.training.accelerating import PRECISIONS
from toast.training.allocations import Allocations, Part, Timeline
from toast.training.backbones import Backbone
from toast.training.many_heads import answers_of
from toast.training.methods import Tuned, apply_method
from toast.training.objective import Objective
from toast.training.preparing import Stage, active_module, checkpoint_activations
from toast.training.run_config import RunConfig
from toast.visual.modes import evaluating

#: What is kept for backward, by when it was made; before the first pass, between the two, after the second.
_PARTS = {0: "first pass", 1: "selection and feedback", 2: "head and loss"}
_PRIMES = (101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167, 173, 179, 181, 191, 193)


@dataclass(frozen=True)
class Step:
    """What a step needs, as a function of the number of samples.

    Args:
        kept: What is kept for backward, by part; each fixed bytes and bytes a sample.
        timeline: What is held after each operator, beside parameters and optimiser.
        flops: Fixed operations, and operations of a sample.
        gathers: How often a process that holds a share of a block needs all of it, by block.
    """

    kept: dict[str, Part]
    timeline: Timeline
    flops: Part
    gathers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prefill:
    """What a prompt as long as a training row needs.

    Args:
        cache: Bytes of the keys and values of both passes, of a sample.
        plain_cache: The same without steering.
        timeline: What is held after each operator, beside parameters.
    """

    cache: float
    plain_cache: float
    timeline: Timeline


class EmptyRun:
    """A run's model and loss without memory.

    Args:
        config: The run's configuration.
        stage: `pretune` or `tune`.
        classes: Vision: outputs of the head.

    Raises:
        ValueError: If the model is not to be had, or the method does not fit it.
    """

    def __init__(self, config: RunConfig, stage: Stage, classes: int) -> None:
        self.config = config
        self.stage = stage
        self.backbone: Backbone = empty_backbone(config, classes)
        self.blocks = blocks_of(self.backbone.model)
        base = {id(place.parameter): place for place in places_of(self.backbone.model, self.blocks)}
        self.backbone.model.train()
        with torch.device("meta"):
            self.method: Tuned = apply_method(self.backbone, config, stage)
        self.batch = _coprime(self.backbone.model, config)
        head = self.method.head_name
        #: Where each of the base's parameters stands, by its name in the whole model.
        self.places = {n: base[id(p)] for n, p in self.method.model.named_parameters() if id(p) in base}
        self.mode = FakeTensorMode()
        drop_memory(self.method.model, self.mode)
        self.objective = Objective(
            self.method.model, self.backbone, answers_of(config, ["class"] * classes), stage,
            None if head is None else active_module(self.method.model, head),
        )  # fmt: skip
        self.checkpoints = False

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [p for p in self.method.model.parameters() if p.requires_grad]

    def form(self, samples: int) -> str:
        """Returns the form of the feedback for so many samples; empty where there is none."""
        adapter = self._adapter()
        if adapter is None:
            return ""
        form: str = adapter.config.feedback_form
        if form != "auto":
            return form
        tokens = samples * self.tokens
        return "composed" if can_compose(adapter) and composing_pays(adapter.maps, tokens) else "per_token"

    @property
    def composes_from(self) -> int | None:
        """From how many samples on the feedback is composed; None if it never is, or the form is given."""
        adapter = self._adapter()
        if adapter is None or adapter.config.feedback_form != "auto" or self.form(2**30) != "composed":
            return None
        low, high = 0, 2**30  # not composed, composed
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.form(middle) == "composed" else (middle, high)
        return high

    @property
    def tokens(self) -> int:
        """Tokens of a sample that are selected from."""
        if not hasattr(self, "_tokens"):
            with self.mode, torch.no_grad(), self._autocast():
                args, kwargs = self.backbone.feed(self._batch())
                features = next(iter(first_pass(self.method.model, *args, **kwargs).tensors().values()))
            self._tokens = prod(features.shape[1:-1])
        return self._tokens

    def step(self, form: str = "", checkpointing: bool = False, stored: bool = False) -> Step:
        """Runs a micro-batch forward and backward.

        Args:
            form: The form of the feedback, see `form`.
            checkpointing: Recompute blocks in backward. Once on it stays on.
            stored: Take the first pass as stored.

        Raises:
            ValueError: If the model has no activation checkpointing.
        """
        if checkpointing and not self.checkpoints:
            checkpoint_activations(self.backbone.model)
            self.checkpoints = True
        model, watch = self.method.model, _Watch(last=int(stored))
        flops = Flops(self.batch)
        seen = Allocations([*model.parameters(), *model.buffers()], watch.label, self.batch, flops.count)
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda p: seen.as_gradient(p.grad))  # type: ignore[no-untyped-call]
            for parameter in self.trained
        ]
        counted, counters = _count_calls(self._block_modules(), watch)
        with self._in_form(form), self.mode, self._not_packed():
            given = self._stored() if stored else None
            with seen:
                batch = self._batch()
                if given is not None:
                    batch["first_pass"] = given
                    for tensor in given.tensors().values():
                        seen.note(tensor)
                watch.phase = "forward"
                with self._autocast():
                    losses = self.objective(batch, 1.0)
                kept = seen.held()
                watch.phase = "backward"
                losses["loss"].backward()
        for hook in (*hooks, *counters):
            hook.remove()
        model.zero_grad()
        return Step(kept, seen.timeline, (flops.fixed, flops.sample), tuple(counted))

    def plain_flops(self) -> Part:
        """Counts a forward pass without adapter and gradients."""
        model: Any = self.method.model
        flops = Flops(self.batch)
        seen = Allocations(batch=self.batch, also=flops.count)
        off = model.disable_adapter()
        with off, self.mode, self._not_packed(), torch.no_grad(), self._autocast(), seen:
            self.objective(self._batch(), predict=True)
        return flops.fixed, flops.sample

    def prefill(self) -> Prefill:
        """Runs a prompt as long as a training row, without gradients."""
        model: Any = self.method.model
        seen = Allocations([*model.parameters(), *model.buffers()], batch=self.batch)
        with evaluating(model), self.mode, self._not_packed(), torch.no_grad(), seen:
            tokens = self._batch()["input_ids"]
            cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
        # Those of the first pass stand behind those of the second.
        layers = [
            sum(part.numel() * part.element_size() for part in (layer.keys, layer.values)) / self.batch
            for layer in cache.layers
        ]
        return Prefill(sum(layers), sum(layers[: len(self.blocks)]), seen.timeline)

    def _batch(self) -> dict[str, Any]:
        """Makes a batch of the shapes that the run's collator makes."""
        if self.config.task == "vision":
            pixels = torch.empty(self.batch, *self.backbone.data["input_size"])
            return {"pixels": pixels, "labels": torch.empty(self.batch, dtype=torch.long)}
        shape, data = (self.batch, self.config.data.block), self.config.data
        names = ["input_ids", "labels"]
        if data.packing == "documents":
            names.append("position_ids")
        elif data.packing == "none":
            names.append("attention_mask")
        return {name: torch.empty(shape, dtype=torch.long) for name in names}

    def _stored(self) -> Any:
        args, kwargs = self.backbone.feed(self._batch())
        with self._autocast():
            return first_pass(self.method.model, *args, **kwargs)

    def _adapter(self) -> Any:
        steering = find_steering(self.method.model)
        return None if steering is None else steering.adapter

    def _block_modules(self) -> list[nn.Module]:
        return [self.backbone.model.get_submodule(name) for name in self.blocks]

    @contextmanager
    def _in_form(self, form: str) -> Iterator[None]:
        adapter = self._adapter()
        if adapter is None or not form:
            yield
            return
        before = adapter.config.feedback_form
        adapter.config.feedback_form = form
        try:
            yield
        finally:
            adapter.config.feedback_form = before

    def _not_packed(self) -> Any:
        """Says that no row is of several documents, where none is.

        transformers would look at the positions, which have no values here, and make a mask to be safe.
        """
        if self.config.task != "language" or self.config.data.packing == "documents":
            return nullcontext()
        from transformers import masking_utils

        return patch.object(masking_utils, "find_packed_sequence_indices", lambda positions: None)

    def _autocast(self) -> Any:
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision_of(self.config))
        return nullcontext() if low is None else torch.autocast("cpu", low)


class _Watch:
    """Says for what a storage is made: by the phase of the step and the pass that runs.

    Args:
        last: The pass that is done when the step begins: 1 where the first is stored.
    """

    def __init__(self, last: int) -> None:
        self.phase = "inputs"
        self.last = last

    def label(self) -> str:
        if self.phase != "forward":
            return self.phase
        now = running_pass()
        self.last = now or self.last
        return {1: "first pass", 2: "second pass"}.get(now, _PARTS[self.last])


def precision_of(config: RunConfig) -> str:
    """Returns the precision that a run computes in: `no`, `bf16` or `fp16`."""
    return config.precision or PRECISIONS[config.model.dtype]


def blocks_of(model: nn.Module) -> list[str]:
    """Returns the paths of a backbone's blocks; none if it is of no known family."""
    try:
        anatomy = find_anatomy(model)
    except ValueError:
        return []
    return [".".join(filter(None, (anatomy.trunk_name, name))) for name in anatomy.blocks]


def _count_calls(blocks: list[nn.Module], watch: _Watch) -> tuple[list[int], list[Any]]:
    """Counts how often a block is called in forward, once more where a gradient comes back through it."""
    counted = [0] * len(blocks)

    def counts(index: int) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if watch.phase == "forward":
                first = out[0] if isinstance(out, tuple) else out
                counted[index] += 1 + (isinstance(first, Tensor) and first.requires_grad)

        return hook

    return counted, [block.register_forward_hook(counts(index)) for index, block in enumerate(blocks)]


def _coprime(model: nn.Module, config: RunConfig) -> int:
    """Returns a number of samples that divides no size of a model and its input."""
    sizes = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    sizes |= {config.data.block}
    return next(prime for prime in _PRIMES if all(size % prime for size in sizes))
