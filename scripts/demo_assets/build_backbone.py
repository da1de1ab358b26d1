#!/usr/bin/env python3
"""Build the demonstration's backbone: a ViT of tiny size distilled from a ViT-S/14 teacher on clip-art.

    python scripts/demo_assets/build_backbone.py                # distil, write the weights
    python scripts/demo_assets/build_backbone.py --evaluate     # measure them, print the table of BACKBONE.md

Expected layout of `--assets` (default: $TOAST_ASSETS, else ~/.cache/toast-assets):

    vit_small/model.safetensors      the teacher, timm names, positions for a 37 x 37 grid
    openclipart/<folder>/**/*.png    the pictures

The stages of a build, of which the first two are kept in `--work` and used again:

1. Views. Clip-art is composed on plain, noisy, graded or collage grounds, one large picture or several
   small ones per canvas, and the teacher's final and earlier tokens are computed once for every view.
2. Initial weights. The student's residual stream is the teacher's, projected on its leading principal
   components; block by block, heads and hidden units are selected and the output maps are refitted by
   ridge regression against the teacher's stream.
3. Distillation. The student's tokens, through linear maps that are thrown away afterwards, regress the
   standardised teacher tokens. An exponential average of the weights is exported after every epoch.

views.py and teacher.py hold the first stage, student.py the second, this file the third and
the command line, evaluation.py what --evaluate does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from evaluation import evaluate
from progress import Clock
from safetensors.torch import save_file
from student import initialise, ridge
from teacher import all_targets, read_teacher
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from views import compose, normalised, read_clipart

from toast.embedded.backbone import ARCHITECTURE, new_backbone

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "toast" / "embedded" / "assets" / "backbone.safetensors"


@dataclasses.dataclass
class Readout:
    """Standardises the targets and maps student tokens to them; class and patch tokens apart."""

    mean: Tensor  # (2, 2 * teacher width): class row, patch row
    std: Tensor

    @classmethod
    def of(cls, targets: Tensor) -> Readout:
        """Measure the mean and standard deviation of targets (n, tokens, channels) on a sample."""
        sample = targets[:: max(1, len(targets) // 3000)].float()
        parts = [sample[:, 0], sample[:, 1:].flatten(0, 1)]
        return cls(torch.stack([p.mean(0) for p in parts]), torch.stack([p.std(0) for p in parts]) + 1e-4)

    def standard(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Split targets (n, tokens, channels) into standardised class and patch targets."""
        x = targets.float()
        return (x[:, 0] - self.mean[0]) / self.std[0], (x[:, 1:] - self.mean[1]) / self.std[1]


def flipped(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror images (n, 3, h, w) and the grid of their patch targets (n, 1 + grid * grid, channels)."""
    grid = math.isqrt(targets.shape[1] - 1)
    patches = targets[:, 1:].unflatten(1, (grid, grid)).flip(2).flatten(1, 2)
    return images.flip(3), torch.cat([targets[:, :1], patches], 1)


def batches(count: int, size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Yield the index batches of one epoch."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1000 + epoch))
    yield from order[: count // size * size].split(size)


def export(state: dict[str, Tensor], target: Path, note: dict[str, str]) -> None:
    """Write a state dict as float16 beside the target, then rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".part")
    save_file({k: v.half().contiguous() for k, v in state.items()}, beside, metadata=note)
    beside.chmod(0o644)
    beside.replace(target)


def distil(args: argparse.Namespace, images: Tensor, targets: Tensor, student: VisionTransformer) -> None:
    """Train the student on the views' targets, with a checkpoint and an export after every epoch."""
    held = args.held_out
    readout = Readout.of(targets[held:])
    channels = targets.shape[-1]
    with torch.inference_mode():
        tokens = student.forward_features(normalised(images[held : held + 600]))
        aims = readout.standard(targets[held : held + 600])
        fits = [
            ridge(tokens[:, 0], aims[0], 0.1),
            ridge(tokens[:, 1:].flatten(0, 1), aims[1].flatten(0, 1), 0.01),
        ]
    maps = nn.ModuleList([nn.Linear(student.embed_dim, channels) for _ in range(2)])
    with torch.no_grad():
        for linear, (weight, bias) in zip(maps, fits, strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)

    # the forward and backward passes run on a bfloat16 copy, the update on float32 weights
    master = nn.ModuleDict({"student": student, "maps": maps}).train()
    light = nn.ModuleDict(
        {
            "student": new_backbone(num_classes=0),
            "maps": nn.ModuleList([nn.Linear(student.embed_dim, channels) for _ in range(2)]),
        }
    ).bfloat16()
    light["student"].patch_embed.requires_grad_(False)
    heavy_list, light_list = list(master.parameters()), list(light.parameters())
    average = {k: v.detach().clone() for k, v in master.state_dict().items()}
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in student.parameters() if p.requires_grad], "lr": args.lr},
            {"params": list(maps.parameters()), "lr": args.map_lr},
        ],
        betas=(0.9, 0.98),
        weight_decay=args.weight_decay,
        foreach=True,
    )
    count = len(images) - held
    steps = args.epochs * (count // args.batch)
    warm = min(100, max(1, steps // 20))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: (
            min(1.0, (s + 1) / warm) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps))))
        ),
    )
    start = 0
    checkpoint = args.work / "checkpoint.pt"
    settings = {
        k: getattr(args, k)
        for k in ("views", "seed", "epochs", "batch", "lr", "map_lr", "weight_decay", "calibration")
    }
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["settings"] != settings:
            raise SystemExit(f"{checkpoint} is of a run with other settings: {saved['settings']}")
        master.load_state_dict(saved["master"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
        average, start = saved["average"], saved["epoch"]
        print(f"resumed after epoch {start}")

    def copy_down() -> None:
        with torch.no_grad():
            torch._foreach_copy_(light_list, heavy_list)

    def losses(model: nn.ModuleDict, x: Tensor, aim: Tensor) -> Tensor:
        tokens = model["student"].forward_features(x)
        wanted = readout.standard(aim)
        outs = (model["maps"][0](tokens[:, 0]), model["maps"][1](tokens[:, 1:]))
        # each of: class early, class final, patches early, patches final; 1.0 is predicting the mean
        return torch.stack(
            [
                (part.float() - goal).square().mean()
                for out, want in zip(outs, wanted, strict=True)
                for part, goal in zip(out.chunk(2, -1), want.chunk(2, -1), strict=True)
            ]
        )

    def ship() -> None:
        state = {k.removeprefix("student."): v for k, v in average.items() if k.startswith("student.")}
        note = {"architecture": ARCHITECTURE, "settings": json.dumps(settings), "steps": f"{step}/{steps}"}
        export(state, args.target, note)

    @torch.inference_mode()
    def held_out(state: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            for name, value in light.state_dict().items():
                value.copy_(state[name])
        light.eval()
        parts = [
            losses(light, normalised(images[i : i + 64]).bfloat16(), targets[i : i + 64])
            for i in range(0, held, 64)
        ]
        light.train()
        return torch.stack(parts).mean(0)

    shown = "class early/final, patch early/final"
    print(
        f"held out before training ({shown}): {[round(v, 3) for v in held_out(average).tolist()]}", flush=True
    )
    clock = Clock(count // args.batch * args.batch * (args.epochs - start), "distil")
    weights = torch.tensor(args.loss_weights)
    step = start * (count // args.batch)
    for epoch in range(start, args.epochs):
        draw = np.random.default_rng((args.seed, epoch))
        running = torch.zeros(4)
        for seen, index in enumerate(batches(count, args.batch, args.seed, epoch), 1):
            rows = index + held
            picked, aim = images[rows], targets[rows]
            if draw.random() < 0.5:
                picked, aim = flipped(picked, aim)
            copy_down()
            parts = losses(light, normalised(picked).bfloat16(), aim)
            (parts * weights).sum().backward()
            for big, small in zip(heavy_list, light_list, strict=True):
                big.grad = None if small.grad is None else small.grad.float()
                small.grad = None
            nn.utils.clip_grad_norm_(heavy_list, 1.0, foreach=True)
            optimiser.step()
            schedule.step()
            step += 1
            rate = min(args.average, (1 + step) / (10 + step))
            with torch.no_grad():
                current = master.state_dict()
                torch._foreach_lerp_(list(average.values()), [current[k] for k in average], 1 - rate)
            if step % 100 == 0:
                ship()
            if step == args.stop_after:
                print(f"stopped after {step} of {steps} steps, held out: {held_out(average).tolist()}")
                return
            running += (parts.detach() - running) / min(seen, 50)
            clock.tick(len(index), f"epoch {epoch + 1} loss {[round(v, 3) for v in running.tolist()]}")
        figures = held_out(average)
        print(f"epoch {epoch + 1} held out ({shown}): {[round(v, 3) for v in figures.tolist()]}", flush=True)
        beside = checkpoint.with_suffix(".part")
        torch.save(
            {
                "settings": settings,
                "master": master.state_dict(),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
                "average": average,
                "epoch": epoch + 1,
            },
            beside,
        )
        beside.replace(checkpoint)
        ship()
        print(f"wrote {args.target} ({args.target.stat().st_size / 1e6:.1f} MB)", flush=True)


def cached(path: Path, build: Callable[[], Tensor]) -> Tensor:
    """Return the tensor stored at `path`, built and stored first where it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        torch.save(build(), beside)
        beside.replace(path)
    return torch.load(path, weights_only=True)


def build(args: argparse.Namespace) -> None:
    """Run the three stages."""
    began = time.monotonic()
    torch.manual_seed(args.seed)

    def views() -> Tensor:
        pictures, _ = read_clipart(args.assets, args.workers)
        print(f"{len(pictures)} pictures read, {time.monotonic() - began:.0f} s", flush=True)
        return compose(pictures, args.views, args.seed, args.workers)

    stem = f"{args.views}-{args.seed}"
    images = cached(args.work / f"views-{stem}.pt", views)
    print(f"{len(images)} views composed, {time.monotonic() - began:.0f} s", flush=True)
    teacher = read_teacher(args.assets)
    targets = cached(args.work / f"targets-{stem}.pt", lambda: all_targets(teacher, images))
    if args.epochs == 0:
        return
    student = new_backbone(num_classes=0)
    torch.manual_seed(args.seed)
    stored = args.work / f"initial-{stem}-{args.calibration}.pt"
    if stored.exists():
        student.load_state_dict(torch.load(stored, weights_only=True))
    else:
        initialise(student, teacher, normalised(images[args.held_out : args.held_out + args.calibration]))
        torch.save(student.state_dict(), stored)
    # the patch embedding is the teacher's own, projected: exact already, and the worst conditioned part
    student.patch_embed.requires_grad_(False)
    print(f"initial weights ready, {time.monotonic() - began:.0f} s", flush=True)
    distil(args, images, targets, student)
    print(f"done in {time.monotonic() - began:.0f} s")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("TOAST_ASSETS", Path.home() / ".cache" / "toast-assets"))
    parser.add_argument("--assets", type=Path, default=default)
    parser.add_argument(
        "--work", type=Path, default=Path.home() / ".cache" / "toast-build", help="views, checkpoint"
    )
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--views", type=int, default=18000)
    parser.add_argument("--held-out", type=int, default=512, help="views that are never trained on")
    parser.add_argument(
        "--calibration", type=int, default=768, help="views that the initial weights are fitted on"
    )
    parser.add_argument("--epochs", type=int, default=1, help="0 prepares views and targets and stops")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--stop-after",
        type=int,
        default=400,
        help="stop after this many steps, a multiple of 100; the rate's schedule is laid out for all epochs. "
        "0 runs them all",
    )
    parser.add_argument("--lr", type=float, default=4e-5)
    parser.add_argument("--map-lr", type=float, default=2e-4, help="learning rate of the maps to the targets")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument(
        "--average", type=float, default=0.99, help="decay of the exported average of the weights"
    )
    parser.add_argument("--loss-weights", type=float, nargs=4, default=[1.0, 1.0, 1.0, 1.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument(
        "--evaluate",
        nargs="?",
        const="all",
        choices=["all", "shipped"],
        help="measure the weights at --target and stop; `shipped` leaves the other models out",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.workers)
    if args.evaluate:
        evaluate(args.assets, args.target, others=args.evaluate == "all")
    else:
        build(args)


if __name__ == "__main__":
    main()
