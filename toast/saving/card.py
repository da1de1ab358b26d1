"""The model card beside a saved adapter: PEFT's, with what finds the adapter on the Hub and loads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from toast.config import ToastConfig

PAPER = "2305.15542"
CARD = "README.md"

#: Where a backbone does not say what it was opened from.
_UNKNOWN = "...  # the model that the adapter was trained on"
_HEADING = "## How to load it"
_USAGE = """{heading}

```python
{opening}
import toast  # makes TOAST known to PEFT
from peft import PeftModel

backbone = {backbone}
adapter = "."  # this folder, or the name of its repository on the Hub
model = PeftModel.from_pretrained(backbone, adapter).eval()
```

"""
_TEXT = """---
{{}}
---

# {method} for {base}

An adapter of [Top-Down Attention Steering](https://arxiv.org/abs/{paper}) (TOAST).

{usage}"""


@dataclass(frozen=True)
class _Base:
    """What a card says of a backbone.

    Args:
        library: The library that opens it.
        opening: The import for that.
        code: The call; an ellipsis if it is not known.
        name: What it is called on the Hub; None if it is not from there.
    """

    library: str
    opening: str
    code: str
    name: str | None


@contextmanager
def completed(model: PeftModel, folder: Path) -> Iterator[None]:
    """Completes the card that PEFT writes or updates within; one that was there keeps its text and tags.

    Args:
        model: The wrapped model.
        folder: Where the card is.
    """
    path, base = folder / CARD, _base(model.get_base_model())
    usage = _USAGE.format(heading=_HEADING, opening=base.opening, backbone=base.code)
    if path.is_file():
        card = ModelCard.load(path)
        if _HEADING not in card.text:
            card.text = f"{card.text.rstrip()}\n\n{usage}"
    else:
        configs = model.peft_config.values()
        lite = any(isinstance(config, ToastConfig) and config.is_lite for config in configs)
        called = base.name or type(model.get_base_model()).__name__
        card = ModelCard(
            _TEXT.format(method="TOAST-Lite" if lite else "TOAST", base=called, paper=PAPER, usage=usage)
        )
    card.save(path)
    tags = {"peft", "toast", f"arxiv:{PAPER}", base.library, *(card.data.tags or ())}
    yield
    card = ModelCard.load(path)
    if base.name is not None:
        tags.add(f"base_model:adapter:{base.name}")
        card.data.base_model = base.name
    card.data.tags = sorted(tags.union(card.data.tags or ()))
    card.save(path)


def add_results(folder: Path, name: str, results: Sequence[EvalResult]) -> None:
    """Gives a card the figures of a run, as the Hub's model index; a folder without a card stays so.

    Args:
        folder: The adapter's folder.
        name: What the model is called there.
        results: The figures.
    """
    if results and (folder / CARD).is_file():
        card = ModelCard.load(folder / CARD)
        card.data.model_name, card.data.eval_results = name, list(results)
        card.save(folder / CARD)


def _base(model: nn.Module) -> _Base:
    if isinstance(model, PreTrainedModel):
        kind, place = type(model).__name__, model.config._name_or_path
        labels = f", num_labels={model.config.num_labels}" if kind.endswith("Classification") else ""
        return _Base(
            "transformers",
            f"from transformers import {kind}",
            f"{kind}.from_pretrained({place!r}{labels})" if place else _UNKNOWN,
            place if place and not Path(place).is_dir() else None,
        )
    settings = getattr(model, "pretrained_cfg", None) or {}
    name, file = settings.get("hf_hub_id"), settings.get("file")
    place = f"hf-hub:{name}" if name else f"local-dir:{file}" if file else None
    code = f"timm.create_model({place!r}, pretrained=True, num_classes={getattr(model, 'num_classes', None)})"
    library = "timm" if type(model).__module__.startswith("timm.") else "torch"
    return _Base(library, f"import {library}", code if place else _UNKNOWN, name)
