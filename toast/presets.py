"""The official variants of TOAST, as settings of `ToastConfig`; no import of PEFT, which takes seconds."""

from __future__ import annotations

from typing import Any

#: What the official implementation trains in the tuning stage; the head is `modules_to_save`.
OFFICIAL: dict[str, dict[str, Any]] = {
    "vision": {
        "train": ["task_embedding", "to_state", "to_signal"],
        "select_features": "normed",
        "value_bias": "twice",
        "reconstruction_form": "official",
        "reconstruction_weight": 0.1,
    },
    "language": {
        "train": ["task_embedding", "to_signal"],
        "select_features": "unnormed",
        "reconstruction_form": "official",
        "reconstruction_weight": 1.0,
        "reconstruction_scale": 0.1,
    },
    "convnext": {
        "train": ["task_embedding", "to_state", "to_signal"],
        "select_features": "mixed",
        "value_bias": "once",
        "reconstruction_form": "official",
        "reconstruction_weight": 0.01,
    },
}
OFFICIAL["vision-lite"] = OFFICIAL["vision"] | {
    "train": ["task_embedding", "channel_transform", "lora"],
    "lora_rank": 4,
    "lora_alpha": 1.0,
}
OFFICIAL["language-lite"] = OFFICIAL["language"] | {
    "train": ["task_embedding", "lora"],
    "lora_rank": 4,
    "lora_alpha": 1.0,
}
# No official TOAST-Lite of ConvNeXt is known: trained is what the vision variant trains.
OFFICIAL["convnext-lite"] = OFFICIAL["convnext"] | {
    "train": ["task_embedding", "channel_transform", "lora"],
    "lora_rank": 4,
    "lora_alpha": 1.0,
}
