"""Signals belong to the call: threads, failures, recomputation, nesting and copies share nothing."""

from __future__ import annotations

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor

import toast
from tests.models import DEPTH, awaken, decoder, vit
from tests.steered import (
    MODELS,
    assert_same,
    blocks_of,
    call,
    checkpoint,
    gradients,
    inputs,
    steer,
    steered,
    trained,
)
from toast.calls.hooks import BlockHook
from toast.steering import find_steering
from toast.thread_state import current_pass

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


# One call, one adapter state, whatever is switched meanwhile.


def switched(kind: str) -> Any:
    """A model with two adapters, each with a head of its own."""
    head = "head" if kind == "vit" else "lm_head"
    model = steered(kind, modules_to_save=[head])
    model.add_adapter("other", toast.ToastConfig(lora_rank=2, modules_to_save=[head]))
    return awaken(model).eval().requires_grad_(False)


def greedy(model: Any, x: Tensor) -> Tensor:
    return model.generate(input_ids=x, max_new_tokens=6, min_new_tokens=6, do_sample=False).double()


@pytest.mark.parametrize(("kind", "run"), [("vit", call), ("llama", call), ("llama", greedy)])
def test_a_call_ends_with_the_adapter_that_it_began_with(kind: str, run: Any) -> None:
    model, (x,) = switched(kind), inputs(kind)
    states = {}
    for name in ("default", "other"):
        model.base_model.set_adapter(name, inference_mode=True)
        states[name] = run(model, x)
    with model.disable_adapter():
        states["none"] = run(model, x)
    values = list(states.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    stop, interval = threading.Event(), sys.getswitchinterval()

    def switch() -> None:
        while not stop.wait(1e-4):
            for name in ("default", "other"):
                model.base_model.set_adapter(name, inference_mode=True)
            with model.disable_adapter():
                stop.wait(1e-4)

    switcher = threading.Thread(target=switch)
    sys.setswitchinterval(1e-5)
    try:
        switcher.start()
        seen = [run(model, x) for _ in range(15 if run is greedy else 60)]
    finally:
        stop.set()
        switcher.join()
        sys.setswitchinterval(interval)
    assert all(any(torch.equal(out, state) for state in states.values()) for out in seen)


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
@pytest.mark.parametrize("number", [1, 2])
def test_what_a_hook_switches_is_for_the_next_call(number: int) -> None:
    """Deterministic: the other adapter is made active, or the own one deleted, in the middle of a call."""
    model, (x,) = switched("vit"), inputs("vit")
    expected = {}
    for name in ("other", "default"):
        model.base_model.set_adapter(name, inference_mode=True)
        expected[name] = call(model, x)

    def switch(*_: Any) -> None:
        if toast.running_pass() == number:
            model.base_model.set_adapter("other", inference_mode=True)

    handle = blocks_of(model)[1].register_forward_pre_hook(switch)
    assert torch.equal(call(model, x), expected["default"])
    assert torch.equal(call(model, x), expected["other"])
    handle.remove()
    model.base_model.set_adapter("default", inference_mode=True)
    features = model.get_base_model().forward_features(x)

    def delete(*_: Any) -> None:
        if toast.running_pass() == number:
            model.delete_adapter("default")

    handle = blocks_of(model)[1].register_forward_pre_hook(delete)
    assert torch.equal(model.get_base_model().forward_features(x), features)
    handle.remove()
    assert torch.equal(call(model, x), expected["other"])


def test_the_head_of_a_deleted_adapter_goes_on_until_the_end_of_the_call() -> None:
    model, (x,) = switched("vit"), inputs("vit")
    model.base_model.set_adapter("default", inference_mode=True)
    expected = call(model, x)

    def delete(*_: Any) -> None:
        if toast.running_pass() == 2 and "default" in model.peft_config:
            model.base_model.set_adapter("other", inference_mode=True)
            model.delete_adapter("default")

    handle = blocks_of(model)[2].register_forward_hook(delete)
    assert torch.equal(call(model, x), expected)
    handle.remove()
    assert not torch.equal(call(model, x), expected)


def test_modules_within_the_trunk_go_by_the_adapter_of_the_call() -> None:
    """Also where the trunk is called itself, and no call came before."""
    model = steered("vit", modules_to_save=["patch_embed"])
    model.add_adapter("other", toast.ToastConfig(modules_to_save=["patch_embed"]))
    awaken(model).eval().requires_grad_(False)
    (x,), trunk = inputs("vit"), model.get_base_model()
    expected = copy.deepcopy(trunk).forward_features(x)
    switch = blocks_of(model)[2].register_forward_hook(
        lambda *_: model.base_model.set_adapter("other", inference_mode=True)
    )
    assert torch.equal(trunk.forward_features(x), expected)
    switch.remove()
    assert not torch.equal(trunk.forward_features(x), expected)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model", "ignore:Already found a `peft_config`")
@pytest.mark.parametrize("called", [False, True])
def test_the_head_of_another_method_beside_is_its_own(called: bool) -> None:
    model, (x,) = steered("vit"), inputs("vit")
    if called:
        model(x)
    both = get_peft_model(
        model, LoraConfig(target_modules=["fc1"], modules_to_save=["head"]), adapter_name="beside"
    ).double()
    both(x).sum().backward()
    assert both.get_base_model().get_base_model().head.modules_to_save["beside"].weight.grad is not None


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
    # A module with a hook is called more slowly.
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_call_their_hooks_where_a_device_hook_runs_the_trunk(kind: str) -> None:
    bare, (x,) = vit() if kind == "vit" else decoder(kind), inputs(kind)
    expected = steer(copy.deepcopy(bare), kind)
    add_hook_to_module(bare if kind == "vit" else bare.base_model, AlignDevicesHook("cpu"))
    model = steer(bare, kind)
    hooks = {(type(h.__self__), h.__name__) for m in model.modules() for h in m._forward_hooks.values()}
    # timm's trunk runs by `forward_features`, which Accelerate leaves alone.
    assert hooks == (set() if kind == "vit" else {(BlockHook, "after")})
    call_of = {"block_states": True} | ({} if kind == "vit" else {"input_ids": x, "use_cache": False})
    inputs_of = (x,) if kind == "vit" else ()
    model.load_state_dict(expected.state_dict())
    found = toast.trace(model, *inputs_of, **call_of).states
    for number, states in toast.trace(expected, *inputs_of, **call_of).states.items():
        assert_same(found[number], states)


@pytest.mark.parametrize("called_before", [False, True])
def test_a_block_that_was_copied_is_trained(called_before: bool) -> None:
    model, (x,) = steered("vit").train(), inputs("vit")
    if called_before:
        call(model, x)
    blocks = model.get_submodule(find_steering(model).block_names[0].rpartition(".")[0])
    blocks[1] = copy.deepcopy(blocks[1])
    call(model, x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trained(model).values())
