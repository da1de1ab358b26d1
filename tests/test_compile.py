"""`torch.compile` of wrapped models: whole graphs, the same numbers, no recompilation."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import StaticCache

import toast
from tests.models import CACHE, awaken, decoder, images, tokens, vit
from tests.steered import steer, trained

# Dynamo asks tensors that a block finds elsewhere for their gradient before it knows that they are no leaves.
signals_are_no_leaves = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)

DEPTH = 2  # the time that compiling takes grows with it


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def tiny(kind: str, **options: Any) -> Any:
    bare = vit(depth=DEPTH) if kind == "vit" else decoder(kind, num_hidden_layers=DEPTH)
    return steer(bare, kind, **options).float()


def logits(model: Any, x: Tensor) -> Tensor:
    return model(x) if x.is_floating_point() else model(input_ids=x, use_cache=False).logits


def same(found: Any, expected: Any) -> None:
    for this, other in zip(found, expected, strict=True):
        torch.testing.assert_close(this, other, rtol=0, atol=2e-5 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize(
    ("kind", "form", "options"),
    [
        ("vit", "per_token", {"steer_from": 1}),
        ("vit", "composed", {"lora_rank": 2}),
        ("llama", "composed", {}),
        ("llama", "per_token", {"lora_rank": 2}),
    ],
)
def test_one_graph_forward_and_backward(kind: str, form: str, options: dict[str, Any]) -> None:
    model = tiny(kind, feedback_form=form, **options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = [images(2).float() for _ in range(2)] if kind == "vit" else [tokens(2) for _ in range(2)]
    parameters = list(trained(model).values())
    before = logits(model, inputs[0]).detach()
    seen = []
    for x in inputs:
        found, expected = (logits(each, x) for each in (compiled, model))
        same([found.detach()], [expected.detach()])
        same(*(torch.autograd.grad(out.square().mean(), parameters) for out in (found, expected)))
        seen.append(graphs())
    assert seen[0] == seen[-1]  # nothing was compiled again
    assert torch.equal(logits(model, inputs[0]).detach(), before)  # the model itself is what it was


def test_inductor() -> None:
    model = tiny("vit")
    compiled, x = torch.compile(model, fullgraph=True), images(2).float()
    parameters = list(trained(model).values())
    for _ in range(2):
        found, expected = (logits(each, x) for each in (compiled, model))
        same([found.detach()], [expected.detach()])
        same(*(torch.autograd.grad(out.square().mean(), parameters) for out in (found, expected)))
    assert graphs() == 1


def test_fused() -> None:
    model = tiny("vit").requires_grad_(False)
    x = images(2).float()
    plain = model(x)
    compiled = torch.compile(toast.fuse(model), fullgraph=True, backend="aot_eager")
    same([compiled(x)], [plain])


@pytest.mark.parametrize("options", [{}, {"steer_from": 1}], ids=["full", "upper"])
def test_a_decode_step_on_a_static_cache(options: dict[str, Any]) -> None:
    model = tiny("llama", **options).requires_grad_(False)
    text = tokens(1, 8)
    with torch.no_grad():
        whole = model(input_ids=text, use_cache=False).logits
        cache = StaticCache(config=model.config, max_cache_len=16)
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = [model(input_ids=text[:, :4], **{CACHE: cache}).logits]
        seen = []
        for at in range(4, 8):
            place = torch.tensor([[at]])
            found.append(step(input_ids=text[:, at : at + 1], **{CACHE: cache}, position_ids=place).logits)
            seen.append(graphs())
    same([torch.cat(found, dim=1)], [whole])
    assert seen[1] == seen[-1]
    assert len(cache.layers) == 2 * DEPTH - options.get("steer_from", 0)


# What holds for a call is guarded: nothing has to be called without the compiler first.


@pytest.mark.parametrize(
    ("kind", "fullgraph"), [("vit", True), ("vit", False), ("llama", True), ("gpt2", True)]
)
def test_a_model_that_was_never_called_eagerly(kind: str, fullgraph: bool) -> None:
    x = images(2).float() if kind == "vit" else tokens(2)
    model = awaken(toast.wrap(vit(depth=DEPTH) if kind == "vit" else decoder(kind, num_hidden_layers=DEPTH)))
    model, twin = model.float().eval(), copy.deepcopy(model).float().eval()
    compiled = torch.compile(model, fullgraph=fullgraph, backend="eager")
    for _ in range(3):
        same([logits(compiled, x).detach()], [logits(twin, x).detach()])
    assert graphs() == 2  # the first call of a fresh adapter looks at what it selects


def test_several_adapters_and_none() -> None:
    model, x = tiny("vit", modules_to_save=["head"]), images(2).float()
    model.add_adapter("other", toast.ToastConfig(lora_rank=2, modules_to_save=["head"]))
    awaken(model).float().eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        outs = []
        for name in ("default", "other"):
            model.set_adapter(name)
            same([compiled(x)], [model(x)])
            outs.append(model(x))
        with model.disable_adapter():
            same([compiled(x)], [model(x)])
            outs.append(model(x))
    assert min((a - b).abs().max() for a, b in itertools.combinations(outs, 2)) > 1e-4


def test_a_first_pass_that_is_given_later() -> None:
    model, x, other = tiny("vit", steer_from=1), images(2).float(), images(2).float()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        plain = compiled(x)
        stored = toast.first_pass(model, other)
        for _ in range(2):
            with toast.given_first_pass(model, stored):
                found, expected = compiled(x), model(x)
            same([found], [expected])
            assert (expected - plain).abs().max() > 1e-4
            same([compiled(x)], [plain])
        same(toast.first_pass(compiled, other).tensors().values(), stored.tensors().values())


@signals_are_no_leaves
def test_what_looks_into_a_call_of_a_compiled_model() -> None:
    model, x = tiny("vit"), images(2).float()
    compiled = torch.compile(model, backend="eager")
    for each in model.get_base_model().blocks:
        each.compile(backend="eager")
    compiled(x)
    expected = toast.trace(copy.deepcopy(model), x, attention_blocks="all", block_states=True)
    found = toast.trace(compiled, x, attention_blocks="all", block_states=True)
    same([found.output, *found.signals], [expected.output, *expected.signals])
    same(found.attention.values(), expected.attention.values())

    def loss(out: Tensor) -> Tensor:
        return out.square().mean()

    same(
        [toast.pretraining_loss(compiled, x, task_loss=loss)[0]],
        [toast.pretraining_loss(model, x, task_loss=loss)[0]],
    )
    assert toast.probe(compiled, x).proved
    toast.calibrate(compiled, x)
    assert toast.look(compiled, x, block=-1).attention is not None
    same([compiled(x)], [model(x)])  # which the new task embedding reached


# Blocks that are compiled one by one, before or after the model is wrapped.

BLOCKS = {
    "timm": ("blocks", "attn"),
    "vit": ("vit.layers", "attention"),
    "dinov2": ("dinov2.layer", "attention"),
    "llama": ("model.layers", "self_attn"),
}
MANY = 5  # more than a few, so that a graph for each would show


def deep(kind: str) -> tuple[nn.Module, nn.ModuleList]:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": MANY}
    sizes |= {"num_attention_heads": 3, "intermediate_size": 40}
    bare: Any
    if kind == "timm":
        bare = vit(depth=MANY)
    elif kind == "vit":
        bare = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    elif kind == "dinov2":
        bare = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**sizes, mlp_ratio=2))
    else:
        bare = decoder("llama", num_hidden_layers=MANY)
    held = [m for m in bare.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) == MANY]
    return bare.float().eval(), held[0]


def compile_blocks(kind: str, blocks: nn.ModuleList, how: str) -> None:
    for index, block in enumerate(list(blocks)):
        if how == "in place":
            block.compile(backend="eager")
        elif how == "replaced":
            blocks[index] = torch.compile(block, backend="eager")
        else:
            getattr(block, BLOCKS[kind][1]).compile(backend="eager")


@signals_are_no_leaves
@pytest.mark.parametrize(
    ("kind", "options", "how"),
    [
        ("timm", {}, "in place"),
        ("timm", {"steer_from": 2}, "replaced"),
        ("vit", {"steer_from": 2}, "in place"),
        ("dinov2", {}, "attention"),
        ("llama", {}, "replaced"),
        ("llama", {"select_from": 3}, "attention"),
    ],
    ids=str,
)
def test_blocks_that_are_compiled_one_by_one(kind: str, options: dict[str, Any], how: str) -> None:
    x = tokens(2) if kind == "llama" else images(2).float()

    def call(model: Any) -> Tensor:
        out = model(x) if kind != "llama" else model(input_ids=x, use_cache=False)
        return out if isinstance(out, Tensor) else out.logits  # type: ignore[no-any-return]

    plain = call(deep(kind)[0]).detach()
    expected: list[Tensor] = []
    for before in (None, False, True):
        torch._dynamo.reset()
        counters.clear()
        bare, blocks = deep(kind)
        if before:
            compile_blocks(kind, blocks, how)
            call(bare)
        torch.manual_seed(1)
        model = awaken(toast.wrap(bare, **options)).float().eval()
        toast.calibrate(model, x, **({"use_cache": False} if kind == "llama" else {}))  # selects something
        if before is False:
            compile_blocks(kind, blocks, how)
        found = [call(model)]
        found += torch.autograd.grad(found[0].square().mean(), list(trained(model).values()))
        with model.disable_adapter():
            same([call(model)], [plain])
        if before is None:
            expected = [each.detach() for each in found]
            assert (expected[0] - plain).abs().max() > 1e-4
        else:
            same([call(model).detach(), *found], [expected[0], *expected])
            assert graphs() <= 8  # not one for each block and pass


@pytest.mark.parametrize("kind", ["timm", "llama"])
def test_an_adapter_knows_nothing_of_what_is_compiled(kind: str, tmp_path: Path) -> None:
    plain = awaken(toast.wrap(deep(kind)[0], lora_rank=2)).float().eval()
    plain.save_pretrained(tmp_path / "plain")
    bare, blocks = deep(kind)
    compile_blocks(kind, blocks, "replaced")
    loaded = PeftModel.from_pretrained(bare, tmp_path / "plain").eval()
    x = tokens(2) if kind == "llama" else images(2).float()
    same([logits(loaded, x)], [logits(plain, x)])
    loaded.save_pretrained(tmp_path / "compiled")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "compiled")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    again = PeftModel.from_pretrained(deep(kind)[0], tmp_path / "compiled").eval()
    same([logits(again, x)], [logits(plain, x)])


@signals_are_no_leaves
@pytest.mark.parametrize("replaced", [False, True])
def test_a_module_around_the_blocks_that_is_compiled(replaced: bool) -> None:
    config = transformers.SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=16,
        patch_size=4,
    )  # fmt: skip
    model = awaken(toast.wrap(transformers.SiglipVisionModel(config), select_from=1)).float().eval()
    x, bare = images(2).float(), model.get_base_model()
    expected = model(x).last_hidden_state
    if replaced:
        bare.encoder = torch.compile(bare.encoder, backend="eager")
    else:
        bare.encoder.compile(backend="eager")
    same([model(x).last_hidden_state], [expected])
    for layer in bare.encoder.layers:
        layer.compile(backend="eager")
    same([model(x).last_hidden_state], [expected])


@signals_are_no_leaves
def test_a_projection_that_is_compiled() -> None:
    model, x = tiny("vit"), images(2).float()
    expected = model(x)
    for block in model.get_base_model().blocks:
        block.attn.qkv = torch.compile(block.attn.qkv, backend="eager")
    same([model(x)], [expected])
