"""What each method makes of a backbone: which modules are added, what is trained, how it is kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from torch import Tensor, nn

from toast.baselines import applying as baselines
from toast.baselines.heads import head_of
from toast.config import ToastConfig
from toast.presets import OFFICIAL
from toast.rates import Groups, trained_groups
from toast.saving.contents import save_adapter
from toast.training.backbones import Backbone
from toast.training.method_config import MethodConfig
from toast.training.method_table import names_of
from toast.training.run_config import RunConfig
from toast.training.run_folder import ADAPTER_CONFIG
from toast.training.starting import as_adapter, start_lora
from toast.wrapping import wrap


@dataclass
class Tuned:
    """A backbone with what is trained.

    Args:
        model: The model to call.
        groups: Trained parameters by group.
        head_name: Name of the head in the backbone; None if it has none.
    """

    model: nn.Module
    groups: Groups
    head_name: str | None


def apply_method(
    backbone: Backbone, config: RunConfig, stage: str, folder: Path | None = None, empty: bool = False
) -> Tuned:
    """Makes a backbone one that the configured method trains.

    Args:
        backbone: The backbone; it is changed in place.
        config: The run's configuration.
        stage: `pretune` or `tune`; the former trains the whole top-down module.
        folder: Where an official checkpoint that is started from is imported to.
        empty: Whether another process sends all values.

    Raises:
        ValueError: If the method does not fit the model or the stage.
    """
    method = config.method
    if stage == "pretune" and not method.row.pretunes:
        able = names_of(lambda row: row.pretunes)
        raise ValueError(f"method: pre-tuning trains the whole top-down module, {able}; got {method.name!r}.")
    backbone.model.requires_grad_(False)
    head_name, head = head_of(backbone.model)
    if method.head_bias is not None:
        _set_bias(head, method.head_bias)
    trains_head = method.head
    if trains_head is None:
        trains_head = config.task == "vision" or bool(config.heads) or method.row.trains_head_on_text
    with init_empty_weights(include_buffers=False) if empty else nullcontext():
        model, named = _PUT_IN[method.row.puts_in](
            backbone, config, head_name if trains_head else None, folder
        )
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    if empty:
        _take_values(model)
    by_name = {name: group for group, names in named.items() for name in names}
    groups = trained_groups(model, by_name)
    if not groups:
        raise ValueError(f"method: {method.name} leaves nothing to train in {type(model).__name__}.")
    return Tuned(model, groups, head_name)


def _take_values(model: nn.Module) -> None:
    """Leaves frozen parameters on the meta device, and trained ones memory that nothing is written to yet.

    Accelerate tells the parameters that the optimiser holds apart by where they lie.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and old not in made:
                empty = torch.empty_like(old, device="cpu" if old.requires_grad else "meta")
                made[old] = nn.Parameter(empty, old.requires_grad)
            if old is not None:
                module._parameters[name] = made[old]


def _set_bias(head: nn.Module, value: float) -> None:
    bias: nn.Parameter | None = getattr(head, "bias", None)
    if bias is None:
        raise ValueError(f"method.head_bias: {type(head).__name__} has no bias.")
    nn.init.constant_(bias, value)


_Made = tuple[nn.Module, dict[str, list[str]]]


def _toast(backbone: Backbone, config: RunConfig, head: str | None, folder: Path | None) -> _Made:
    method = config.method
    options = toast_options(method)
    if config.reconstruction_weight is not None:
        options["reconstruction_weight"] = config.reconstruction_weight
    if head is not None:
        options["modules_to_save"] = [head]
    start = None if method.start is None else as_adapter(method.start, folder)
    if start is not None:
        saved = ToastConfig.from_pretrained(str(start))
        if saved.is_lite:
            if method.row.rank is None:
                raise ValueError(f"method.start: {start} is a TOAST-Lite adapter; needs method toast-lite.")
            return PeftModel.from_pretrained(backbone.model, str(start), is_trainable=True), {}
        options["pretrained"] = str(start)
        for name in ("select_features", "select_from", "value_bias"):
            if name not in method.options:  # feedback learnt on some features is no use on others
                options[name] = getattr(saved, name)
    return wrap(backbone.model, **options), {}


def toast_options(method: MethodConfig) -> dict[str, Any]:
    """Returns the fields of `ToastConfig` that a method's section stands for."""
    options: dict[str, Any] = {}
    if method.preset is not None:
        options = {"init": "official"} | OFFICIAL[method.preset]
    options |= method.options
    if method.row.rank is not None:
        options["lora_rank"] = method.rank or options.get("lora_rank") or method.row.rank
    if method.train is not None:
        options["train"] = method.train
    return options


def _lora(backbone: Backbone, config: RunConfig, head: str | None, folder: Path | None) -> _Made:
    from peft import LoraConfig, get_peft_model

    rank = config.method.rank or config.method.row.rank
    options: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": _attention(backbone.model)}
    if head is not None:
        options["modules_to_save"] = [head]
    if config.task == "language":
        options["task_type"] = "SEQ_CLS" if config.heads else "CAUSAL_LM"
    model = get_peft_model(backbone.model, LoraConfig(**(options | config.method.options)))
    if config.method.start is not None:
        start_lora(model, config.method.start)
    return model, {}


def _attention(model: nn.Module) -> list[str]:
    """Returns the names of the projections to queries, keys and values, which LoRA is put on."""
    known = (
        "qkv",
        "q_proj",
        "k_proj",
        "v_proj",
        "query",
        "key",
        "value",
        "query_key_value",
        "c_attn",
        "Wqkv",
    )
    last = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    found = [name for name in known if name in last]
    if not found:
        raise ValueError(
            f"method: no projections to queries, keys and values are known in {type(model).__name__}; pass "
            "method.options={target_modules: [...]}."
        )
    return found


def _baseline(backbone: Backbone, config: RunConfig, head: str | None, folder: Path | None) -> _Made:
    method = config.method
    return baselines.apply_method(
        backbone.model,
        method.name,
        prompts=method.prompts,
        bottleneck=method.rank or method.row.rank or 0,
        freeze=method.freeze,
        head=[] if head is None else head,
        **method.options,
    )


_PUT_IN: dict[str, Callable[[Backbone, RunConfig, str | None, Path | None], _Made]] = {
    "baselines": _baseline,
    "lora": _lora,
    "toast": _toast,
}


def save_method(
    model: nn.Module, config: RunConfig, folder: Path, gathered: dict[str, Tensor] | None = None
) -> None:
    """Writes what was trained: in PEFT's format where PEFT has the method. Whole or not at all.

    Args:
        model: The model.
        config: The run's configuration.
        folder: Where it goes.
        gathered: What the model holds in parts, whole, by name.
    """
    if isinstance(model, PeftModel):
        save_adapter(model, folder, **({} if gathered is None else {"state_dict": gathered}))
    else:
        from toast.baselines.weights import save_trained

        meta = {"method": config.method.name, "settings": config.method.model_dump(mode="json")}
        save_trained(model, folder, meta, gathered)


def load_method(backbone: Backbone, config: RunConfig, folder: Path) -> nn.Module:
    """Returns a backbone with what a run has trained, in evaluation mode.

    Raises:
        ValueError: If the folder holds nothing that fits.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return PeftModel.from_pretrained(backbone.model, str(folder)).eval()  # type: ignore[no-any-return]
    from toast.baselines.weights import load_trained

    load_trained(backbone.model, folder)  # puts in prompts and adapters, too
    return backbone.model.requires_grad_(False).eval()
