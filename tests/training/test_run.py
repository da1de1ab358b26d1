"""Whole runs: every method, both tasks, both stages, what is written, and what is loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

import toast
from tests.official.test_models import weights
from tests.training.settings import language, losses, vision
from toast.training.loaded import load_run
from toast.training.measuring import measure
from toast.training.preparing import open_all
from toast.training.run import run
from toast.training.run_config import RunConfig

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "attentive": {"method": {"name": "attentive", "options": {"queries": 2}}},
    "full": {"method": "full"},
    "partial": {"method": {"name": "partial", "freeze": 2}},
    "bias": {"method": "bias"},
    "lora": {"method": {"name": "lora", "rank": 2}},
    "vpt-shallow": {"method": {"name": "vpt-shallow", "prompts": 3}},
    "vpt-deep": {"method": {"name": "vpt-deep", "prompts": 3}},
    "adapter": {"method": {"name": "adapter", "rank": 4}},
    "toast": {"method": "toast"},
    "toast-lite": {"method": {"name": "toast-lite", "rank": 2}},
}
#: Groups that each method trains on a ViT.
GROUPS = {
    "linear": {"head"},
    "attentive": {"probe", "head"},
    "full": {"embeddings", "blocks", "norm", "head"},
    "partial": {"blocks", "norm", "head"},
    "bias": {"bias", "head"},
    "lora": {"adapter", "head"},
    "vpt-shallow": {"prompts", "head"},
    "vpt-deep": {"prompts", "head"},
    "adapter": {"adapters", "head"},
    "toast": {"task_embedding", "channel_transform", "to_state", "to_signal", "head"},
    "toast-lite": {"task_embedding", "channel_transform", "lora", "head"},
}


def _measured_again(config: RunConfig, result: dict[str, Any]) -> None:
    if (card := config.folder / "adapter" / "README.md").is_file():
        found = ModelCard.load(card).data.eval_results
        figures = {each.metric_type: each.metric_value for each in found if each.dataset_split == "test"}
        assert figures["loss"] == pytest.approx(result["test"]["loss"], abs=1e-4)
    again = measure(config.folder)
    for name, value in result["test"].items():
        assert again[name] == pytest.approx(value, abs=1e-6) if isinstance(value, float) else True
    assert again["loss"] == pytest.approx(result["test"]["loss"], abs=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_is_loaded_on_pictures(tmp_path: Path, name: str) -> None:
    config = vision(tmp_path, **METHODS[name], epochs=4, optimizer__weight_decay=0.0)
    result = run(config, "tune")
    assert set(result["trained"]) == GROUPS[name]
    assert result["trainable_parameters"] == sum(result["trained"].values())
    seen = losses(config.folder)
    assert len(seen) == result["steps"] == 12
    assert sum(seen[-3:]) < sum(seen[:3])
    _measured_again(config, result)
    loaded = load_run(config.folder)
    assert loaded.classes == ("class0", "class1", "class2")
    assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("bias", "attentive")])
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT's prefix tuning
def test_every_method_trains_and_is_loaded_on_text(tmp_path: Path, name: str) -> None:
    settings = METHODS[name] if name != "partial" else {"method": {"name": "partial", "freeze": 1}}
    config = language(tmp_path, **settings, epochs=4, optimizer__weight_decay=0.0)
    result = run(config, "tune")
    assert result["test"]["perplexity"] > 1
    seen = losses(config.folder)
    assert sum(seen[-3:]) < sum(seen[:3])
    _measured_again(config, result)


def test_biases_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bias: LlamaForCausalLM has none"):
        run(language(tmp_path, method="bias"), "tune")


def test_packed_documents_that_see_each_other_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"data.packing": "documents", "data.block": 60, "batch_size": 2, "epochs": 1}
    run(language(tmp_path, name="apart", **settings), "tune")
    assert "attend to each other" not in capsys.readouterr().out
    # Prompt tuning makes positions of its own.
    with pytest.warns(UserWarning, match="[Pp]osition ids"):
        run(language(tmp_path, name="joined", method="vpt-shallow", **settings), "tune")
    assert "attend to each other" in capsys.readouterr().out


def test_pretuning_then_tuning(tmp_path: Path) -> None:
    generic = vision(tmp_path, name="generic", epochs=6, optimizer__learning_rate=1e-3, stage="pretune")
    result = run(generic, "pretune")
    rows = [json.loads(line) for line in (generic.folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        expected = (row["first_task"] + row["task"]) / 2 + row["reconstruction"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
    reconstructions = [row["reconstruction"] for row in rows]
    assert min(reconstructions) < 0.9 * reconstructions[0]  # it rises when the signals change the states
    assert result["stage"] == "pretune"

    for start in (generic.folder, generic.folder / "adapter"):
        tuned = vision(
            tmp_path, name=f"tuned-{start.name}", method={"name": "toast-lite", "start": str(start)}
        )
        run(tuned, "tune")
        feedback = load_run(tuned.folder).model.state_dict()
        wanted = load_run(generic.folder).model.state_dict()
        name = "base_model.model.blocks.1.attn.qkv.toast_to_state.default"
        assert torch.equal(feedback[f"{name}.base_layer.weight"], wanted[f"{name}.weight"])
    with pytest.raises(ValueError, match="this configuration is for pretune; the command is tune"):
        run(generic.model_copy(update={"name": "x"}), "tune")
    with pytest.raises(
        ValueError, match="pre-tuning trains the whole top-down module, toast; got 'toast-lite'"
    ):
        run(vision(tmp_path, name="y", method="toast-lite"), "pretune")


@pytest.mark.parametrize("name", ["toast_vit", "toast_lite_vit"])
def test_tuning_starts_from_an_official_checkpoint(tmp_path: Path, name: str, official: Any) -> None:
    state = weights(official(name)[0])
    torch.save(state, tmp_path / "official.pth")
    parts = ("prompt", "top_down", "decoders", "head")
    backbone = {key: tensor for key, tensor in state.items() if not any(part in key for part in parts)}
    save_file(backbone, tmp_path / "backbone.safetensors")
    method = {"name": "toast-lite" if "lite" in name else "toast", "start": str(tmp_path / "official.pth")}
    config = vision(
        tmp_path, method=method, steps=1, epochs=None, optimizer__learning_rate=1e-12,
        model__weights=str(tmp_path / "backbone.safetensors"),
    )  # fmt: skip
    result = run(config, "tune")
    assert ("lora" in result["trained"]) == ("lite" in name)
    held = load_run(config.folder).model.state_dict()
    prefix = "base_model.model.blocks.1.attn.qkv.toast_to_state.default"
    layer = f"{prefix}.base_layer" if "lite" in name else prefix
    wanted = state["decoders.1.linear.weight"].float()
    torch.testing.assert_close(held[f"{layer}.weight"], wanted, atol=1e-6, rtol=0)
    assert load_run(config.folder).model.peft_config["default"].value_bias == "twice"
    with pytest.raises(ValueError, match=r"method\.start: nowhere does not exist"):
        run(vision(tmp_path, name="x", method={"name": "toast", "start": "nowhere"}), "tune")


@pytest.mark.parametrize("preset", ["vision", "vision-lite"])
def test_official_presets_set_groups_and_settings(tmp_path: Path, preset: str) -> None:
    name = "toast-lite" if "lite" in preset else "toast"
    config = vision(tmp_path, method={"name": name, "preset": preset}, steps=2, epochs=None)
    result = run(config, "tune")
    groups = {"vision": {"task_embedding", "to_state", "to_signal", "head"}}
    groups["vision-lite"] = {"task_embedding", "channel_transform", "lora", "head"}
    assert set(result["trained"]) == groups[preset]
    settings = load_run(config.folder).model.peft_config["default"]
    assert settings.value_bias == "twice"
    assert settings.init == "official"


def test_groups_can_be_chosen(tmp_path: Path) -> None:
    config = vision(
        tmp_path, method={"name": "toast", "train": ["to_signal"], "head": False}, steps=1, epochs=None
    )
    assert set(run(config, "tune")["trained"]) == {"to_signal"}


def test_a_run_folder_holds_what_is_promised(tmp_path: Path) -> None:
    config = vision(
        tmp_path, trackers=["tensorboard"], evaluation__predictions=True, data__validation_share=0.25
    )
    run(config, "tune")
    names = {path.name for path in config.folder.iterdir()}
    assert names >= {
        "config.yaml", "environment.json", "metrics.jsonl", "adapter", "checkpoints", "result.json",
        "labels.json",
        "predictions.jsonl", "tensorboard",
    }  # fmt: skip
    assert [name for name in names if name.startswith(".")] == [".lock"]
    rows = [json.loads(line) for line in (config.folder / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(8))
    result = json.loads((config.folder / "result.json").read_text())
    right = sum(row["label"] == row["predicted"] for row in rows)
    assert result["test"]["accuracy"] == pytest.approx(right / 8)
    environment = json.loads((config.folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    whole = vision(tmp_path, name="whole", optimizer__name="sgd")
    parts = vision(tmp_path, name="parts", optimizer__name="sgd", micro_batches=4)
    run(whole, "tune")
    run(parts, "tune")
    assert losses(parts.folder) == pytest.approx(losses(whole.folder), abs=1e-5)
    rows = language(tmp_path, name="rows", optimizer__name="sgd")
    split = language(tmp_path, name="split", optimizer__name="sgd", micro_batches=2)
    run(rows, "tune")
    run(split, "tune")
    assert losses(split.folder) == pytest.approx(losses(rows.folder), abs=1e-5)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    for make in (vision, language):
        plain = make(tmp_path, name=f"{make.__name__}-plain")
        saving = make(tmp_path, name=f"{make.__name__}-saving", checkpointing=True)
        run(plain, "tune")
        run(saving, "tune")
        assert losses(saving.folder) == pytest.approx(losses(plain.folder), abs=1e-5)


@pytest.mark.parametrize("name", ["toast", "lora", "full"])
def test_bfloat16_trains(tmp_path: Path, name: str) -> None:
    config = vision(tmp_path, method=name, precision="bf16", model__dtype="bfloat16", first_pass__mode="auto")
    run(config, "tune")
    assert all(value == value for value in losses(config.folder))
    dtypes = {p.dtype for n, p in load_run(config.folder).model.named_parameters() if ".toast_" in n}
    assert dtypes <= {torch.float32}


def test_bad_pictures_are_counted_named_and_skipped(tmp_path: Path) -> None:
    config = vision(tmp_path, data__bad_share=0.1, batch_size=4)
    bad = sorted((tmp_path / "pictures" / "train").rglob("*.png"))[5]
    bad.write_bytes(bad.read_bytes()[:60])
    result = run(config, "tune")
    ((name, reason),) = result["bad_samples"].items()
    assert name.endswith(bad.name) and reason
    assert len(losses(config.folder)) == 12
    with pytest.raises(
        ValueError, match=r"1 of 24 training images cannot be read.*data\.bad_share=0\.01 allows 0"
    ):
        run(vision(tmp_path, name="strict"), "tune")


@pytest.mark.parametrize("split", ["test", "validation"])
def test_bad_pictures_of_what_is_measured_are_counted_named_and_stop_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    settings = {"data.test": None, f"data.{split}": "test", "epochs": 1, "batch_size": 2}
    config = vision(tmp_path, **settings, data__bad_share=0.5)
    for path in sorted((tmp_path / "pictures" / "test").rglob("*.png"))[:4]:
        path.write_bytes(path.read_bytes()[:60])
    result = run(config, "tune")
    assert result[split]["samples"] == 4 and len(result["bad_samples"]) == 4
    assert capsys.readouterr().out.count(f"skipped in {split}: ") == 4
    measured = measure(config.folder, split=split, predictions=tmp_path / "said.jsonl")
    assert measured["classes"] == ["class0", "class1", "class2"] and len(measured["bad_samples"]) == 4
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 4
    strict = vision(tmp_path, **settings, name="strict")
    with pytest.raises(ValueError, match=rf"4 of 8 {split} images cannot be read.*bad_share=0\.01 allows 0"):
        run(strict, "tune")
    with pytest.raises(ValueError, match=rf"4 of 8 {split} images cannot be read"):
        measure(config.folder, ["data.bad_share=0.2"], split=split)


def _box_pictures(tmp_path: Path, box: list[int]) -> None:
    test = tmp_path / "pictures" / "test"
    boxes = {str(path.relative_to(test)): box for path in test.rglob("*.png")}
    (test / "boxes.json").write_text(json.dumps(boxes))


@pytest.mark.parametrize("name", ["toast", "vpt-deep", "linear"])
def test_all_attention_falls_on_the_whole_picture(tmp_path: Path, name: str) -> None:
    config = vision(tmp_path, **METHODS[name])
    _box_pictures(tmp_path, [0, 0, 20, 20])
    assert run(config, "tune")["test"]["attention_on_target"] == pytest.approx(1, abs=1e-5)


def test_attention_on_target_is_the_class_tokens(tmp_path: Path) -> None:
    config = vision(tmp_path)
    _box_pictures(tmp_path, [0, 0, 10, 20])  # 20 pixels become 17, of which the first 16 stay: 8.5 are in it
    result = run(config, "tune")
    loaded = load_run(config.folder)
    splits = open_all(config)[1]
    pixels = splits.collate([splits.test[index] for index in range(8)])["pixels"]
    attention = toast.trace(loaded.model, pixels, attention_blocks=[-1]).attention[2].mean(1)[:, 0, 1:]
    by_column = attention.view(8, 4, 4).sum(1) / attention.sum(1, keepdim=True)
    left = by_column @ torch.tensor([1, 1, 0.5 / 4, 0])
    assert result["test"]["attention_on_target"] == pytest.approx(float(left.mean()), abs=1e-3)
    assert 0.2 < float(left.mean()) < 0.8
