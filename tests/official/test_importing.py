"""Official checkpoints as adapter folders: the same outputs as `toast.load_official`, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from timm.models.convnext import checkpoint_filter_fn
from torch import Tensor, nn

import toast
from tests.models import awaken
from tests.official.test_convnext import plain_convnext
from tests.official.test_models import plain_llama, plain_vit, weights
from toast.cli import main
from toast.official.importing import convert, import_official

NAMES = ["toast_vit", "toast_lite_vit", "toast_llama", "toast_lite_llama", "toast_convnext"]


def plain(name: str, sizes: dict[str, str], state: dict[str, Tensor]) -> nn.Module:
    """The plain backbone with its own weights."""
    if "convnext" in name:
        model = plain_convnext(sizes)
        backbone = {n: t for n, t in state.items() if n not in top_down(state)}
        model.load_state_dict(checkpoint_filter_fn(backbone, model))
        return model
    model = plain_vit(sizes) if "vit" in name else plain_llama(sizes)
    model.load_state_dict({n: t for n, t in state.items() if n in model.state_dict()})
    return model.eval()


def top_down(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in state.items() if any(part in n for part in ("prompt", "top_down", "decoders"))}


def output(model: nn.Module, run: dict[str, Tensor]) -> Tensor:
    if "input" in run:
        return model(run["input"])
    return model(**{key: run[key] for key in ("input_ids", "attention_mask", "position_ids")}).logits


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "top-down"])
@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_equals_the_loaded_checkpoint(name: str, whole: bool, official, tmp_path) -> None:
    run, sizes = official(name)
    state = weights(run)
    torch.save({"model": state if whole else top_down(state)}, tmp_path / "official.pth")
    kind = "vision" if "vit" in name and not whole else None
    folder = import_official(tmp_path / "official.pth", tmp_path / "new" / "adapter", kind=kind)
    loaded = PeftModel.from_pretrained(plain(name, sizes, state), folder).eval()
    expected = toast.load_official(plain(name, sizes, state), tmp_path / "official.pth")
    assert torch.equal(output(loaded, run), output(expected, run))
    torch.testing.assert_close(output(loaded, run), run["logits"], rtol=0, atol=1e-5)
    found, made = (m.peft_config["default"].to_dict() for m in (loaded, expected))
    differing = {"inference_mode", "auto_mapping"} | (
        {"modules_to_save"} if "llama" not in name and whole else set()
    )
    assert {key for key in found if found[key] != made[key]} <= differing
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_those_of_save_pretrained(name: str, official, tmp_path) -> None:
    run, sizes = official(name)
    state = weights(run)
    head = None if "llama" in name else ["head.fc" if "convnext" in name else "head"]
    loaded = toast.load_official(plain(name, sizes, state), state, modules_to_save=head)
    loaded.save_pretrained(tmp_path / "saved")
    import_official(state, tmp_path / "imported")
    saved, imported = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("saved", "imported"))
    assert saved.keys() == imported.keys()
    assert all(torch.equal(tensor, imported[key]) for key, tensor in saved.items())
    configs = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("saved", "imported")]
    assert configs[0] == configs[1]


def test_the_head_is_kept_unless_told_otherwise(official, tmp_path) -> None:
    run, sizes = official("toast_vit")
    state = weights(run)
    assert convert(state, tmp_path / "with").head
    assert not convert(state, tmp_path / "without", head=False).head
    for folder, same in (("with", True), ("without", False)):
        model = plain("toast_vit", sizes, state)
        nn.init.normal_(model.head.weight)
        loaded = PeftModel.from_pretrained(model, tmp_path / folder).eval()
        assert torch.allclose(loaded(run["input"]), run["logits"]) == same
    # A head beside the top-down module tells that it is of a vision model.
    with_head = top_down(state) | {n: state[n] for n in ("head.weight", "head.bias")}
    assert convert(with_head, tmp_path / "alone").kind == "vision"
    with pytest.raises(ValueError, match=r"no head.weight and head.bias"):
        import_official(weights(official("toast_llama")[0]), tmp_path / "llama", head=True)


def test_another_backbone_is_refused_where_it_is_known(official, tmp_path) -> None:
    run, sizes = official("toast_llama")
    state = weights(run)
    import_official(state, tmp_path / "known")
    import_official(top_down(state), tmp_path / "unknown")
    with pytest.raises(ValueError, match="backbone with other weights"):
        PeftModel.from_pretrained(awaken_all(plain_llama(sizes)), tmp_path / "known")
    PeftModel.from_pretrained(awaken_all(plain_llama(sizes)), tmp_path / "unknown")
    with pytest.raises(ValueError, match=r"its blocks is 3, this model's 2"):
        PeftModel.from_pretrained(plain_llama(sizes | {"num_hidden_layers": "2"}), tmp_path / "unknown")
    with pytest.raises(ValueError, match=r"its family is llama, this model's timm-vit"):
        PeftModel.from_pretrained(plain_vit(official("toast_vit")[1]), tmp_path / "unknown")


def test_convnext_without_a_backbone(official, tmp_path) -> None:
    run, sizes = official("toast_convnext")
    state = weights(run)
    with_head = top_down(state) | {n: state[n] for n in ("head.weight", "head.bias")}
    done = convert(with_head, tmp_path / "head")
    assert (done.kind, done.variant, done.blocks, done.width, done.head) == (
        "convnext",
        "convnext",
        4,
        20,
        True,
    )
    loaded = PeftModel.from_pretrained(plain("toast_convnext", sizes, state), tmp_path / "head").eval()
    torch.testing.assert_close(loaded(run["input"]), run["logits"], rtol=0, atol=1e-5)
    import_official(top_down(state), tmp_path / "alone")
    config = toast.ToastConfig.from_pretrained(tmp_path / "alone")
    assert config.backbone == {"family": "timm-convnext", "blocks": 4, "width": 20, "weights": None}
    with pytest.raises(ValueError, match=r"fits convnext; needed is one of vision"):
        import_official(top_down(state), tmp_path / "new", kind="vision")
    with pytest.raises(ValueError, match=r"fits vision and language; needed is one of convnext"):
        import_official(top_down(weights(official("toast_vit")[0])), tmp_path / "new", kind="convnext")


def test_convnext_knows_its_backbone(official, tmp_path) -> None:
    run, sizes = official("toast_convnext")
    import_official(weights(run), tmp_path / "known")
    for options in ({}, {"use_grn": True, "ls_init_value": None}):
        with pytest.raises(ValueError, match="backbone with other weights"):
            PeftModel.from_pretrained(plain_convnext(sizes, **options), tmp_path / "known")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoders.2.linear.weight": None}, r"missing: decoders.2.linear.weight"),
        ({"prompt": torch.zeros(24)}, r"prompt is \(24,\), needs \(20,\)"),
        ({"downsample_layers.1.1.weight": None}, r"backbone .*missing: downsample_layers.1.1.weight"),
        ({"downsample_layers.4.1.weight": torch.zeros(2, 2, 2, 2)}, r"unexpected: downsample_layers.4.1"),
        ({"head.bias": None}, r"head .*missing: head.bias"),
        ({"decoders.1.linear.lora_A": torch.zeros(2, 12)}, "LoRA factors of rank 2"),
    ],
)
def test_bad_convnext_checkpoints_write_nothing(change, message: str, official, tmp_path) -> None:
    state = {n: t for n, t in (weights(official("toast_convnext")[0]) | change).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        import_official(state, tmp_path / "new" / "adapter")
    bare = {n: t for n, t in state.items() if n in top_down(state)}
    if change.keys() & {"decoders.2.linear.weight", "prompt"}:
        with pytest.raises(ValueError, match=message):
            import_official(bare, tmp_path / "new" / "adapter")
    assert not list(tmp_path.iterdir())


def awaken_all(model: nn.Module) -> nn.Module:
    for parameter in awaken(model).parameters():
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model.", "_orig_mod."])
def test_top_down_weights_of_a_trainer(prefix: str, official, tmp_path) -> None:
    state = {
        n.replace("model.", prefix): t.half()
        for n, t in top_down(weights(official("toast_llama")[0])).items()
    }
    torch.save(state, tmp_path / "tuned_weights.bin")
    done = convert(tmp_path / "tuned_weights.bin", tmp_path / "adapter", kind="language")
    assert (done.variant, done.blocks, done.width, done.rank, done.tensors) == ("language", 3, 24, 0, 8)
    assert {t.dtype for t in load_file(done.folder / "adapter_model.safetensors").values()} == {torch.float16}
    config = toast.ToastConfig.from_pretrained(done.folder)
    assert config.backbone == {"family": "llama", "blocks": 3, "width": 24, "weights": None}
    assert config.task_type == "CAUSAL_LM"


def test_names_around_the_whole_checkpoint(official, tmp_path) -> None:
    for name in ("toast_vit", "toast_llama"):
        run, sizes = official(name)
        around = {f"module.model.{n}": t for n, t in weights(run).items()}
        assert convert(around, tmp_path / name).knows_backbone
        model = toast.load_official(plain_vit(sizes) if "vit" in name else plain_llama(sizes), around)
        torch.testing.assert_close(output(model, run), run["logits"], rtol=0, atol=1e-5)


RESNET = {"layer1.0.conv1.weight": torch.zeros(8, 8, 3, 3)}
BAD = [
    (lambda w: w.pop("decoders.1.linear2.weight"), r"missing: decoders.1.linear2.weight"),
    (lambda w: [w.pop(f"decoders.2.{n}.weight") for n in ("linear", "linear2")], r"missing: decoders.2"),
    (lambda w: w.pop("prompt"), r"got no prompt and 3 decoders"),
    (lambda w: w.update(prompt=torch.zeros(1, 24)), r"got prompt of shape \(1, 24\)"),
    (lambda w: w.update({"decoders.9.linear.weight": torch.zeros(24, 24)}), r"unexpected: decoders.9"),
    (lambda w: w.pop("blocks.1.attn.qkv.weight"), r"backbone .*missing: blocks.1.attn.qkv.weight"),
    (lambda w: w.pop("head.bias"), r"head .*missing: head.bias"),
    (lambda w: w.update({"model.prompt": torch.zeros(24)}), r"two names, prompt and model.prompt"),
    (lambda w: [w.pop(n) for n in list(top_down(w))], r"not an official TOAST checkpoint"),
    (lambda w: w.update(prompt=torch.zeros(24, dtype=torch.int64)), r"prompt is of type torch.int64"),
    (lambda w: [w.pop(n) for n in w.keys() - top_down(w).keys()], r"give it with kind \(--kind\)"),
    (
        lambda w: [w.pop(n) for n in w.keys() - top_down(w).keys()] and w.update(RESNET),
        r"fits no kind; needed is one of vision, language, convnext",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_checkpoints_write_nothing(change, message: str, official, tmp_path) -> None:
    state = weights(official("toast_vit")[0])
    change(state)
    with pytest.raises(ValueError, match=message):
        import_official(state, tmp_path / "new" / "adapter")
    assert not list(tmp_path.iterdir())


def test_other_bad_input(official, tmp_path) -> None:
    state = weights(official("toast_vit")[0])
    with pytest.raises(ValueError, match=r"fits vision; needed is one of language"):
        import_official(state, tmp_path / "adapter", kind="language")
    with pytest.raises(ValueError, match=r"kind: needs one of vision, language, convnext; got 'sound'"):
        import_official(state, tmp_path / "adapter", kind="sound")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="is a file"):
        import_official(state, tmp_path / "file")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text("kept")
    import_official(state, tmp_path / "adapter")
    before = {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    assert len(before) == 3
    with pytest.raises(ValueError, match="holds an adapter already"):
        import_official(state, tmp_path / "adapter")
    assert {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before


def command(monkeypatch, *args: str) -> object:
    monkeypatch.setattr(sys, "argv", ["toast", "import-official", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_command(official, tmp_path: Path, capsys, monkeypatch) -> None:
    state = weights(official("toast_lite_vit")[0])
    save_file(state, tmp_path / "official.safetensors")
    source, out = str(tmp_path / "official.safetensors"), str(tmp_path / "adapter")
    assert command(monkeypatch, source, out) in (0, None)
    said = capsys.readouterr().out
    assert "vision-lite: 3 blocks, width 24, rank 4, with its head; 22 tensors, " in said
    assert f"PeftModel.from_pretrained(backbone, {out!r})" in said
    assert command(monkeypatch, source, out) == 2
    assert "holds an adapter already" in capsys.readouterr().err
    assert command(monkeypatch, str(tmp_path / "absent.pth"), str(tmp_path / "new")) == 2
    assert "absent.pth does not exist" in capsys.readouterr().err
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut off")
    assert command(monkeypatch, str(tmp_path / "cut.pth"), str(tmp_path / "new")) == 2
    assert "cut.pth is damaged" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
