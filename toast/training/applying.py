"""How TOAST, LoRA and the baselines are put into a backbone, as a configuration says."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn

import toast
from toast.baselines import applying as baselines
from toast.config import OFFICIAL

if TYPE_CHECKING:
    from toast.training.backbones import Backbone
    from toast.training.run_config import MethodConfig, RunConfig

#: A model with what is trained, and names of trained parameters by group where the method has its own groups.
Made = tuple[nn.Module, dict[str, list[str]]]


def put_in_toast(backbone: Backbone, config: RunConfig, head: str | None, folder: Path | None) -> Made:
    """Puts in TOAST or TOAST-Lite, new or from a saved adapter.

    Args:
        backbone: The backbone; it is changed in place.
        config: The run's configuration.
        head: Path of the head if it is trained, too.
        folder: Where an official checkpoint that is started from is imported to.

    Raises:
        ValueError: If it does not fit the model, or what it starts from is not there.
    """
    method = config.method
    options = toast_options(method)
    if config.reconstruction_weight is not None:
        options["reconstruction_weight"] = config.reconstruction_weight
    if head is not None:
        options["modules_to_save"] = [head]
    start = None if method.start is None else _as_adapter(method.start, folder)
    if start is not None:
        saved = toast.ToastConfig.from_pretrained(str(start))
        if saved.is_lite:
            if method.row.rank is None:
                raise ValueError(f"method.start: {start} is a TOAST-Lite adapter; needs method toast-lite.")
            return PeftModel.from_pretrained(backbone.model, str(start), is_trainable=True), {}
        options["pretrained"] = str(start)
        for name in ("select_features", "select_from", "value_bias"):
            if name not in method.options:  # feedback learnt on some features is no use on others
                options[name] = getattr(saved, name)
    return toast.wrap(backbone.model, **options), {}


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


def _as_adapter(start: Path, folder: Path | None) -> Path:
    """Returns the folder of the adapter that is started from; official checkpoints become one."""
    if (start / CONFIG_NAME).is_file():
        return start
    if (start / "adapter" / CONFIG_NAME).is_file():  # the folder of a run
        return start / "adapter"
    if not start.exists():
        raise ValueError(
            f"method.start: {start} is not there; needs an adapter's folder or an official file."
        )
    if folder is None:
        raise ValueError(
            f"method.start: {start} is no adapter's folder; import it with toast import-official."
        )
    from toast.official.importing import convert

    # Under a name of its own: a run that was refused before it began may have imported another one.
    files = [start] if start.is_file() else sorted(path for path in start.rglob("*") if path.is_file())
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    imported = folder / f"official-{zlib.crc32(repr((str(start.resolve()), states)).encode()):08x}"
    if not (imported / CONFIG_NAME).is_file():
        convert(start, imported, head=False)
    return imported


def put_in_lora(backbone: Backbone, config: RunConfig, head: str | None, folder: Path | None) -> Made:
    """Puts in PEFT's LoRA, without what scales it: `lora_alpha` is its rank.

    Args:
        backbone: The backbone; it is changed in place.
        config: The run's configuration.
        head: Path of the head if it is trained, too.
        folder: Where an official checkpoint that is started from is imported to.

    Raises:
        ValueError: If it does not fit the model.
    """
    from peft import LoraConfig, get_peft_model

    rank = config.method.rank or config.method.row.rank
    options: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": _attention(backbone.model)}
    if head is not None:
        options["modules_to_save"] = [head]
    if config.task == "language":
        options["task_type"] = "CAUSAL_LM"
    return get_peft_model(backbone.model, LoraConfig(**(options | config.method.options))), {}


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


def put_in_baseline(backbone: Backbone, config: RunConfig, head: str | None, folder: Path | None) -> Made:
    """Puts in one of the methods of `toast.baselines`.

    Args:
        backbone: The backbone; it is changed in place.
        config: The run's configuration.
        head: Path of the head if it is trained, too.
        folder: Where an official checkpoint that is started from is imported to.

    Raises:
        ValueError: If it does not fit the model.
    """
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
