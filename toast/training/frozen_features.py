"""What the frozen backbone computes of each sample, stored: TOAST's first pass, or what a probe reads.

The features before the head are the bottleneck features of classical transfer learning: freezing all but the
head and training the head on them is the same, as long as nothing is drawn at random before the head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from toast.baselines.attentive import AttentivePool, find_probe
from toast.reusing import first_pass
from toast.saving.names import is_of_adapter
from toast.steering import find_steering
from toast.stored_pass import FirstPass
from toast.training.backbones import Backbone
from toast.training.locking import in_turn
from toast.training.tensor_store import Rows, Store
from toast.visual.modes import evaluating

#: Layers that update statistics in training, so that what they give depends on the order of samples.
_STATISTICS = (nn.modules.batchnorm._BatchNorm,)
Tensors = dict[str, Tensor]
#: Damaged parts that are named.
_SHOWN = 5


def why_not(model: nn.Module, head: nn.Module | None, augmented: bool, views: int | None) -> list[str]:
    """Returns what would make a run on stored values differ from one that computes them; empty if nothing.

    Args:
        model: The model that is trained.
        head: Its head, which comes after what is stored.
        augmented: Whether training samples are drawn anew each time.
        views: A fixed number of variants a sample.
    """
    reasons = []
    if augmented and views is None:
        reasons.append(
            "augmentation draws each sample anew in every epoch; set augment.preset=none, or augment.views"
        )
    steering = find_steering(model)
    frozen = model if steering is None else steering.trunk
    for name, module in frozen.named_modules():
        rate = getattr(module, "p", getattr(module, "drop_prob", getattr(module, "prob", 0.0)))
        is_drop = "drop" in type(module).__name__.lower() and isinstance(rate, float) and rate > 0
        trained = any(parameter.requires_grad for parameter in module.parameters())
        if is_drop and not is_of_adapter(name):
            reasons.append(f"{name} drops at random in training (rate {rate}); create the model without")
        moves = isinstance(module, _STATISTICS) and module.track_running_stats and module.training
        if moves and not trained:
            reasons.append(f"{name} normalises by the statistics of the batch in training")
    read_by = [part for part in (head, find_probe(model)) if part is not None]
    behind = {parameter for part in read_by for parameter in part.parameters()}
    beside = [
        name
        for name, parameter in frozen.named_parameters()
        if parameter.requires_grad and parameter not in behind and not is_of_adapter(name)
    ]
    if beside:
        reasons.append(f"{beside[0]} is trained too, so what comes before the head changes")
    return reasons


def weights_of(model: nn.Module) -> str:
    """Returns the SHA-256 over the frozen weights: all but the top-down module and what is trained."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad and not is_of_adapter(name) and ".modules_to_save." not in name:
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def settings_of(model: nn.Module) -> dict[str, Any]:
    """Returns the settings of the adapter that decide what is stored."""
    steering = find_steering(model)
    if steering is None:
        probe = find_probe(model)
        return {"what": "features before the head" if probe is None else "final tokens"}
    assert steering.adapter is not None
    config = steering.adapter.config
    names = ("select_features", "select_from", "steer_from")
    return {"what": "first pass", **{name: getattr(config, name) for name in names}}


class Computer:
    """Computes what is stored of a batch.

    Args:
        model: The model that is trained.
        backbone: How it is fed.
        head: The head, whose input is stored where there is no first pass, or that of the probe before it.
    """

    def __init__(self, model: nn.Module, backbone: Backbone, head: nn.Module | None) -> None:
        self.model = model
        self.feed = backbone.feed
        self.reader = None if find_steering(model) is not None else find_probe(model) or head
        self.in_tuple = False

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> Tensors:
        """Returns the tensors by name; the first dimension of each is the batch."""
        args, kwargs = self.feed(batch)
        with evaluating(self.model):
            if self.reader is None:
                stored = first_pass(self.model, *args, **kwargs)
                self.in_tuple = stored.in_tuple
                return stored.tensors()
            seen: list[Tensor] = []
            handle = self.reader.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
            with handle:
                self.model(*args, **kwargs)
            return {"features": seen[0]}

    def complete(self, batch: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
        """Returns a batch with what was stored of its samples, where the objective looks for it."""
        if self.reader is not None:
            features = tensors["features"]
            if not isinstance(self.reader, AttentivePool):  # which reads tokens
                features = features.flatten(1)
            return batch | {"features": features}
        unnormed, normed, entering = (tensors.get(name) for name in ("unnormed", "normed", "entering"))
        return batch | {"first_pass": FirstPass(unnormed, normed, entering, in_tuple=self.in_tuple)}


def build(
    store_at: Path,
    fingerprint: dict[str, Any],
    compute: Callable[[dict[str, Any]], Tensors],
    samples: Callable[[range], tuple[dict[str, Any] | None, list[int]]],
    lengths: list[int] | None,
    count: int,
    accelerator: Accelerator,
    say: Callable[[str], None],
    limit: float | None = None,
    called: str = "first pass",
    **options: str,
) -> Store | None:
    """Computes and stores what is missing or damaged; processes share the parts, other runs wait.

    Args:
        store_at: The folder.
        fingerprint: What the values are a function of.
        compute: Computes a batch's values.
        samples: Maps a range of samples to their batch (None if all are bad) and the good ones' numbers in
            the range.
        lengths: Tokens of each sample, where these differ; None if all are of one shape.
        count: Number of samples, all views.
        accelerator: Devices, processes and precision.
        say: Gets the size before anything is written, where it is, and what was damaged.
        limit: Largest size in GiB; above it nothing is stored, and None returned.
        called: What it is called on screen.
        **options: Further arguments of `Store`.

    Raises:
        ValueError: If the folder holds something else, there is no room, or no sample can be read.
    """
    first = next((batch for row in range(count) for batch in samples(range(row, row + 1))[:1] if batch), None)
    if first is None:
        raise ValueError(f"data: none of the {count:,} samples can be read.")
    with accelerator.autocast():
        probe = compute(_on(accelerator, first))
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in probe.items()}
    tensors: dict[str, Rows] = {}
    for name, tensor in probe.items():
        shape = shapes[name] if tensor.ndim > 2 else (1, *shapes[name])
        kept: tuple[int | None, ...] = shape if lengths is None else (None, *shape[1:])
        tensors[name] = Rows(kept, str(tensor.dtype).removeprefix("torch."))
    fixed = next(iter(tensors.values())).shape[0]
    tokens = lengths if lengths is not None else [int(fixed or 1)] * count
    store = Store(store_at, fingerprint, tokens, tensors, **options)
    if limit is not None and store.size > limit * 2**30:
        say(
            f"first pass: computed in every step; stored it needs {store.size / 2**30:.2f} GiB, "
            f"first_pass.limit is {limit}"
        )
        return None
    say(f"{called}: {count:,} samples, {store.size / 2**30:.3f} GiB, in {store_at}")
    if accelerator.is_main_process:
        store.make_folder()
    with in_turn(accelerator, store_at, say):
        _fill(store, compute, samples, accelerator, say, called)
    return store


def _fill(
    store: Store,
    compute: Callable[[dict[str, Any]], Tensors],
    samples: Callable[[range], tuple[dict[str, Any] | None, list[int]]],
    accelerator: Accelerator,
    say: Callable[[str], None],
    called: str,
) -> None:
    """Computes and stores what is missing or damaged, and what lies in a part with samples that are unread.

    A part with samples that cannot be read does not count as written: they may be readable the next time.
    """
    if accelerator.is_main_process:
        for remark in store.create():
            say(f"{called}: {remark}")
    accelerator.wait_for_everyone()
    _verify(store, accelerator, say, called)
    missing = store.missing()
    accelerator.wait_for_everyone()
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    unread: list[int] = []
    for part in tqdm(
        mine, called, unit="part", leave=False, disable=not accelerator.is_main_process or not mine
    ):
        rows = store.parts[part]
        batch, good = samples(rows)
        bad = [sample for place, sample in enumerate(rows) if place not in good]
        unread += bad
        held = {}
        for name, row in store.tensors.items():
            empty = torch.zeros(1, dtype=getattr(torch, row.dtype))
            held[name] = [empty.expand(store.tokens(sample), row.width) for sample in rows]
        if batch is not None:
            with accelerator.autocast() if accelerator.mixed_precision != "no" else nullcontext():
                computed = compute(_on(accelerator, batch))
            for name, tensor in computed.items():
                for place, values in zip(good, tensor, strict=True):
                    flat = values.reshape(-1, store.tensors[name].width)
                    held[name][place] = flat[: store.tokens(rows[place])]
        store.write(part, held, is_whole=not bad)
    unread = gather_object(unread) if accelerator.num_processes > 1 else unread
    store.unread = frozenset(unread)
    accelerator.wait_for_everyone()


def _verify(store: Store, accelerator: Accelerator, say: Callable[[str], None], called: str) -> None:
    """Compares what is stored with its checksums, each process its share, before any of it is trained on."""
    # Neighbours in the files, so that each process reads on.
    each = -(-len(store.parts) // accelerator.num_processes)
    mine = range(len(store.parts))[accelerator.process_index * each :][:each]
    damaged = store.verify(
        tqdm(mine, f"{called}, checked", unit="part", leave=False, disable=not accelerator.is_main_process)
    )
    if accelerator.num_processes > 1:
        damaged = sorted(gather_object(damaged))
    if damaged:
        samples = [store.parts[part] for part in damaged]
        shown = ", ".join(f"{rows.start}-{rows.stop - 1}" for rows in samples[:_SHOWN])
        more = f" and {len(samples) - _SHOWN} more" if len(samples) > _SHOWN else ""
        say(
            f"{called}: {len(damaged)} of {len(store.parts)} parts in {store.folder} are damaged, those of "
            f"the samples {shown}{more}; computing them again"
        )
    accelerator.wait_for_everyone()


def _on(accelerator: Accelerator, batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(accelerator.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
