"""Plans of runs: what follows from what, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from typer.testing import CliRunner

from toast.cli import app
from toast.planning.estimating import Plan, plan
from toast.planning.memory_size import parse_size
from toast.planning.sharding import SHARDINGS
from toast.planning.stepping import EmptyRun
from toast.planning.weight_sizes import Weights
from toast.training.config_files import make_config, to_yaml
from toast.training.run_config import RunConfig

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def _vit(**settings: Any) -> RunConfig:
    model = {"library": "timm", "name": "vit_tiny_patch16_224", "pretrained": False, "options": VIT}
    base = {"model": model, "data": {"source": "folder", "root": "nowhere"}, "batch_size": 16}
    return make_config(base, [(k.replace("__", "."), v) for k, v in settings.items()])


def _llama(tmp_path: Path, **settings: Any) -> RunConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=300).save_pretrained(tmp_path)
    base = {
        "task": "language",
        "model": {"library": "transformers", "name": str(tmp_path), "dtype": "bfloat16"},
        "data": {"source": "text", "block": 32},
        "batch_size": 16,
    }
    return make_config(base, [(k.replace("__", "."), v) for k, v in settings.items()])


def _step(planned: Plan, way: str) -> Any:
    return next(row for row in planned.steps if row.way == way)


def _row(planned: Plan, sharding: str, base: str = "as configured") -> Any:
    return next(row for row in planned.ways if (row.sharding, row.base) == (sharding, base))


def test_a_vit_is_planned() -> None:
    found = plan(_vit(), classes=10)
    assert found.groups == {
        "to_state": 2 * 48 * 48, "to_signal": 2 * 48 * 48, "task_embedding": 48, "channel_transform": 48 * 48,
        "head": 490,
    }  # fmt: skip
    assert not found.remarks and "1,000 classes" in plan(_vit(batch_size=2)).remarks[0]
    computed, stored, checkpointed = (_step(found, way) for way in ("computed", "stored", "checkpointed"))
    assert stored.flops < computed.flops < checkpointed.flops
    assert checkpointed.peak < computed.peak
    assert 1 < stored.of_lora < computed.of_lora
    assert "first pass" not in stored.kept and {"selection and feedback", "second pass"} < set(computed.kept)
    assert [row.sharding for row in found.ways] == list(SHARDINGS)  # timm has no quantised bases


def test_operations_are_those_that_pytorch_counts() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(5, 3, 32, 32))
    fixed, sample = EmptyRun(_vit(method="lora"), "tune", 10).plain_flops()
    assert fixed + 5 * sample == counter.get_total_flops()


@pytest.mark.parametrize(("sharding", "micro_batches"), [("none", 1), ("fsdp2", 2), ("zero3", 1)])
def test_the_largest_batch_fits_and_one_more_does_not(sharding: str, micro_batches: int) -> None:
    memory = 2.1e9  # DeepSpeed's buckets are larger than the model

    def found(batch: int) -> Any:
        config = _vit(batch_size=2 * micro_batches * batch, micro_batches=micro_batches)
        return _row(plan(config, processes=2, memory=memory), sharding)

    most = found(4).largest
    fitting = found(most)
    assert fitting.largest == most
    assert fitting.peak <= memory < found(most + 1).peak


def test_the_form_of_the_feedback_follows_the_batch() -> None:
    run = EmptyRun(_vit(), "tune", 10)
    first = run.composes_from
    assert first is not None and first > 1
    assert (run.form(first - 1), run.form(first)) == ("per_token", "composed")
    for samples in (first - 1, first):
        assert plan(_vit(batch_size=samples)).steps[0].form == run.form(samples)
    just = _row(plan(_vit(batch_size=first - 1)), "none")
    assert _row(plan(_vit(batch_size=1), memory=just.peak), "none").largest == first - 1


def test_processes_share_what_is_split(tmp_path: Path) -> None:
    alone, four = (plan(_llama(tmp_path), processes=n) for n in (1, 4))
    whole = _row(alone, "none")
    assert (whole.buffers, whole.sent) == (0, 0)
    ddp, zero2 = _row(four, "none"), _row(four, "zero2")
    assert (ddp.frozen, ddp.trained, ddp.optimizer) == (whole.frozen, whole.trained, whole.optimizer)
    assert ddp.sent == pytest.approx(2 * 3 / 4 * whole.trained)
    assert zero2.frozen == whole.frozen and zero2.gradients == whole.gradients / 2 / 4  # bfloat16, by four
    fsdp2 = _row(four, "fsdp2")
    for name in ("frozen", "trained", "gradients", "optimizer"):
        assert getattr(fsdp2, name) == pytest.approx(getattr(whole, name) / 4)
    assert fsdp2.buffers > 0 and fsdp2.sent > ddp.sent


def test_blocks_are_gathered_as_often_as_they_run(tmp_path: Path) -> None:
    base = {"block": (100.0, 100.0), "rest": 0.0}
    weights = Weights(base["block"], 0.0, 0.0, 0.0, 0.0, (0.0, 0.0), 2, (3, 1))
    assert SHARDINGS["fsdp2"].sends(weights, 2, 1) == 400 / 2
    assert SHARDINGS["fsdp2"].sends(replace(weights, trained=10.0), 2, 3) == 3 * 430 / 2
    top = EmptyRun(_vit(method__options={"steer_from": 1}), "tune", 10).step("composed")
    assert top.gathers == (1, 3)  # the block below the steered ones runs once
    assert EmptyRun(_vit(method="linear"), "tune", 10).step().gathers == (1, 1)


def test_quantised_bases_need_less(tmp_path: Path) -> None:
    found = plan(_llama(tmp_path))
    plain, eight, four = (_row(found, "none", base) for base in ("as configured", "8-bit", "4-bit"))
    linear = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    rows = 2 * (64 * 2 + 32 * 2 + 128 * 2 + 64)
    assert plain.frozen - eight.frozen == 2 * linear - (linear + 4 * rows)
    assert plain.frozen - four.frozen == 2 * linear - (linear / 2 + 4 * linear / 64)
    assert {row.sharding for row in found.ways if row.base == "8-bit"} == {"none", "zero2"}
    forced = plan(_llama(tmp_path, method__options={"feedback_form": "composed"}))
    assert {row.base for row in forced.ways} == {"as configured"}
    assert any("feedback_form=composed" in remark for remark in forced.remarks)


def test_generation_holds_the_caches_of_both_passes(tmp_path: Path) -> None:
    layer = 2 * 2 * 16 * 32 * 2  # keys and values of two heads of 16, 32 tokens, bfloat16
    found = plan(_llama(tmp_path)).generation
    assert found is not None and (found.cache, found.plain_cache) == (4 * layer, 2 * layer)
    top = plan(_llama(tmp_path, method__options={"steer_from": 1})).generation
    assert top is not None and top.cache == 3 * layer
    assert plan(_llama(tmp_path, method="lora")).generation is None


@pytest.mark.parametrize(
    ("packing", "stage"), [("blocks", "pretune"), ("documents", "tune"), ("none", "tune")]
)
def test_both_stages_and_all_ways_to_pack(tmp_path: Path, packing: str, stage: Any) -> None:
    found = plan(_llama(tmp_path, data__packing=packing), stage)
    assert {row.way for row in found.steps} >= {"computed", "checkpointed"}
    assert ("stored" in {row.way for row in found.steps}) == (stage == "tune")


@pytest.mark.parametrize("method", ["full", "vpt-deep", "adapter", "lora", "attentive"])
def test_every_method_is_planned(method: str) -> None:
    found = plan(_vit(method=method))
    assert _row(found, "none").peak > 0 and found.steps[0].form == ""


def test_other_models_are_planned(tmp_path: Path) -> None:
    demo = {"model": {"library": "demo"}, "data": {"source": "demo"}, "batch_size": 4}
    assert _row(plan(make_config(demo, [])), "none").peak > 0
    sizes = {"depths": [1, 1], "embed_dim": 48, "num_heads": [3, 6]}
    swin = {"library": "timm", "name": "swin_tiny_patch4_window7_224", "pretrained": False, "options": sizes}
    found = plan(_vit(model=swin, batch_size=2))
    assert found.steps[0].form == "per_token"  # its blocks differ in tokens


def test_a_start_that_is_not_there_has_the_same_sizes(tmp_path: Path) -> None:
    found = plan(_vit(method__start=str(tmp_path / "later")))
    assert any("does not exist yet" in remark for remark in found.remarks)
    assert found.groups == plan(_vit()).groups


@pytest.mark.slow
def test_the_largest_llama_is_planned_from_its_configuration() -> None:
    base = {"library": "transformers", "name": "configs/scale/llama-70b", "dtype": "bfloat16"}
    settings = {"task": "language", "model": base, "data": {"source": "text"}, "batch_size": 8}
    found = plan(make_config(settings, []), processes=8)
    assert found.frozen == 68_976_648_192


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for config, given, message in (
        (_vit(batch_size=6), {"processes": 4}, r"batch_size: needs a multiple of processes × micro_batches"),
        (_vit(stage="tune"), {"stage": "pretune"}, "this configuration is for tune"),
        (_vit(method="lora"), {"stage": "pretune"}, "pre-tuning trains the whole top-down module"),
        (_vit(model__name="vit_none"), {}, "timm could not make 'vit_none'"),
        (_llama(tmp_path, model__name=str(empty)), {}, "Needs a folder with a causal model's config.json"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(config, **given)


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("24 GiB", 24 * 2**30), ("500mb", 5e8), ("1.5TB", 1.5e12), ("7", 7)]
)
def test_sizes_are_read(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "80XB", "8 0GB"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="memory: needs a size above 0, such as 80GB"):
        parse_size(text)


def _call(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exit_code == 1 and done.exception is not None:
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def test_the_command(tmp_path: Path) -> None:
    place = tmp_path / "vit.yaml"
    place.write_text(to_yaml(_vit()))
    code, out, _ = _call("plan", place, "method=toast-lite", "--processes", "2", "--memory", "24GiB")
    assert code == 0
    for text in ("lora", "kept: second pass", "FSDP2", "samples that fit", "2 processes of", "× a LoRA step"):
        assert text in out
    code, out, _ = _call("plan", place, "--json", "--classes", 10)
    assert code == 0
    held = json.loads(out)
    assert held == json.loads(json.dumps(plan(_vit(), classes=10).as_dict()))
    for given, message in (
        (("--memory", "much"), "needs a size above 0"),
        (("--stage", "third"), "'third' is not one of 'pretune'"),
        (("optimizer.lr=1",), "there is no such setting"),
    ):
        code, _, error = _call("plan", place, *given)
        assert (code, message in error) == (2, True), error
    assert not (tmp_path / "runs").exists()
