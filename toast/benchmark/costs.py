"""What is measured of the contenders. Every figure is a ratio."""

from __future__ import annotations

import copy
import gc
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import toast
from toast.benchmark.contenders import (
    CLASSES,
    FULL,
    SMALL,
    Size,
    fused,
    languages,
    visions,
    vit,
    without_lower,
)
from toast.benchmark.textbook import TextbookLlama, cache_keyword
from toast.benchmark.timing import Contender, Ratio, in_turns

#: What is run twice, and so what a forward pass cannot cost less than.
TWICE, HALF_TWICE = ("plain", "plain"), ("plain", "plain, top half")


def _floor(name: str) -> tuple[str, ...]:
    """Returns the contenders whose costs together a forward pass cannot lie below; none for peers."""
    if not name.startswith(("TOAST", "textbook")):
        return ()
    if "prompt alone" in name:
        return ("plain",)
    return HALF_TWICE if "top half" in name else TWICE


def _forwards(
    models: Mapping[str, Any], names: list[str], run: Callable[[Any], object]
) -> dict[str, Contender]:
    """Returns contenders that run models, with those that floors are made of."""
    made = {name: partial(run, models[name]()) for name in ("plain", "plain, top half", *names)}
    return {
        name: Contender(each, _floor(name), shown=name != "plain, top half") for name, each in made.items()
    }


def forward(size: Size, names: list[str], batch: int, rounds: int) -> dict[str, Ratio]:
    """Times a forward pass without gradients, against the plain model."""
    images = size.images(batch)
    contenders = _forwards(visions(size), names, lambda model: model.eval()(images))
    with torch.inference_mode(), size.place.autocast():
        return in_turns(contenders, "plain", rounds, device=size.place.device)


def depth(size: Size, batches: list[int], rounds: int) -> dict[str, Ratio]:
    """Times a fused forward pass by batch size and by the block from which it is steered, against plain."""
    model = vit(size).eval()
    blocks = len(model.blocks)
    starts = sorted({0, blocks // 4, blocks // 2, 3 * blocks // 4, blocks - 1})
    put = size.place.put
    steered = {start: put(fused(toast.wrap(copy.deepcopy(model), steer_from=start))) for start in starts}
    upper = {start: put(without_lower(copy.deepcopy(model), start)) for start in starts}
    plain = put(model)
    found: dict[str, Ratio] = {}
    for batch in batches:
        images = size.images(batch)
        runs = {"plain": Contender(partial(plain, images))}
        for start in starts:
            runs[f"upper {start}"] = Contender(partial(upper[start], images), shown=False)
            runs[f"batch {batch}, from block {start}"] = Contender(
                partial(steered[start], images), ("plain", f"upper {start}")
            )
        with torch.inference_mode(), size.place.autocast():
            found |= in_turns(runs, "plain", rounds, device=size.place.device)
    return found


#: What a training step cannot cost less than, by what is steered and whether the first pass is stored. Two
#: passes need the forward and the gradients of activations, as LoRA does, and one more forward pass.
_STEP_FLOORS = {
    (False, False): ("LoRA", "forward"),
    (False, True): ("LoRA",),
    (True, False): ("LoRA, top half", "forward"),
    (True, True): ("LoRA, top half",),
}


def step(size: Size, names: list[str], batch: int, rounds: int) -> dict[str, Ratio]:
    """Times a training step (forward, backward, AdamW) against LoRA's.

    `… , stored` is the contender of that name on a first pass that is stored.
    """
    images = size.images(batch)
    plain = visions(size)["plain"]().train()

    def forward_alone() -> None:
        with torch.no_grad(), size.place.autocast():
            plain(images)

    contenders = {"LoRA": Contender(stepper(size, "LoRA", images))}
    contenders |= {
        "LoRA, top half": Contender(stepper(size, "LoRA, top half", images), shown=False),
        "forward": Contender(forward_alone, shown=False),
    }
    for name in names:
        steered = name.startswith(("TOAST", "textbook"))
        floor = _STEP_FLOORS["top half" in name, name.endswith(", stored")] if steered else ()
        contenders[name] = Contender(stepper(size, name, images), floor)
    return in_turns(contenders, "LoRA", rounds, device=size.place.device)


def stepper(size: Size, name: str, images: Tensor) -> Callable[[], object]:
    """Returns a training step of a contender."""
    model: nn.Module = visions(size)[name.removesuffix(", stored")]().train()
    labels = torch.randint(0, CLASSES, (len(images),), device=images.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    stored = None
    if name.endswith(", stored"):
        with size.place.autocast():
            stored = toast.first_pass(model, images)

    def run() -> None:
        given = nullcontext() if stored is None else toast.given_first_pass(model, stored)
        with given, size.place.autocast():
            loss = F.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return run


def tasks(size: Size, count: int, batch: int, rounds: int) -> dict[str, Ratio]:
    """Times several adapters in one call against a call for each: all on every sample, or one a sample.

    Args:
        size: Sizes of the model and inputs.
        count: Adapters.
        batch: Samples, a multiple of `count`.
        rounds: Rounds.
    """
    plain = size.place.put(vit(size).eval())
    model = size.place.put(toast.wrap(vit(size), modules_to_save=["head"]).eval())
    names = ["default", *(f"task{number}" for number in range(1, count))]
    for name in names[1:]:
        model.add_adapter(name, toast.ToastConfig(modules_to_save=["head"]))
    images = size.images(batch)
    own = {name: images[number::count].contiguous() for number, name in enumerate(names)}

    def each(given: Mapping[str, Tensor]) -> None:
        for name, samples in given.items():
            model.set_adapter(name)
            model(samples)

    found: dict[str, Ratio] = {}
    for name, apart, together, passes in (
        ("every sample with each adapter", dict.fromkeys(names, images),
         partial(toast.run_adapters, model, names, images), 1 + count),
        ("every sample with its own adapter", own,
         partial(model, images, adapter_names=names * (batch // count)), 2),
    ):  # fmt: skip
        runs = {
            "a call for each": Contender(partial(each, apart)),
            "plain": Contender(partial(plain, images), shown=False),
            name: Contender(together, ("plain",) * passes),
        }
        with torch.inference_mode(), size.place.autocast():
            found |= in_turns(runs, "a call for each", rounds, device=size.place.device)
    return found


def memory(size: Size, names: list[str], batch: int) -> dict[str, Ratio]:
    """Compares the peak memory of two training steps with that of LoRA's; on a CPU, a process each."""
    if size.place.device.type == "cpu":
        peaks = {name: _peak_of_process(size, name, batch) for name in ("LoRA", *names)}
    else:
        peaks = {name: _peak_of_device(size, name, batch) for name in ("LoRA", *names)}
    return {name: Ratio.of([peak / peaks["LoRA"]]) for name, peak in peaks.items() if name != "LoRA"}


def _peak_of_process(size: Size, name: str, batch: int) -> float:
    kind = "full" if size.vit == FULL.vit else "small"
    command = [sys.executable, "-m", "toast.benchmark.costs", kind, name, str(batch)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak_of_device(size: Size, name: str, batch: int) -> float:
    gc.collect()  # a wrapped model and its parts refer to each other
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats()
    run = stepper(size, name, size.images(batch))
    run()
    run()
    return float(torch.accelerator.max_memory_allocated())


def waits(size: Size, names: list[str], batch: int) -> dict[str, Ratio]:
    """Counts how often the host waits for the device in a training step; CUDA alone says so.

    LoRA's are those of the loop and the libraries; what a contender has more is its own.
    """
    if size.place.device.type != "cuda":
        return {}
    found = {}
    for name in ("LoRA", *names):
        run = stepper(size, name, size.images(batch))
        run()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found[name] = Ratio.of([float(sum("synchronizing" in str(each.message) for each in caught))])
    return found


def decode(size: Size, names: list[str], rounds: int) -> dict[str, Ratio]:
    """Compares tokens per second of greedy decoding, batch 1, after a prompt of as many tokens."""
    prompt = size.text(size.prompt)
    runs = _forwards(languages(size), names, lambda model: continued(model, prompt, size.prompt))
    with torch.inference_mode(), size.place.autocast():
        return in_turns(runs, "plain", rounds, higher_is_better=True, device=size.place.device)


def prefill(size: Size, names: list[str], rounds: int) -> dict[str, Ratio]:
    """Times the first step of decoding after a long prompt, against the plain model."""
    prompt = size.text(size.prefill)
    runs = _forwards(languages(size), names, lambda model: continued(model, prompt, 1))
    with torch.inference_mode(), size.place.autocast():
        return in_turns(runs, "plain", rounds, device=size.place.device)


def continued(model: Any, prompt: Tensor, count: int) -> Tensor:
    """Continues a prompt greedily; the same loop for every contender. Returns `(batch, count)`."""
    from peft import PeftModel
    from transformers import DynamicCache

    textbook = isinstance(model, TextbookLlama)
    llama = model.llama if textbook else model.get_base_model() if isinstance(model, PeftModel) else model
    caches = DynamicCache(config=llama.config), DynamicCache(config=llama.config)
    given = {cache_keyword(llama): caches[0], "use_cache": True}
    tokens, found = prompt, []
    for _ in range(count):
        logits = model(tokens, caches) if textbook else model(tokens, **given, logits_to_keep=1).logits
        tokens = logits[:, -1:].argmax(-1)
        found.append(tokens)
    return torch.cat(found, dim=1)


def checkpoint(size: Size) -> dict[str, Ratio]:
    """Compares the parameters in a saved adapter (without the head) with those of the backbone."""
    model = vit(size)
    backbone = sum(p.numel() for p in model.parameters())
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        generic, lite = Path(folder, "generic"), Path(folder, "lite")
        toast.save_adapter(toast.wrap(copy.deepcopy(model)), generic)
        # stands on the pre-tuned adapter, which is not saved again
        options: dict[str, Any] = {"pretrained": str(generic), "lora_rank": 4, "save_frozen": False}
        toast.save_adapter(toast.wrap(model, **options), lite)
        for name, at in (("TOAST", generic), ("TOAST-Lite", lite)):
            found[name] = Ratio.of([(at / "adapter_model.safetensors").stat().st_size / 4 / backbone])
    return found


def help_seconds(rounds: int) -> Ratio:
    """Returns the seconds that `toast --help` takes; the one figure that is no ratio."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "toast", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return Ratio.of(seconds)


def _peak(kind: str, name: str, batch: int) -> int:
    """Returns the peak memory of this process after two training steps, in KiB."""
    size = SMALL if kind == "small" else FULL
    run = stepper(size, name, size.images(batch))
    run()
    run()
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage gives there may be the peak of the process that started this one
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    print(_peak(sys.argv[1], sys.argv[2], int(sys.argv[3])))  # noqa: T201 - read by `memory`
