"""`toast export`: a steered model as a file for ONNX Runtime or `torch.export`, checked before it is kept."""

from __future__ import annotations

import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import toast
from toast.feedback import alike
from toast.files.adapter_folder import weights_of
from toast.files.atomic import replace_all
from toast.report.opening import OpenedModel
from toast.steering import find_steering

#: What rounding may change, as a share of the largest output.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_LIBRARIES = ("toast-steering", "torch", "transformers", "timm", "peft")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        files: The file, and for ONNX over 1.5 GB one with its weights.
        fused: Whether the adapter is fused; not where blocks differ in tokens or width.
        difference: Largest difference to the model, as a share of the largest output.
        moved: How far steering moves the outputs that were compared, likewise.
    """

    files: list[Path]
    fused: bool
    difference: float
    moved: float


class _Exportable(nn.Module, ABC):
    """A model as it is exported: tensors in, logits in float32 out."""

    names: tuple[str, ...]

    def __init__(self, opened: OpenedModel) -> None:
        super().__init__()
        self.model = opened.model
        self.feed, self.logits = opened.backbone.feed, opened.backbone.logits

    def run(self, **batch: Tensor) -> Tensor:
        """Returns the model's logits."""
        args, kwargs = self.feed(batch)
        return self.logits(self.model(*args, **kwargs)).float()

    def compared(self, inputs: tuple[Tensor, ...], *outputs: Tensor) -> list[Tensor]:
        """Returns the parts of outputs that inputs say something of."""
        return list(outputs)

    @abstractmethod
    def axes(self) -> dict[str, dict[int, Any]]:
        """Returns the axes that may have any length, by input."""

    @abstractmethod
    def examples(self) -> list[tuple[Tensor, ...]]:
        """Returns inputs to export with, and others, of other lengths, to compare on."""


class _Pictures(_Exportable):
    names = ("pixels",)

    def __init__(self, opened: OpenedModel, any_size: bool) -> None:
        super().__init__(opened)
        self.data = opened.backbone.data
        self.any_size = any_size

    def forward(self, pixels: Tensor) -> Tensor:
        return self.run(pixels=pixels)

    def axes(self) -> dict[str, dict[int, Any]]:
        return {"pixels": {0: Dim("batch")} | ({2: Dim.AUTO, 3: Dim.AUTO} if self.any_size else {})}

    def examples(self) -> list[tuple[Tensor, ...]]:
        from toast.embedded.task import load_task

        channels, height, width = self.data["input_size"]
        # twice the size is one that every patch and stride divides
        others = (2 * height, 2 * width) if self.any_size else (height, width)
        pictures = load_task(0, 6)[1].images / 255
        if channels != 3:
            pictures = pictures.mean(1, keepdim=True).expand(-1, channels, -1, -1)
        mean, std = (torch.tensor(self.data[each]).view(-1, 1, 1) for each in ("mean", "std"))
        found: list[tuple[Tensor, ...]] = []
        for some, size in ((pictures[:2], (height, width)), (pictures[2:5], others), (pictures[5:], others)):
            found.append(((nn.functional.interpolate(some, size) - mean) / std,))
        return found


class _Text(_Exportable):
    names = ("input_ids", "attention_mask")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.run(input_ids=input_ids, attention_mask=attention_mask)

    def compared(self, inputs: tuple[Tensor, ...], *outputs: Tensor) -> list[Tensor]:
        # Padding sees nothing, and each runtime makes something else of that.
        return [each[inputs[1].bool()] for each in outputs]

    def axes(self) -> dict[str, dict[int, Any]]:
        axes = {0: Dim("batch"), 1: Dim("tokens")}
        return dict.fromkeys(self.names, axes)

    def examples(self) -> list[tuple[Tensor, ...]]:
        words = int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator, union-attr]
        drawn = torch.Generator().manual_seed(0)
        found: list[tuple[Tensor, ...]] = []
        for shape in ((2, 12), (3, 7), (1, 20)):
            mask = torch.ones(shape, dtype=torch.int64)
            mask[0, :2] = 0  # padded on the left
            found.append((torch.randint(words, shape, generator=drawn), mask))
        return found


def export(opened: OpenedModel, adapter: Path, out: Path, any_size: bool = False) -> Exported:
    """Writes a model in evaluation mode, with a batch of any size; a language model without a cache.

    The file is written beside its place, run on inputs of other lengths than it was exported with, and
    compared with the model as it was before fusing; only then does it take its place.

    Args:
        opened: The model; it is fused in place.
        adapter: Folder of its adapter.
        out: `*.onnx` or `*.pt2`.
        any_size: Pictures: whether their height and width may vary, too.

    Raises:
        ValueError: If the model takes pictures of one size alone or cannot be exported, or the file computes
            something else.
    """
    if opened.is_language and any_size:
        raise ValueError(f"--any-size: for pictures; {opened.name} is a language model, which takes any.")
    opened.model.cpu()
    module = (_Text(opened) if opened.is_language else _Pictures(opened, any_size)).eval()
    examples = module.examples()
    with torch.inference_mode():
        try:
            expected = [module(*inputs) for inputs in examples]
        except (AssertionError, RuntimeError, ValueError) as error:
            if not any_size:
                raise
            raise ValueError(
                f"--any-size: {opened.name} takes pictures of one size alone ({error}). timm's vision "
                "transformers take others with model.options={dynamic_img_size: true}."
            ) from error
    moved = _moved(module, examples, expected)
    module.requires_grad_(False)  # PEFT trains again what it has switched on again
    fused = _fuse(opened.model)
    axes = module.axes()
    with torch.no_grad():
        try:
            program = torch.export.export(module, examples[0], dynamic_shapes=axes, strict=False)
        except Exception as error:  # of many kinds, with the solver's reasons on many lines
            raise ValueError(f"torch.export cannot export {opened.name}: {error}") from error
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}-"[:200]) as folder:
        new = Path(folder, out.name)
        run = _WRITERS[out.suffix](program, new, module.names, _origin(opened, adapter))
        difference = max(
            _share(*module.compared(inputs, run(inputs) - whole, whole))
            for inputs, whole in zip(examples, expected, strict=True)
        )
        tolerance = TOLERANCE[next(p.dtype for p in module.parameters() if p.dtype.is_floating_point)]
        if not difference <= tolerance:
            raise ValueError(
                f"{out.name} was not written: it computes something else than {opened.name}, by "
                f"{difference:.1e} of the largest output, where rounding explains {tolerance:.0e}."
            )
        files = sorted(Path(folder).iterdir(), reverse=True)  # what a file needs is there before it
        places = [out.parent / file.name for file in files]
        replace_all(list(zip(files, places, strict=True)))
    return Exported(places[::-1], fused, difference, moved)


def _fuse(model: nn.Module) -> bool:
    steering = find_steering(model)
    adapter = None if steering is None else steering.adapter
    if adapter is None or not alike(adapter.maps):
        return False
    toast.fuse(model)
    return True


def _share(difference: Tensor, whole: Tensor) -> float:
    return float(difference.abs().max() / whole.abs().max().clamp_min(1e-30))  # of a new head, all is 0


def _moved(module: Any, examples: list[tuple[Tensor, ...]], expected: list[Tensor]) -> float:
    """Returns how far the adapter moves the outputs; 0 without one."""
    if find_steering(module.model) is None:
        return 0.0
    with torch.inference_mode(), module.model.disable_adapter():
        plain = [module(*inputs) for inputs in examples]
    return max(
        _share(*module.compared(inputs, whole - frozen, whole))
        for inputs, whole, frozen in zip(examples, expected, plain, strict=True)
    )


def _origin(opened: OpenedModel, adapter: Path) -> dict[str, str]:
    """Returns what the file was made of, for its reader."""
    model = opened.config.model
    backbone = model.model_dump(mode="json", include={"library", "name", "weights", "dtype", "options"})
    found = {
        "toast.adapter": opened.name,
        "toast.adapter.sha256": sha256(weights_of(adapter).read_bytes()).hexdigest(),
        "toast.backbone": json.dumps(backbone),
        "toast.versions": json.dumps({name: version(name) for name in _LIBRARIES}),
        "toast.input": json.dumps(opened.backbone.data),
        "toast.classes": json.dumps(opened.classes),
    }
    return {key: value for key, value in found.items() if value not in ("[]", "{}")}


_Run = Callable[[tuple[Tensor, ...]], Tensor]


def _write_onnx(program: ExportedProgram, to: Path, names: tuple[str, ...], origin: dict[str, str]) -> _Run:
    import onnxruntime

    written = torch.onnx.export(
        program, dynamo=True, input_names=names, output_names=["logits"], verbose=False
    )
    assert written is not None
    written.model.metadata_props.update(origin)
    written.save(to)
    session = onnxruntime.InferenceSession(to, providers=["CPUExecutionProvider"])

    def run(inputs: tuple[Tensor, ...]) -> Tensor:
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return run


def _write_program(
    program: ExportedProgram, to: Path, names: tuple[str, ...], origin: dict[str, str]
) -> _Run:
    torch.export.save(program, to, extra_files={"toast.json": json.dumps(origin)})
    module = torch.export.load(to).module()
    return lambda inputs: module(*inputs)


_WRITERS = {".onnx": _write_onnx, ".pt2": _write_program}
