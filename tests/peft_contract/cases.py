"""The models and configurations that the checks run on."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

import toast
from tests import zoo
from tests.models import awaken
from toast.config import ToastConfig
from toast.layer import ToastLayer

DECODERS = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt-neox", "opt", "bloom", "falcon-7b",
]  # fmt: skip

#: Name -> row of the zoo, class of transformers (None is the row's own), kind of task.
BASES: dict[str, tuple[str, str | None, str | None]] = {
    **{name: (name, None, "CAUSAL_LM") for name in DECODERS},
    "bert": ("bert", "AutoModel", "FEATURE_EXTRACTION"),
    "roberta": ("roberta", "AutoModel", "FEATURE_EXTRACTION"),
    "modernbert": ("modernbert", "AutoModel", "FEATURE_EXTRACTION"),
    "bert-classifier": ("bert", None, "SEQ_CLS"),
    "llama-classifier": ("llama", "AutoModelForSequenceClassification", "SEQ_CLS"),
    "gpt2-classifier": ("gpt2", "AutoModelForSequenceClassification", "SEQ_CLS"),
    "timm-vit": ("timm-vit", None, None),
    "vit": ("vit", None, None),
}

VARIANTS: dict[str, dict[str, Any]] = {"full": {}, "lite": {"lora_rank": 2}, "partial": {"steer_from": 1}}

#: Of which models the head is trained too, where PEFT does not add it by itself.
HEADS = {"timm-vit": ["head"]}


@dataclass(frozen=True)
class Case:
    """One model with one configuration.

    Args:
        name: A key of `BASES`.
        variant: A key of `VARIANTS`.
    """

    name: str
    variant: str = "full"

    def __str__(self) -> str:
        return f"{self.name}-{self.variant}"

    @property
    def is_text(self) -> bool:
        return not zoo.ROWS[BASES[self.name][0]].picture

    @property
    def generates(self) -> bool:
        return BASES[self.name][2] == "CAUSAL_LM"

    def base(self, dtype: torch.dtype = torch.float32) -> Any:
        """A fresh model, always with the same weights."""
        row, auto, _ = BASES[self.name]
        return zoo.build(row, dtype, auto)

    def config(self, **options: Any) -> ToastConfig:
        task = BASES[self.name][2]
        own: dict[str, Any] = {"task_type": task, "modules_to_save": copy.copy(HEADS.get(self.name))}
        return ToastConfig(**(own | VARIANTS[self.variant] | options))

    def wrap(self, adapter_name: str = "default", **options: Any) -> Any:
        """A fresh model with a fresh adapter, in evaluation mode."""
        return peft.get_peft_model(self.base(), self.config(**options), adapter_name=adapter_name).eval()

    def steered(self, adapter_name: str = "default", **options: Any) -> Any:
        """The same with an adapter that changes the output."""
        return copy.deepcopy(_steered(self, adapter_name, tuple(options.items())))

    def inputs(self, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            return zoo.example(BASES[self.name][0], batch, dtype)


@functools.cache
def _steered(case: Case, adapter_name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    model = awaken(case.wrap(adapter_name, **dict(options)))
    toast.calibrate(model, **case.inputs())  # from a random start, tokens may all be cut off
    return model


CASES = [Case(name, variant) for name in BASES for variant in VARIANTS]

#: Every model, with one variant each: for what depends on the model and on the variant, but not on both.
EACH = [Case(name, [*VARIANTS][number % len(VARIANTS)]) for number, name in enumerate(BASES)]

#: For what does not depend on the family: a language model and a timm model with a head of its own.
FEW = [Case(name, variant) for name in ("llama", "timm-vit") for variant in VARIANTS]


def run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The logits, or the features of a model without a head."""
    found = model(**inputs)
    return found if isinstance(found, Tensor) else found[0]


def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return run(model, inputs)


def layers(model: nn.Module) -> list[ToastLayer]:
    return [module for module in model.modules() if isinstance(module, ToastLayer)]


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def of_adapter(model: nn.Module, adapter: str = "default") -> set[str]:
    """Names of the parameters that an adapter trains when it is active, modules to save included."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, ToastLayer) and adapter in module.configs:
            trained = {
                id(p)
                for group, p in module.groups(adapter)
                if group in module.configs[adapter].trained_groups
            }
            found |= {f"{name}.{key}" for key, p in module.named_parameters() if id(p) in trained}
        elif isinstance(module, peft.utils.ModulesToSaveWrapper) and adapter in module.modules_to_save:
            found |= {
                f"{name}.modules_to_save.{adapter}.{key}"
                for key, _ in module.modules_to_save[adapter].named_parameters()
            }
    return found
