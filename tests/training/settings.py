"""Small settings, pictures and models on which a whole run takes a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from toast.training.config_files import make_config
from toast.training.run_config import RunConfig

#: A ViT of three blocks of width 24 on pictures of 16 pixels.
TINY_VIT: dict[str, Any] = {
    "library": "timm",
    "name": "vit_tiny_patch16_224",
    "pretrained": False,
    "options": {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3},
}
#: A ResNet of four blocks on pictures of 32 pixels.
TINY_RESNET: dict[str, Any] = {
    "library": "timm",
    "name": "resnet10t",
    "pretrained": False,
    "options": {"channels": [8, 8, 16, 16], "pretrained_cfg_overlay": {"input_size": [3, 32, 32]}},
}
SENTENCES = [
    "the cook cuts the leek and salts the soup",
    "a spoon of oil warms in the pan",
    "the bread rises for an hour near the oven",
    "stir the rice until the water is gone",
]


def write_pictures(root: Path, train: int = 24, test: int = 8, side: int = 20) -> Path:
    """Writes pictures of three classes, each with a tint of its own, as an image folder."""
    draw = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for index in range(count):
            label = index % 3
            pixels = draw.integers(0, 90, (side, side, 3))
            pixels[..., label] += 120
            place = root / split / f"class{label}" / f"{index:03d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(place)
    return root


def vision(tmp: Path, **settings: Any) -> RunConfig:
    """Returns a run over such pictures; dotted settings are given with two underscores."""
    pictures = tmp / "pictures"
    if not pictures.is_dir():
        write_pictures(pictures)
    base = {
        "name": "run",
        "out": str(tmp / "runs"),
        "model": TINY_VIT,
        "data": {"source": "folder", "root": str(pictures), "test": "test"},
        "optimizer": {"learning_rate": 1e-2},
        "batch_size": 8,
        "epochs": 2,
        "trackers": [],
    }
    return make_config(base, [(name.replace("__", "."), value) for name, value in settings.items()])


def write_language_model(place: Path, **sizes: Any) -> Path:
    """Writes a random Llama of two blocks, or of other sizes, with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + index for index, letter in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=words, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(place)
    options = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=2, **(options | sizes)
    )
    LlamaForCausalLM(config).save_pretrained(place)
    return place


def language(tmp: Path, **settings: Any) -> RunConfig:
    """Returns a run over a few sentences."""
    model = tmp / "model"
    if not model.is_dir():
        write_language_model(model)
    text = tmp / "text.jsonl"
    text.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in SENTENCES * 4))
    base = {
        "name": "run",
        "task": "language",
        "out": str(tmp / "runs"),
        "model": {"library": "transformers", "name": str(model)},
        "data": {"source": "text", "root": str(text), "block": 32, "packing": "none", "test_share": 0.25},
        "optimizer": {"learning_rate": 1e-2},
        "batch_size": 4,
        "epochs": 2,
        "trackers": [],
    }
    return make_config(base, [(name.replace("__", "."), value) for name, value in settings.items()])


def losses(folder: Path, split: str = "train") -> list[float]:
    """Returns the losses that a run has written, in order."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == split]


def instructions(tmp: Path, **settings: Any) -> RunConfig:
    """Returns a run over a few instructions, whose answers are lists of two things."""
    rows = [
        {"instruction": sentence, "output": "\n".join(f"- {word}" for word in sentence.split()[1:3])}
        for sentence in SENTENCES * 4
    ]
    file = tmp / "instructions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = tmp / "plain.jinja"
    template.write_text(
        "{{ messages[0].content }}:{% generation %}{{ messages[1].content }}</s>{% endgeneration %}"
    )
    data = {"source": "alpaca", "root": str(file), "template": str(template), "block": 64}
    return language(tmp, **{f"data__{name}": value for name, value in data.items()}, **settings)
