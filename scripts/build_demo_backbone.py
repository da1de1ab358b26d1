#!/usr/bin/env python3
"""Build the demonstration's backbone: a ViT of tiny size distilled from a ViT-S/14 teacher on clip-art.

    python scripts/build_demo_backbone.py                # distil, write the weights
    python scripts/build_demo_backbone.py --evaluate     # measure them, print the table of BACKBONE.md

Expected layout of `--assets` (default: $TOAST_ASSETS, else ~/.cache/toast-assets):

    vit_small/model.safetensors      the teacher, timm names, positions for a 37 x 37 grid
    openclipart/<folder>/**/*.png    the pictures
    fashion_mnist/*.gz               IDX files; read by --evaluate alone, never by the distillation

The stages of a build, of which the first two are kept in `--work` and used again:

1. Views. Clip-art is composed on plain, noisy, graded or collage grounds, one large picture or several
   small ones per canvas, and the teacher's final and earlier tokens are computed once for every view.
2. Initial weights. The student's residual stream is the teacher's, projected on its leading principal
   components; block by block, heads and hidden units are selected and the output maps are refitted by
   ridge regression against the teacher's stream.
3. Distillation. The student's tokens, through linear maps that are thrown away afterwards, regress the
   standardised teacher tokens. An exponential average of the weights is exported after every epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from toast.demo.backbone import ARCHITECTURE, MEAN, STD, new_backbone

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "toast" / "demo" / "assets" / "backbone.safetensors"
SIDE = 112
EARLY = 10  # the teacher's early target is the output of this many blocks
PICTURE_SIDE = 128
MAX_PIXELS = 4_000_000
MAX_PER_FOLDER = 160
Image.MAX_IMAGE_PIXELS = None  # the largest pictures are skipped by their header


# ---------------------------------------------------------------------------------------------- pictures


def read_picture(path: Path) -> np.ndarray | None:
    """Read one clip-art as RGBA, cropped to what is visible, its longer side at most PICTURE_SIDE."""
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS or min(opened.size) < 16:
                return None
            picture = opened.convert("RGBA")
    except (OSError, ValueError):
        return None
    box = picture.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    if max(picture.size) > 5 * min(picture.size):
        return None
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def read_clipart(assets: Path, workers: int) -> tuple[list[np.ndarray], list[str]]:
    """Read the clip-art, without copies, at most MAX_PER_FOLDER of a folder; also the folder names."""
    root = assets / "openclipart"
    folders: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.png")):
        folders.setdefault(str(path.parent.relative_to(root)), []).append(path)
    if not folders:
        raise SystemExit(f"no pictures under {root}")
    draw = np.random.default_rng(0)
    chosen = []
    for name, paths in sorted(folders.items()):
        keep = draw.permutation(len(paths))[:MAX_PER_FOLDER]
        chosen += [(name, paths[i]) for i in sorted(keep)]
    pictures, names, seen = [], [], set()
    with ProcessPoolExecutor(workers) as pool:
        loaded = pool.map(read_picture, [path for _, path in chosen], chunksize=32)
        for (name, _), picture in zip(chosen, loaded, strict=True):
            if picture is None:
                continue
            digest = hashlib.sha256(picture.tobytes()).digest()
            if digest not in seen:
                seen.add(digest)
                pictures.append(picture)
                names.append(name)
    return pictures, names


def jitter(picture: Image.Image, draw: np.random.Generator, gray: float) -> Image.Image:
    """Change the colours of an RGBA picture at random; with probability `gray` make it a tinted gray."""
    values = np.asarray(picture).astype(np.float32)
    colour, alpha = values[..., :3], values[..., 3:]
    if draw.random() < gray:
        colour = colour.mean(-1, keepdims=True) * (
            draw.uniform(0.35, 1.0, 3) if draw.random() < 0.6 else np.ones(3)
        )
    elif draw.random() < 0.3:
        colour = colour[..., draw.permutation(3)]
    if draw.random() < 0.08:
        colour = 255 - colour
    if draw.random() < 0.5:
        colour = (colour - 128) * draw.uniform(0.6, 1.3) + 128 + draw.uniform(-40, 40)
    out = np.concatenate([colour.clip(0, 255), alpha], -1)
    return Image.fromarray(out.astype(np.uint8), "RGBA")


def ground(pictures: list[np.ndarray], draw: np.random.Generator) -> Image.Image:
    """Draw a ground of SIDE x SIDE pixels: plain, noisy, graded, or a dimmed collage of clip-art."""
    kind = draw.random()
    base = draw.uniform(0, 255, 3)
    if draw.random() < 0.3:
        base = np.full(3, draw.choice([0.0, 128.0, 255.0, draw.uniform(0, 255)]))
    field = np.broadcast_to(base, (SIDE, SIDE, 3)).astype(np.float32)
    if kind < 0.35:
        return Image.fromarray(field.astype(np.uint8))
    if kind < 0.6:
        cells = int(draw.integers(3, 40))
        coarse = draw.normal(0, draw.uniform(5, 40), (cells, cells, 3 if draw.random() < 0.5 else 1))
        coarse = np.broadcast_to(coarse, (cells, cells, 3))
        shifted = np.stack(
            [
                np.asarray(Image.fromarray(coarse[..., c].astype(np.float32)).resize((SIDE, SIDE), 3))
                for c in range(3)
            ],
            -1,
        )
        return Image.fromarray((field + shifted).clip(0, 255).astype(np.uint8))
    if kind < 0.78:
        other = draw.uniform(0, 255, 3)
        angle = draw.uniform(0, 2 * math.pi)
        rows, columns = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1) - 0.5
        share = (0.5 + 0.7 * (rows * math.sin(angle) + columns * math.cos(angle))).clip(0, 1)[..., None]
        return Image.fromarray((field * (1 - share) + other * share).astype(np.uint8))
    canvas = Image.fromarray(field.astype(np.uint8))
    for _ in range(int(draw.integers(2, 7))):
        paste(canvas, pictures, draw, draw.uniform(40, 150), gray=0.3)
    return Image.blend(canvas, Image.fromarray(field.astype(np.uint8)), draw.uniform(0.2, 0.7))


def paste(
    canvas: Image.Image,
    pictures: list[np.ndarray],
    draw: np.random.Generator,
    side: float,
    gray: float,
    centre: tuple[float, float] | None = None,
) -> None:
    """Paste one random clip-art, `side` pixels long, on the canvas; it may hang over an edge."""
    picture = Image.fromarray(pictures[int(draw.integers(len(pictures)))])
    scale = side / max(picture.size)
    stretch = math.exp(draw.uniform(-0.2, 0.2))
    size = (max(4, round(picture.width * scale * stretch)), max(4, round(picture.height * scale / stretch)))
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    if draw.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw.random() < 0.3:
        picture = picture.rotate(draw.uniform(-30, 30), Image.Resampling.BILINEAR, expand=True)
    picture = jitter(picture, draw, gray)
    x, y = centre or (draw.uniform(0, SIDE), draw.uniform(0, SIDE))
    canvas.paste(picture, (round(x - picture.width / 2), round(y - picture.height / 2)), picture)


def view(pictures: list[np.ndarray], draw: np.random.Generator) -> np.ndarray:
    """Compose one view, uint8 (3, SIDE, SIDE)."""
    canvas = ground(pictures, draw)
    if draw.random() < 0.4:
        centre = (SIDE / 2 + draw.normal(0, 14), SIDE / 2 + draw.normal(0, 14))
        paste(canvas, pictures, draw, SIDE * draw.uniform(0.4, 1.25), gray=0.25, centre=centre)
    else:
        places = [(x, y) for x in (22, 56, 90) for y in (22, 56, 90)]
        for place in draw.permutation(len(places))[: int(draw.integers(2, 7))]:
            x, y = places[int(place)]
            centre = (x + draw.normal(0, 8), y + draw.normal(0, 8))
            paste(canvas, pictures, draw, draw.uniform(22, 58), gray=0.25, centre=centre)
    if draw.random() < 0.1:
        canvas = canvas.convert("L").convert("RGB")
    if draw.random() < 0.1:
        canvas = canvas.filter(ImageFilter.GaussianBlur(draw.uniform(0.4, 1.2)))
    out = np.asarray(canvas).transpose(2, 0, 1)
    if draw.random() < 0.2:
        out = (out + draw.normal(0, draw.uniform(2, 12), out.shape)).clip(0, 255)
    return out.astype(np.uint8)


_shared: list[np.ndarray] = []


def _share(pictures: list[np.ndarray]) -> None:
    _shared[:] = pictures


def _views(job: tuple[int, int, int]) -> np.ndarray:
    seed, chunk, count = job
    draw = np.random.default_rng((seed, chunk))
    return np.stack([view(_shared, draw) for _ in range(count)])


def compose(pictures: list[np.ndarray], count: int, seed: int, workers: int) -> Tensor:
    """Compose `count` views, uint8 (count, 3, SIDE, SIDE), the same for any number of workers."""
    chunk = 200
    jobs = [(seed, start, min(chunk, count - start)) for start in range(0, count, chunk)]
    with ProcessPoolExecutor(workers, initializer=_share, initargs=(pictures,)) as pool:
        return torch.from_numpy(np.concatenate(list(pool.map(_views, jobs))))


def normalised(images: Tensor) -> Tensor:
    """Turn uint8 pictures (n, 3, h, w) into normalised float32."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


# ----------------------------------------------------------------------------------------------- teacher


def read_teacher(assets: Path) -> VisionTransformer:
    """Load the ViT-S/14 teacher at SIDE pixels, float32, frozen."""
    model = timm.create_model(
        "vit_small_patch14_dinov2.lvd142m", pretrained=False, img_size=SIDE, num_classes=0
    )
    state = {k: v.float() for k, v in load_file(assets / "vit_small" / "model.safetensors").items()}
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [SIDE // 14] * 2, num_prefix_tokens=1)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def teacher_tokens(teacher: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the teacher's early and final tokens, both through the final norm, (n, tokens, width)."""
    x = teacher._pos_embed(teacher.patch_embed(images))
    early = x
    for index, block in enumerate(teacher.blocks):
        x = block(x)
        if index + 1 == EARLY:
            early = x
    return teacher.norm(early), teacher.norm(x)


def all_targets(teacher: VisionTransformer, images: Tensor, batch: int = 64) -> Tensor:
    """Compute the targets of all views, float16 (n, tokens, 2 * width): early, then final."""
    light = teacher.bfloat16()
    width, tokens = teacher.embed_dim, teacher.pos_embed.shape[1]
    out = torch.empty(len(images), tokens, 2 * width, dtype=torch.float16)
    clock = Clock(len(images), "targets")
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            part = normalised(images[start : start + batch]).bfloat16()
            out[start : start + batch] = torch.cat(teacher_tokens(light, part), -1).half()
            clock.tick(len(part))
    teacher.float()
    return out


class Clock:
    """Prints progress with the time left, at most every `every` seconds."""

    def __init__(self, total: int, name: str, every: float = 30.0) -> None:
        self.total, self.name, self.every = total, name, every
        self.done, self.start, self.last = 0, time.monotonic(), time.monotonic()

    def tick(self, count: int, note: str = "") -> None:
        """Count `count` more as done and print where it is time to."""
        self.done += count
        now = time.monotonic()
        if now - self.last >= self.every or self.done >= self.total:
            rate = self.done / (now - self.start)
            left = (self.total - self.done) / rate
            print(
                f"{self.name}: {self.done}/{self.total}  {rate:.0f}/s  {left:.0f} s left  {note}", flush=True
            )
            self.last = now


# ---------------------------------------------------------------------------------------- initial weights


def ridge(inputs: Tensor, targets: Tensor, strength: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Fit targets = inputs @ weight.T + bias; return (weight, bias)."""
    mean_in, mean_out = inputs.mean(0), targets.mean(0)
    a, b = inputs - mean_in, targets - mean_out
    gram = a.T @ a
    gram.diagonal().add_(strength * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, a.T @ b).T
    return weight, mean_out - weight @ mean_in


def heads_out(block: nn.Module, x: Tensor) -> Tensor:
    """Return the heads' outputs before the output map, (n, tokens, heads * head size)."""
    attn = block.attn
    n, tokens, _ = x.shape
    q, k, v = attn.qkv(x).reshape(n, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    out = functional.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(n, tokens, -1)


def projection(streams: list[Tensor], width: int) -> Tensor:
    """Return the map (width, teacher width) onto the leading directions of the centred, normed streams.

    The student's stream must have zero mean over its channels, so that its layer norm removes nothing:
    the map's range is the complement of the all-ones direction.
    """
    teacher_width = streams[0].shape[-1]
    centre = torch.eye(teacher_width) - 1 / teacher_width
    cov = torch.zeros(teacher_width, teacher_width)
    for stream in streams:
        unit = functional.layer_norm(stream, (teacher_width,))
        # there are 64 patch tokens for one class token, yet the class token is what is read out
        for part, weight in ((unit[:, :1], 0.3), (unit[:, 1:], 0.7)):
            flat = part.reshape(-1, teacher_width)
            cov += weight * flat.T @ flat / len(flat)
    values, vectors = torch.linalg.eigh(cov)
    print(f"initial: {values[-(width - 1) :].sum() / values.sum():.3f} of the stream's energy is kept")
    # a reflection that takes the last axis to the all-ones direction leaves the other axes nearly in place
    mirror = torch.full((width,), -1 / math.sqrt(width))
    mirror[-1] += 1
    mirror /= mirror.norm()
    basis = (torch.eye(width) - 2 * torch.outer(mirror, mirror))[:, :-1]
    # early in the teacher the stream is small; at this scale a step of the optimiser is small beside it
    return 10 * basis @ vectors[:, 1 - width :].T @ centre


def whiten(norm: nn.LayerNorm, stream: Tensor) -> None:
    """Set a layer norm's gain and offset so that every channel of its output has mean 0 and variance 1.

    The maps that follow undo it; what is won is that one learning rate suits all of their inputs.
    """
    out = functional.layer_norm(stream, norm.normalized_shape, eps=norm.eps).flatten(0, 1)
    norm.weight.copy_(1 / out.std(0))
    norm.bias.copy_(-out.mean(0) / out.std(0))


def write_out(linear: nn.Linear, scale: nn.Parameter, weight: Tensor, bias: Tensor) -> None:
    """Set an output map and its layer scale so that all rows of the map are of one size."""
    size = weight.square().mean(1).sqrt() / 0.05
    scale.copy_(size)
    linear.weight.copy_(weight / size[:, None])
    linear.bias.copy_(bias / size)


@torch.inference_mode()
def initialise(student: VisionTransformer, teacher: VisionTransformer, images: Tensor) -> None:
    """Compress the teacher into the student, block by block, on calibration images (n, 3, SIDE, SIDE).

    Every refit sees the student's own stream, so a later block also mends what earlier blocks lost.
    """
    heads, size = student.blocks[0].attn.num_heads, student.blocks[0].attn.head_dim
    hidden = student.blocks[0].mlp.fc1.out_features
    x = teacher._pos_embed(teacher.patch_embed(images))
    streams, walk = [x], x
    for block in teacher.blocks:
        walk = block(walk)
        streams.append(walk)
    down = projection(streams, student.embed_dim)
    del streams, walk

    student.patch_embed.proj.weight.copy_(
        torch.einsum("st,tchw->schw", down, teacher.patch_embed.proj.weight)
    )
    student.patch_embed.proj.bias.copy_(down @ teacher.patch_embed.proj.bias)
    student.cls_token.copy_(teacher.cls_token @ down.T)
    student.pos_embed.copy_(teacher.pos_embed @ down.T)
    y = x @ down.T

    for index, (big, small) in enumerate(zip(teacher.blocks, student.blocks, strict=True)):
        # attention: the kept heads read the student's stream through the best linear decoding
        whiten(small.norm1, y)
        normed = big.norm1(x)
        decode, offset = ridge(small.norm1(y).flatten(0, 1), normed.flatten(0, 1))
        after = x + big.ls1(big.attn.proj(heads_out(big, normed)))
        wanted = (after @ down.T - y).flatten(0, 1)
        weight, bias = big.attn.qkv.weight @ decode, big.attn.qkv.weight @ offset + big.attn.qkv.bias
        wide = nn.Module()
        wide.attn = nn.Module()
        wide.attn.num_heads = big.attn.num_heads
        wide.attn.qkv = nn.Linear(weight.shape[1], weight.shape[0])
        wide.attn.qkv.weight.copy_(weight)
        wide.attn.qkv.bias.copy_(bias)
        outs = heads_out(wide, small.norm1(y)).flatten(0, 1)
        best: tuple[float, Tensor, Tensor, Tensor] | None = None
        sample = torch.randperm(len(outs))[:6000]
        for chosen in itertools.combinations(range(big.attn.num_heads), heads):
            columns = torch.cat([torch.arange(h * size, (h + 1) * size) for h in chosen])
            w, b = ridge(outs[sample][:, columns], wanted[sample])
            error = float((outs[sample][:, columns] @ w.T + b - wanted[sample]).square().mean())
            if best is None or error < best[0]:
                best = (error, columns, w, b)
        columns = best[1]
        w, b = ridge(outs[:, columns], wanted)
        rows = torch.cat([columns + part * big.attn.qkv.in_features for part in range(3)])
        small.attn.qkv.weight.copy_(weight[rows])
        small.attn.qkv.bias.copy_(bias[rows])
        write_out(small.attn.proj, small.ls1.gamma, w, b)
        y, x = y + small.ls1(small.attn.proj(outs[:, columns])).view_as(y), after

        # feed-forward: the units that carry most energy into the student's stream are kept
        whiten(small.norm2, y)
        normed = big.norm2(x)
        decode, offset = ridge(small.norm2(y).flatten(0, 1), normed.flatten(0, 1))
        after = x + big.ls2(big.mlp(normed))
        wanted = (after @ down.T - y).flatten(0, 1)
        weight, bias = big.mlp.fc1.weight @ decode, big.mlp.fc1.weight @ offset + big.mlp.fc1.bias
        outs = functional.gelu(functional.linear(small.norm2(y), weight, bias)).flatten(0, 1)
        reach = (down @ (big.ls2.gamma[:, None] * big.mlp.fc2.weight)).norm(dim=0)
        columns = (outs.std(0) * reach).topk(hidden).indices.sort().values
        w, b = ridge(outs[:, columns], wanted)
        small.mlp.fc1.weight.copy_(weight[columns])
        small.mlp.fc1.bias.copy_(bias[columns])
        write_out(small.mlp.fc2, small.ls2.gamma, w, b)
        y, x = y + small.ls2(small.mlp.fc2(outs[:, columns])).view_as(y), after
        share = (y - x @ down.T).square().sum() / (x @ down.T).square().sum()
        print(f"initial: block {index}: error {share:.3f} of the stream's energy", flush=True)
    whiten(student.norm, y)


# ------------------------------------------------------------------------------------------- distillation


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


# ---------------------------------------------------------------------------------------------- evaluation


def class_features(model: VisionTransformer, images: Tensor) -> Tensor:
    """Return the final-normed class tokens of uint8 pictures, float32 (n, width)."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        parts = [model.forward_features(normalised(part))[:, 0] for part in images.split(50)]
    return torch.cat(parts).float()


def probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Fit a linear classifier on features; its penalty is chosen on a fifth of the training rows.

    Returns:
        The share of test rows that are classified correctly.
    """
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    classes = int(train_labels.max()) + 1

    def fit(x: Tensor, y: Tensor, penalty: float) -> nn.Linear:
        model = nn.Linear(x.shape[1], classes)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        optimiser = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = functional.cross_entropy(model(x), y) + penalty * model.weight.square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        return model

    def accuracy(model: nn.Linear, x: Tensor, y: Tensor) -> float:
        with torch.inference_mode():
            return float((model(x).argmax(1) == y).float().mean())

    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]
    scores = {
        penalty: accuracy(fit(train[kept], train_labels[kept], penalty), train[held], train_labels[held])
        for penalty in (1e-4, 1e-3, 1e-2, 1e-1)
    }
    return accuracy(fit(train, train_labels, max(scores, key=lambda p: scores[p])), test, test_labels)


def attention_on_target(model: VisionTransformer, images: Tensor, boxes: Tensor) -> float:
    """Return the mean share of the last block's class-token attention over patches that falls in the box.

    Args:
        model: The backbone.
        images: uint8 (n, 3, SIDE, SIDE).
        boxes: int64 (n, 4), x0, y0, x1, y1 in pixels. A patch that is partly in the box counts in part.
    """
    grid = SIDE // 14
    edges = torch.arange(grid) * 14
    along = (torch.minimum(boxes[:, 2:, None], edges + 14) - torch.maximum(boxes[:, :2, None], edges)).clamp(
        min=0
    ) / 14
    inside = (along[:, 1, :, None] * along[:, 0, None, :]).flatten(1)
    shares = []
    attn = model.blocks[-1].attn
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for part, cover in zip(images.split(100), inside.split(100), strict=True):
            x = model._pos_embed(model.patch_embed(normalised(part)))
            for block in model.blocks[:-1]:
                x = block(x)
            n, tokens, _ = x.shape
            qkv = attn.qkv(model.blocks[-1].norm1(x)).reshape(n, tokens, 3, attn.num_heads, -1)
            q, k = qkv[:, :1, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
            weights = (q @ k.transpose(-1, -2) * attn.scale).float().softmax(-1)[:, :, 0, 1:]
            weights = weights / weights.sum(-1, keepdim=True)
            shares.append((weights.mean(1) * cover).sum(1))
    return float(torch.cat(shares).mean())


def evaluate(args: argparse.Namespace) -> None:
    """Print the table of figures of BACKBONE.md."""
    from toast.demo.task import load_materials, load_task

    materials = load_materials()
    train, test = load_task(2000, 1000, 0)

    def centred(items: Tensor) -> Tensor:
        large = functional.interpolate(items[:, None].float(), SIDE, mode="bilinear", antialias=True)
        return large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)

    def sprites(*splits: str) -> tuple[Tensor, Tensor]:
        images, labels = [], []
        for split in splits:
            for sprite in materials.sprites[split]:
                canvas = Image.new("RGB", (SIDE, SIDE), (160, 160, 160))
                scale = 84 / max(sprite.size)
                large = sprite.resize((round(sprite.width * scale), round(sprite.height * scale)))
                canvas.paste(large, ((SIDE - large.width) // 2, (SIDE - large.height) // 2), large)
                images.append(torch.from_numpy(np.array(canvas)).permute(2, 0, 1))
            labels.append(materials.sprite_folders[split])
        return torch.stack(images), torch.cat(labels)

    sets = {
        "demonstration task": (train.images, train.labels, test.images, test.labels),
        "centred items": (
            centred(materials.items["train"][:2000]),
            materials.labels["train"][:2000],
            centred(materials.items["test"]),
            materials.labels["test"],
        ),
        "clip-art folder": (*sprites("pretune", "train"), *sprites("test")),
    }
    torch.manual_seed(0)
    fresh = new_backbone(num_classes=0).eval()
    shipped = new_backbone(num_classes=0).eval()
    shipped.load_state_dict({k: v.float() for k, v in load_file(args.target).items()})
    models = {"this backbone": shipped}
    if args.evaluate == "all":
        models["random weights, same shape"] = fresh
    if args.evaluate == "all" and (args.assets / "vit_small" / "model.safetensors").exists():
        models["the teacher"] = read_teacher(args.assets)

    print("| features | " + " | ".join(sets) + " | attention on target |")
    print("|---|" + "---|" * (len(sets) + 1))
    for name, model in models.items():
        scores = [
            probe(class_features(model, a), la, class_features(model, b), lb)
            for a, la, b, lb in sets.values()
        ]
        on_target = attention_on_target(model, test.images, test.boxes)
        print(f"| {name} | " + " | ".join(f"{s:.3f}" for s in scores) + f" | {on_target:.3f} |", flush=True)

    def pixels(images: Tensor) -> Tensor:
        return functional.avg_pool2d(images.float(), 4).flatten(1)

    scores = [probe(pixels(a), la, pixels(b), lb) for a, la, b, lb in sets.values()]
    print("| pixels, 28 x 28 x 3 | " + " | ".join(f"{s:.3f}" for s in scores) + " | |")
    width, height = (test.boxes[:, 2:] - test.boxes[:, :2]).unbind(1)
    area = float((width * height / SIDE**2).mean())
    print(f"box's share of the area: {area:.3f}; chance: 0.100, 0.100, {1 / len(materials.folders):.3f}")


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
    evaluate(args) if args.evaluate else build(args)


if __name__ == "__main__":
    main()
