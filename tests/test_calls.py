"""Signals belong to the call: threads, failures, recomputation, nesting and copies share nothing."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import toast
from tests.models import DEPTH, awaken, decoder, images, tokens, vit
from toast.model import find_steering
from toast.passes import current_pass

MODELS = ["vit", "llama", "gpt2", "mistral"]
Loss = Callable[[Any, Tensor], Tensor]


def inputs(kind: str, count: int = 1) -> list[Tensor]:
    return [images(2) if kind == "vit" else tokens(2) for _ in range(count)]


def call(model: Any, x: Tensor) -> Tensor:
    return model(x) if x.is_floating_point() else model(input_ids=x, use_cache=False).logits


def steer(bare: nn.Module, kind: str, **options: Any) -> Any:
    """A wrapped model whose signals are far from zero: the task embedding resembles what is read."""
    for module in bare.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # so that training and evaluation can be compared
    model = awaken(toast.wrap(bare, **options)).eval()
    (x,) = inputs(kind)
    toast.calibrate(model, x) if kind == "vit" else toast.calibrate(model, input_ids=x, use_cache=False)
    return model


def steered(kind: str, **options: Any) -> Any:
    return steer(vit() if kind == "vit" else decoder(kind), kind, **options)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: Any, x: Tensor, run: Loss = call) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run(model, x).square().mean(), list(trained(model).values()))


def assert_same(found: Any, expected: Any) -> None:
    """Up to the last digits of the largest entry of each tensor."""
    pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
    for this, other in pairs:
        assert (this - other).abs().max() <= 1e-12 * max(1.0, other.abs().max().item())


def blocks_of(model: Any) -> list[nn.Module]:
    return find_steering(model).blocks


# Threads.


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("run", [call, gradients], ids=["output", "gradients"])
def test_two_threads_give_the_bits_of_one(kind: str, run: Any) -> None:
    model, calls = steered(kind), inputs(kind, 12)
    serial = [run(model, x) for x in calls]
    with ThreadPoolExecutor(2) as pool:
        parallel = list(pool.map(lambda x: run(model, x), calls))
    for found, expected in zip(parallel, serial, strict=True):
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_a_thread_that_waits_within_its_call_is_not_disturbed() -> None:
    """One thread stops in the middle of its second pass until the other has made a whole call."""
    model, (x, other) = steered("vit"), inputs("vit", 2)
    expected, expected_other = call(model, x), call(model, other)
    inside, done, first = threading.Event(), threading.Event(), threading.get_ident()

    def wait(*_: Any) -> None:
        this = current_pass()
        if threading.get_ident() != first and this is not None and this.number == 2 and not inside.is_set():
            inside.set()
            assert done.wait(20)

    blocks_of(model)[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call, model, x)
        assert inside.wait(20)
        assert torch.equal(call(model, other), expected_other)
        done.set()
        assert torch.equal(future.result(), expected)


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_a_trace_sees_the_calls_of_its_own_thread_only(kind: str) -> None:
    model, calls = steered(kind), inputs(kind, 8)
    name = "x" if kind == "vit" else "input_ids"

    def traced(x: Tensor) -> toast.Trace:
        return toast.trace(model, **{name: x}, attention_blocks="all", block_states=True)

    serial = [traced(x) for x in calls]
    outputs = [call(model, x) for x in calls]
    with ThreadPoolExecutor(1) as tracer, ThreadPoolExecutor(1) as caller:
        traces, plain = tracer.map(traced, calls), caller.map(lambda x: call(model, x), calls)
        for found, expected in zip(traces, serial, strict=True):
            assert torch.equal(found.selection_weights, expected.selection_weights)
            for block in range(DEPTH):
                assert torch.equal(found.attention[block], expected.attention[block])
                assert torch.equal(found.states[block][1], expected.states[block][1])
        assert all(torch.equal(f, e) for f, e in zip(plain, outputs, strict=True))


# Several calls, and calls that fail.


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_two_forwards_before_one_backward_add_their_gradients(kind: str, checkpointed: bool) -> None:
    model, (x, y) = steered(kind), inputs(kind, 2)
    expected = [a + b for a, b in zip(gradients(model, x), gradients(model, y), strict=True)]
    if checkpointed:
        checkpoint(model)
    loss = call(model, x).square().mean() + call(model, y).square().mean()
    assert_same(torch.autograd.grad(loss, list(trained(model).values())), tuple(expected))


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_a_failed_call_leaves_nothing_behind(kind: str, number: int) -> None:
    model, (x, y) = steered(kind), inputs(kind, 2)
    expected = call(model, x)

    def fail(*_: Any) -> None:
        this = current_pass()
        assert this is not None
        if this.number == number:
            raise KeyboardInterrupt

    handle = blocks_of(model)[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        call(model, y)
    with pytest.raises(KeyboardInterrupt):
        toast.trace(model, **{"x" if kind == "vit" else "input_ids": y}, attention_blocks="all")
    assert current_pass() is None
    handle.remove()
    assert torch.equal(call(model, x), expected)
    assert torch.overrides._get_current_function_mode() is None


# Activation checkpointing.


def set_checkpointing(bare: Any, enable: bool = True, **options: Any) -> None:
    """Switches checkpointing of a timm or transformers model; transformers renamed it within version 5."""
    if hasattr(bare, "set_grad_checkpointing"):
        bare.set_grad_checkpointing(enable)
        return
    name = "activation" if hasattr(bare, "activation_checkpointing_enable") else "gradient"
    if enable:
        given = {f"{name}_checkpointing_kwargs": options} if options else {}
        getattr(bare, f"{name}_checkpointing_enable")(**given)
    else:
        getattr(bare, f"{name}_checkpointing_disable")()


def checkpoint(model: Any, **options: Any) -> None:
    set_checkpointing(model.train().base_model.model, **options)


def counted(model: Any) -> list[int]:
    """Counts the runs of the middle block's MLP: one more than passes says that it was recomputed."""
    runs: list[int] = []
    blocks_of(model)[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("lite", [{}, {"lora_rank": 2}], ids=["full", "lite"])
@pytest.mark.parametrize("enabled", ["before", "after"])
@pytest.mark.parametrize("kind", MODELS)
def test_checkpointing_changes_no_gradient(kind: str, enabled: str, lite: dict[str, int]) -> None:
    bare = vit() if kind == "vit" else decoder(kind)
    if enabled == "before":
        set_checkpointing(bare)
    model, (x, later) = steer(bare, kind, **lite), inputs(kind, 2)
    plain = steer(copy.deepcopy(model).unload(), kind, **lite)
    plain.load_state_dict(model.state_dict())
    set_checkpointing(plain.base_model.model, False)
    plain.train()
    expected = gradients(plain, x)
    if enabled == "after":
        checkpoint(model)
    model.train()
    runs = counted(model)
    out = call(model, x)
    with torch.no_grad():
        call(model, later)  # must not be what the recomputation sees
    assert_same(out, call(plain, x))
    before = len(runs)
    found = torch.autograd.grad(out.square().mean(), list(trained(model).values()))
    assert len(runs) == before + 1
    assert_same(found, expected)
    assert all(gradient.abs().max() > 0 for gradient in found)


def test_recomputation_repeats_the_dropout_of_its_call() -> None:
    model, (x,) = steered("gpt2"), inputs("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    found = []
    for enable in (False, True):
        set_checkpointing(model.train().base_model.model, enable)
        torch.manual_seed(5)
        found.append(gradients(model, x))
    assert_same(found[0], found[1])


@pytest.mark.parametrize("kind", MODELS)
def test_backward_of_a_checkpointed_call_may_run_in_another_thread(kind: str) -> None:
    model, (x,) = steered(kind), inputs(kind)
    expected = gradients(model, x)
    checkpoint(model)
    loss = call(model, x).square().mean()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(torch.autograd.grad, loss, list(trained(model).values())).result()
    assert_same(found, expected)


def test_intermediate_features_are_checkpointed_too() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        last, between = model.base_model.model.forward_intermediates(x, norm=True)
        return last.mean() + sum(b.square() for b in between)

    model, (x,) = steered("vit"), inputs("vit")
    expected = gradients(model, x, run)
    checkpoint(model)
    runs = counted(model)
    assert_same(gradients(model, x, run), expected)
    assert len(runs) == 3


@pytest.mark.parametrize("kind", MODELS)
def test_pre_training_with_maps_and_states_under_checkpointing(kind: str) -> None:
    name = "x" if kind == "vit" else "input_ids"

    def run(model: Any, x: Tensor) -> Tensor:
        traced = toast.trace(model, **{name: x}, attention_blocks="all", block_states=True)
        output = traced.output if kind == "vit" else traced.output.logits
        maps = sum(a.square().sum() for a in traced.attention.values())
        return output.square().mean() + maps + toast.reconstruction_loss(model, traced)

    model, (x,) = steered(kind), inputs(kind)
    expected = gradients(model, x, run)
    checkpoint(model)
    assert_same(gradients(model, x, run), expected)


def test_recomputation_does_not_touch_a_trace() -> None:
    model, (x,) = steered("vit"), inputs("vit")
    checkpoint(model)
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        traced = toast.trace(model, x, attention_blocks="all", block_states=True)
    states = dict(traced.states)
    traced.output.sum().backward()
    assert all(traced.states[block] is kept for block, kept in states.items())


@contextlib.contextmanager
def timm_reentrant() -> Iterator[None]:
    timm.layers.set_reentrant_ckpt(True)
    try:
        yield
    finally:
        timm.layers.set_reentrant_ckpt(False)


@pytest.mark.parametrize("kind", MODELS)
def test_reentrant_checkpointing_is_refused_before_a_block_runs(kind: str) -> None:
    model, (x,) = steered(kind), inputs(kind)
    checkpoint(model, use_reentrant=True)
    runs = counted(model)
    with timm_reentrant(), pytest.raises(ValueError, match=r"re-entrant .* loses the gradient"):
        call(model, x)
    assert not runs
    if kind != "vit":  # only where it would act
        model.eval()
        call(model, x)
        model.train()
        set_checkpointing(model.base_model.model, False)
        call(model, x)


def test_unloading_gives_blocks_their_checkpointing_back() -> None:
    model, (x,) = steered("llama"), inputs("llama")
    checkpoint(model)
    own = blocks_of(model)[0]._gradient_checkpointing_func
    call(model, x)
    blocks = blocks_of(model)
    assert blocks[0]._gradient_checkpointing_func is not own
    model.unload()
    assert blocks[0]._gradient_checkpointing_func is own


# Models within models, and copies.


def test_a_model_called_within_another_is_not_disturbed_nor_seen() -> None:
    torch.manual_seed(1)
    outer, inner, (x, y) = steered("vit"), steered("vit"), inputs("vit", 2)
    expected, expected_inner = call(outer, x), call(inner, y)
    before = toast.trace(outer, x, attention_blocks="all")
    seen: list[Tensor] = []
    blocks_of(outer)[1].register_forward_hook(lambda *_: seen.append(call(inner, y)))
    assert torch.equal(call(outer, x), expected)
    traced = toast.trace(outer, x, attention_blocks="all")
    assert torch.equal(traced.selection_weights, before.selection_weights)
    assert torch.equal(traced.first_output, before.first_output)
    assert all(torch.equal(traced.attention[b], before.attention[b]) for b in range(DEPTH))
    assert len(seen) == 4  # one a pass
    assert all(torch.equal(out, expected_inner) for out in seen)


def test_a_model_called_beside_the_trunk_of_a_traced_one_runs_itself() -> None:
    outer, inner, (x, y) = steered("vit"), steered("vit"), inputs("vit", 2)
    expected = call(inner, y)
    seen: list[Tensor] = []
    outer.base_model.model.head.register_forward_hook(lambda *_: seen.append(call(inner, y)))
    toast.trace(outer, x)
    assert len(seen) == 2  # after either pass
    assert all(torch.equal(out, expected) for out in seen)


def test_a_bare_model_called_within_a_steered_one_is_the_bare_model() -> None:
    outer, inner, (x, y) = steered("vit"), vit(), inputs("vit", 2)
    expected, expected_inner = call(outer, x), call(inner, y)
    seen: list[Tensor] = []
    blocks_of(outer)[1].register_forward_hook(lambda *_: seen.append(call(inner, y)))
    assert torch.equal(call(outer, x), expected)
    assert all(torch.equal(out, expected_inner) for out in seen)


@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_is_steered_by_itself(kind: str) -> None:
    model, (x,) = steered(kind), inputs(kind)
    expected = call(model, x)
    twin = copy.deepcopy(model)
    steering, own = find_steering(model), find_steering(twin)
    mine, modules = {id(m) for m in model.modules()}, {id(m) for m in twin.modules()}
    assert steering is not own
    assert {id(own.trunk), id(own.selector), *map(id, own.values)} <= modules - mine
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(call(twin, x), expected)
    gradients(twin, x)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_a_pickled_model_is_the_same_model(kind: str, tmp_path: Any) -> None:
    model, (x,) = steered(kind), inputs(kind)
    torch.save(model, tmp_path / "model.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(call(loaded, x), call(model, x))
    assert find_steering(loaded).trunk in set(loaded.modules())
    awaken(loaded)
    assert not torch.equal(call(loaded, x), call(model, x))
    loaded.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(call(loaded, x), call(model, x))


# Every way to call a ViT.


def test_all_methods_of_a_vit_are_steered_alike() -> None:
    model, (x,) = steered("vit"), inputs("vit")
    backbone = model.base_model.model
    features = backbone.forward_features(x)
    assert_same(backbone.forward_head(features), model(x))
    last, between = backbone.forward_intermediates(x, norm=True, output_fmt="NLC")
    assert_same(last, features)
    assert_same(between[-1], features[:, 1:])
    assert_same(backbone.get_intermediate_layers(x, n=1, norm=True)[0], features[:, 1:])
    states = toast.trace(model, x, block_states=True).states
    early = backbone.forward_intermediates(
        x, indices=[0], stop_early=True, intermediates_only=True, output_fmt="NLC"
    )
    assert_same(early[0], states[0][1][:, 1:])
    with model.disable_adapter():
        assert (backbone.forward_features(x) - features).abs().max() > 1e-2


# Gradients by another way.


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}], ids=["full", "lite"])
@pytest.mark.parametrize("features", ["normed", "unnormed", "mixed"])
def test_gradients_are_those_of_finite_differences(features: str, options: dict[str, Any]) -> None:
    options = options | {"train": "all"}
    model, (x,) = steered("vit", select_features=features, **options), inputs("vit")

    def loss() -> Tensor:
        return call(model, x).square().mean()

    found = dict(zip(trained(model), torch.autograd.grad(loss(), list(trained(model).values())), strict=True))
    step = 1e-5
    groups = {
        group: parameter
        for layer in (find_steering(model).selector, *find_steering(model).values)
        for group, parameter in layer.groups("default")
    }
    assert groups.keys() == set(toast.ToastConfig(**options).trained_groups)
    for group, parameter in groups.items():
        gradient = next(found[name] for name, p in trained(model).items() if p is parameter)
        flat = parameter.data.view(-1)
        for index in gradient.abs().flatten().topk(3).indices:
            kept, losses = flat[index].item(), []
            with torch.no_grad():
                for shift in (step, -step):
                    flat[index] = kept + shift
                    losses.append(loss().item())
                flat[index] = kept
            numeric = (losses[0] - losses[1]) / (2 * step)
            assert gradient.view(-1)[index].item() == pytest.approx(numeric, rel=1e-5, abs=1e-9), group


# Precision.


@pytest.mark.parametrize("kind", MODELS)
def test_inference_mode_gives_the_same_output(kind: str) -> None:
    model, (x,) = steered(kind), inputs(kind)
    with torch.inference_mode():
        found = call(model, x)
    assert torch.equal(found, call(model, x))


@pytest.mark.parametrize("saved", [["head"], ["head", "patch_embed"]])
def test_autocast_keeps_every_gradient(saved: list[str]) -> None:
    """A weight that the first pass casts without a graph must not be what the second pass uses."""
    model = steered("vit", modules_to_save=saved).float().train()
    x = images().float()

    def run(cache: bool) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            loss = call(model, x).float().square().mean()
        found = torch.autograd.grad(loss, list(trained(model).values()), allow_unused=True)
        return {name: g for name, g in zip(trained(model), found, strict=True) if g is not None}

    with_cache, without = run(True), run(False)
    assert with_cache.keys() == without.keys() == trained(model).keys()
    for name, gradient in with_cache.items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, without[name]), name


# A first pass that ends early.


@pytest.mark.parametrize("select_from", range(DEPTH))
@pytest.mark.parametrize("features", ["normed", "unnormed"])
@pytest.mark.parametrize("kind", MODELS)
def test_an_early_end_reads_what_leaves_its_block(kind: str, features: str, select_from: int) -> None:
    bare, (x,) = vit() if kind == "vit" else decoder(kind), inputs(kind)
    left: list[Tensor] = []

    def keep(block: nn.Module, args: Any, out: Any) -> None:
        left.append(out[0] if isinstance(out, tuple) else out)

    blocks = bare.blocks if kind == "vit" else bare.transformer.h if kind == "gpt2" else bare.model.layers
    handle = blocks[select_from].register_forward_hook(keep)
    call(bare, x)
    handle.remove()
    norm = bare.norm if kind == "vit" else bare.transformer.ln_f if kind == "gpt2" else bare.model.norm
    expected = norm(left[0]) if features == "normed" else left[0]
    model = steer(bare, kind, select_from=select_from, select_features=features)
    ran: list[int] = []
    for index, block in enumerate(blocks_of(model)):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    traced = toast.trace(model, **{"x" if kind == "vit" else "input_ids": x})
    assert torch.equal(traced.features, expected)
    assert ran == [*range(select_from + 1), *range(DEPTH)]


def test_nothing_of_a_call_stays_on_the_model() -> None:
    model, (x,) = steered("vit"), inputs("vit")
    call(model, x)

    def held() -> set[tuple[str, str]]:
        return {(name, key) for name, module in model.named_modules() for key in vars(module)}

    before = held()
    call(model, x).sum().backward()
    toast.trace(model, x, attention_blocks="all", block_states=True)
    assert held() == before
    assert not any(isinstance(held, Tensor) for module in model.modules() for held in vars(module).values())
    assert functools.reduce(lambda n, m: n + len(m._forward_hooks), model.modules(), 0) == 0


def test_tokens_that_are_dropped_at_random_are_refused_in_training() -> None:
    model = toast.wrap(vit(patch_drop_rate=0.5))
    model(images())
    with pytest.raises(ValueError, match=r"patch_drop_rate=0\.5"):
        model.train()(images())
