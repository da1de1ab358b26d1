"""Measure the demonstration's backbone by linear probes and by where its attention goes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from teacher import read_teacher
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from views import SIDE, normalised

from toast.embedded.backbone import new_backbone
from toast.embedded.task import load_materials, load_task


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


def evaluate(assets: Path, target: Path, others: bool) -> None:
    """Print the table of figures of BACKBONE.md.

    Args:
        assets: Where the teacher is looked for; without one its row is left out.
        target: The weights to measure.
        others: Whether to measure random weights and the teacher beside them.
    """
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
    shipped.load_state_dict({k: v.float() for k, v in load_file(target).items()})
    models = {"this backbone": shipped}
    if others:
        models["random weights, same shape"] = fresh
    if others and (assets / "vit_small" / "model.safetensors").exists():
        models["the teacher"] = read_teacher(assets)

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
