"""What was trained, on what, on which machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from toast.files.templates import render
from toast.report.elements import Cell, seconds
from toast.report.run_data import RunFiles
from toast.training import run_folder
from toast.training.config_files import to_yaml
from toast.training.run_config import RunConfig

#: What the trained groups are, in the symbols of arXiv 2305.15542.
_GROUPS = {
    "task_embedding": "task embedding ξ",
    "channel_transform": "channel transform P",
    "to_state": "feedback between blocks, A",
    "to_signal": "feedback into the values, B",
    "lora": "LoRA factors of A and B",
    "head": "head",
}


def backbone_name(config: RunConfig) -> str:
    """Returns what the backbone is called."""
    return config.model.name or "the backbone of the demonstration"


def setting(files: RunFiles) -> Markup:
    """Returns the section that says what the figures depend on."""
    environment = json.dumps(files.environment, indent=2, ensure_ascii=False) if files.environment else ""
    return render(
        "report/templates/setting.html.jinja",
        groups=_groups(files),
        recipe=_recipe(files),
        machine=_machine(files),
        files=[("Configuration", to_yaml(files.config)), ("Environment", environment)],
    )


def share_trained(result: dict[str, Any]) -> str:
    """Returns the share of the trained parameters among all, those that the method adds included."""
    share = result["trainable_parameters"] / result["parameters"]
    return f"{share:.2%}" if share < 0.1 else f"{share:.1%}"


def _groups(files: RunFiles) -> dict[str, Any] | None:
    """Returns how much each group trained; None of a run that has not ended."""
    result = files.result
    if result is None:
        return None
    most = max(result["trained"].values(), default=1)
    rows = [
        (name, _GROUPS.get(name, ""), Cell(f"{count:,}", share=count / most))
        for name, count in result["trained"].items()
    ]
    note = (
        f"{result['trainable_parameters']:,} of {result['parameters']:,} parameters, "
        f"{share_trained(result)}; saved in {_size(files.place / run_folder.ADAPTER)}."
    )
    return {"note": note, "rows": rows}


def _recipe(files: RunFiles) -> list[tuple[str, Any]]:
    config, method, optimizer = files.config, files.config.method, files.config.optimizer
    options = ", ".join(f"{name} {value}" for name, value in method.options.items())
    rates = ", ".join(f"{group} {rate:g}" for group, rate in optimizer.rates.items())
    augment = ", ".join(
        [config.augment.preset, *(f"{name} {value}" for name, value in config.augment.options.items())]
    )
    length = f"{config.epochs} epochs" if config.epochs else f"{config.steps:,} steps"
    return [
        ("method", method.row.title + (f", rank {method.rank}" if method.rank else "")),
        ("stage", "pre-tuning" if files.stage == "pretune" else ""),
        ("started from", str(method.start or method.preset or "")),
        ("options", options),
        ("backbone", f"{backbone_name(config)} ({config.model.library}, {config.model.dtype})"),
        ("data", _data(files)),
        (
            "heads",
            "; ".join(
                f"{name}: {head.kind}" + (f", weight {head.weight:g}" if head.weight != 1 else "")
                for name, head in config.heads.items()
            ),
        ),
        ("augmentation", augment if config.task == "vision" else ""),
        (
            "length",
            f"{length}, batch {config.batch_size}" + (f", {files.total:,} steps" if files.total else ""),
        ),
        (
            "optimiser",
            f"{optimizer.name}, rate {optimizer.learning_rate:g}{f' ({rates})' if rates else ''}, "
            f"weight decay {optimizer.weight_decay:g}, {optimizer.schedule}, warm-up {optimizer.warm_up:.0%}",
        ),
        ("first pass", config.first_pass.mode if config.task in method.row.stores else ""),
        ("seed", str(config.seed)),
    ]


def _data(files: RunFiles) -> str:
    data = files.config.data
    named = " ".join(str(part) for part in (data.source, data.name, data.root) if part)
    samples = (files.result or {}).get("samples", {})
    counts = [
        f"{count:,} {split}" for kind in ("images", "rows") for split, count in samples.get(kind, {}).items()
    ]
    if samples.get("classes"):
        counts.append(f"{samples['classes']:,} classes")
    if samples.get("tokens"):
        counts.append(f"{samples['tokens']:,} tokens to train on")
    return f"{named}: {', '.join(counts)}" if counts else named


def _machine(files: RunFiles) -> list[tuple[str, Any]]:
    environment = files.environment
    result = files.result or {}
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    cores = (
        f"{environment['cores']} cores, {environment['threads']} used by an operator"
        if "cores" in environment
        else ""
    )
    return [
        (
            "time",
            f"{seconds(result['seconds'])}, of which steps {seconds(result['step_seconds'])}"
            if result
            else "",
        ),
        ("accelerators", ", ".join(environment.get("accelerators", [])) or ("none" if environment else "")),
        ("processor", ", ".join(part for part in (environment.get("processor", ""), cores) if part)),
        ("system", environment.get("system", "")),
        ("python", environment.get("python", "")),
        ("versions", versions),
        ("command", Cell(environment["command"], is_code=True) if "command" in environment else ""),
        ("precision", files.config.precision or ""),
    ]


def _size(place: Path) -> str:
    """Returns the size of a folder's files as text."""
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return f"{size / 1e6:,.2f} MB" if size >= 1e4 else f"{size:,} bytes"
