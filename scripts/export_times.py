#!/usr/bin/env python3
"""Times a fused ViT-B/16 in ONNX Runtime against two runs of the plain one.

    python scripts/export_times.py [--batch 4] [--rounds 9]

Needs the extra `export`. One thread, random weights, CPU time; in each round the plain one runs before and
after. Figure: docs/serving.md.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

import toast
from toast.commands.errors import run_script


class Call(nn.Module):
    """Calls a model, for a steered one's `forward` is no plain method that can be exported."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Any:
        """Returns the logits."""
        return self.model(pixels)


def session(model: nn.Module, images: Tensor, path: Path) -> Any:
    """Returns a session of ONNX Runtime that runs a model on one thread."""
    import onnxruntime

    free = ({0: torch.export.Dim("batch")},)
    model = model.eval().requires_grad_(False)
    program = torch.export.export(Call(model), (images,), dynamic_shapes=free, strict=False)
    torch.onnx.export(program, dynamo=True, input_names=["pixels"], verbose=False).save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def seconds(held: Any, images: Tensor) -> float:
    """Returns the CPU time of a run."""
    began = time.process_time()
    held.run(None, {"pixels": images.numpy()})
    return time.process_time() - began


def main(batch: int = 4, rounds: int = 9) -> None:
    """Prints the ratio of each round, and their median."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 224, 224)
    bare = timm.create_model("vit_base_patch16_224", num_classes=100)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        plain = session(bare, images, Path(folder) / "plain.onnx")
        model = toast.wrap(bare).eval().requires_grad_(False)
        toast.fuse(model)
        fused = session(model.get_base_model(), images, Path(folder) / "fused.onnx")
        for each in (plain, fused):  # warm-up
            seconds(each, images)
        ratios = []
        for _ in tqdm(range(rounds), "rounds"):
            before, steered, after = (seconds(each, images) for each in (plain, fused, plain))
            ratios.append(steered / (before + after))
    shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"fused / two plain runs: median {median(ratios):.3f} of {shown}")


if __name__ == "__main__":
    run_script(main)
