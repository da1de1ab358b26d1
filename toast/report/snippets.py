"""Code that loads what a run has trained: it works as it is pasted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from toast.files.templates import render
from toast.report.run_data import RunFiles
from toast.training import run_folder
from toast.training.run_config import ModelConfig

#: Longest line of code.
_LONGEST = 96


def loading(files: RunFiles, data: dict[str, Any]) -> Markup:
    """Returns the section with the code.

    Args:
        files: The run.
        data: What the backbone expects of pictures; empty for language.
    """
    return render(
        "report/templates/loading.html.jinja",
        start=str(files.place) if files.stage == "pretune" else None,
        has_labels=files.config.task != "language" or bool(files.heads),
        with_libraries=with_libraries(files, data),
        with_toast=with_toast(files),
    )


def with_libraries(files: RunFiles, data: dict[str, Any]) -> str:
    """Returns code that opens the backbone by its library, and the adapter by PEFT if it is one of PEFT's."""
    config = files.config
    peft = (files.place / run_folder.ADAPTER / run_folder.ADAPTER_CONFIG).is_file()
    imports = {"import torch"}
    lines: list[str] = []
    outputs = sum(len(head["outputs"]) for head in (files.heads or {}).values()) or len(files.classes)
    if config.task == "language":
        lines += _language(config.model, imports, outputs)
    else:
        lines += _VISION[config.model.library](config.model, outputs, imports)
    if config.model.library != "demo" and not config.model.pretrained and config.model.weights is None:
        imports.add("from accelerate.utils import set_seed")
        lines.insert(0, f"set_seed({config.seed})  # the backbone's weights are random: the same ones again")
    if config.model.dtype != "float32" and config.model.library != "transformers":
        lines.append(f"backbone = backbone.to(torch.{config.model.dtype})")
    lines.insert(0, f"run = Path({str(files.place)!r})")
    imports.add("from pathlib import Path")
    if peft:
        imports |= {"import toast  # makes TOAST known to PEFT", "from peft import PeftModel"}
        lines.append('model = PeftModel.from_pretrained(backbone, run / "adapter").eval()')
    else:
        imports.add("from toast.baselines.weights import load_trained")
        lines += ['load_trained(backbone, run / "adapter")', "model = backbone.eval()"]
    lines.append("")
    if config.task == "language":
        lines += _read(imports) if files.heads else _continued(files, imports)
    else:
        lines += _classified(config.model, data, imports, bool(files.heads))
    return "\n".join([*_sorted(imports), "", *lines])


def with_toast(files: RunFiles) -> str:
    """Returns code that opens all of a run."""
    lines = [
        "from toast.training.loaded import load_run",
        "from toast.training.preparing import open_all",
        "",
        f"run = load_run({str(files.place)!r})",
        "backbone, splits = open_all(run.config)",
        "args, kwargs = run.backbone.feed(splits.collate([splits.train[0, 0]]))",
        "logits = run.backbone.logits(run.model(*args, **kwargs))",
    ]
    return "\n".join(lines)


def _sorted(imports: set[str]) -> list[str]:
    """Returns imports as they are sorted: the standard library's first, `import x` before `from x`."""
    standard = sorted(line for line in imports if line.split()[1] in ("json", "pathlib"))
    others = sorted(imports - set(standard), key=lambda line: (line.startswith("from"), line))
    return [*sorted(standard, key=lambda line: line.startswith("from")), "", *others]


def _timm(model: ModelConfig, classes: int, imports: set[str]) -> list[str]:
    imports.add("import timm")
    options: dict[str, Any] = {"num_classes": classes, **model.options}
    if model.weights is not None:
        options["pretrained_cfg_overlay"] = {"file": str(model.weights.resolve()), "num_classes": 0}
    pretrained = {"pretrained": model.pretrained or model.weights is not None}
    return _call("backbone", "timm.create_model", [repr(model.name)], pretrained | options)


def _demo(model: ModelConfig, classes: int, imports: set[str]) -> list[str]:
    imports.add("from toast.embedded.backbone import load_backbone")
    return _call("backbone", "load_backbone", [], {"num_classes": classes, **model.options})


def _transformers(model: ModelConfig, classes: int, imports: set[str]) -> list[str]:
    options = {"num_labels": classes, **model.options}
    return _of_transformers("AutoModelForImageClassification", model, options, imports, ignore=True)


_VISION = {"timm": _timm, "demo": _demo, "transformers": _transformers}


def _language(model: ModelConfig, imports: set[str], outputs: int) -> list[str]:
    imports.add("from transformers import AutoTokenizer")
    name = _reachable(model.name)
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({name!r})"
    if not outputs:
        return [tokenizer, *_of_transformers("AutoModelForCausalLM", model, dict(model.options), imports)]
    options = {"num_labels": outputs, **model.options}
    return [
        tokenizer,
        *_of_transformers("AutoModelForSequenceClassification", model, options, imports, ignore=True),
    ]


def _of_transformers(
    kind: str, model: ModelConfig, options: dict[str, Any], imports: set[str], ignore: bool = False
) -> list[str]:
    name, dtype = repr(_reachable(model.name)), f"dtype=torch.{model.dtype}"
    imports.add(f"from transformers import {kind}")
    if model.pretrained:
        mismatched = {"ignore_mismatched_sizes": True} if ignore else {}
        return _call("backbone", f"{kind}.from_pretrained", [name, dtype], options | mismatched)
    imports.add("from transformers import AutoConfig")
    return [
        *_call("config", "AutoConfig.from_pretrained", [name], options),
        f"backbone = {kind}.from_config(config, {dtype})",
    ]


def _reachable(name: str | None) -> str:
    """Returns a model's name; of a folder its whole path, for the code may run elsewhere."""
    assert name is not None  # the configuration says so
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _call(made: str, function: str, first: list[str], options: dict[str, Any]) -> list[str]:
    """Returns the lines of a call: one, or one for each argument if that is long."""
    arguments = [*first, *(f"{name}={value!r}" for name, value in options.items())]
    line = f"{made} = {function}({', '.join(arguments)})"
    if len(line) <= _LONGEST:
        return [line]
    return [f"{made} = {function}(", *(f"    {argument}," for argument in arguments), ")"]


def _classified(model: ModelConfig, data: dict[str, Any], imports: set[str], heads: bool) -> list[str]:
    """Returns the lines that classify a picture, or give the outputs of heads."""
    imports |= {"import json", "from PIL import Image, ImageOps", "from timm.data import create_transform"}
    known = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    settings = {
        name: tuple(data[name]) if isinstance(data[name], list) else data[name]
        for name in known
        if name in data
    }
    scores = ".logits" if model.library == "transformers" else ""
    mode = "L" if data["input_size"][0] == 1 else "RGB"
    opened = 'ImageOps.exif_transpose(Image.open("picture.jpg"))'
    dtype = "" if model.dtype == "float32" else f".to(torch.{model.dtype})"
    shares = "" if heads else ".softmax(-1)"
    return [
        *_call("prepare", "create_transform", [], settings),
        f'image = Image.new("{mode}", (300, 200))  # {opened}.convert("{mode}")',
        *([] if heads else ['classes = json.loads((run / "labels.json").read_text())']),
        "with torch.inference_mode():",
        f"    scores = model(prepare(image)[None]{dtype}){scores}[0].float(){shares}",
        *(_by_head(imports) if heads else ["print(classes[int(scores.argmax())], float(scores.max()))"]),
    ]


def _read(imports: set[str]) -> list[str]:
    """Returns the lines that give the outputs of heads for a text."""
    return [
        'inputs = tokenizer("The", return_tensors="pt")',
        "with torch.inference_mode():",
        "    scores = model(**inputs).logits[0].float()",
        *_by_head(imports),
    ]


def _by_head(imports: set[str]) -> list[str]:
    """Returns the lines that print each head's outputs by name."""
    imports.add("import json")
    return [
        'heads = json.loads((run / "labels.json").read_text())',
        'parts = scores.split([len(head["outputs"]) for head in heads.values()])',
        "# Logits of classes and labels; of numbers, standard deviations from the mean.",
        "for (name, head), part in zip(heads.items(), parts):",
        '    print(name, dict(zip(head["outputs"], part.tolist())))',
    ]


def _continued(files: RunFiles, imports: set[str]) -> list[str]:
    """Returns the lines that continue a text, or give logits where PEFT's prompts cannot generate."""
    start = 'inputs = tokenizer("The", return_tensors="pt")'
    if not files.config.method.row.generates:
        return [start, "with torch.inference_mode():", "    logits = model(**inputs, use_cache=False).logits"]
    return [
        start,
        "with torch.inference_mode():",
        "    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)",
        "print(tokenizer.decode(tokens[0]))",
    ]
