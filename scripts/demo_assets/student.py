"""Compress the teacher into the initial weights of the demonstration's backbone, the student.

The student's residual stream is a linear projection of the teacher's; every block is refitted to it.
"""

from __future__ import annotations

import itertools
import math

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from toast.weight_selection import positions


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
            columns = positions([(big.attn.num_heads, torch.tensor(chosen)), (size, torch.arange(size))])
            w, b = ridge(outs[sample][:, columns], wanted[sample])
            error = float((outs[sample][:, columns] @ w.T + b - wanted[sample]).square().mean())
            if best is None or error < best[0]:
                best = (error, columns, w, b)
        columns = best[1]
        w, b = ridge(outs[:, columns], wanted)
        rows = positions([(3, torch.arange(3)), (big.attn.qkv.in_features, columns)])
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
