"""Every shipped configuration is read, and says its command and score; the embedded ones run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig

from toast.training.config_files import load_config
from toast.training.dry_run import dry_run
from toast.training.run_config import RunConfig
from toast.training.sweeping import sweep

ROOT = Path(__file__).parents[1]
RUNS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "accelerate")
LAUNCHES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
VARIABLES = ("TOAST_ASSETS", "TOAST_DATA", "TOAST_OFFICIAL", "TOAST_PRETUNED", "TOAST_LLAMA")


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the variables that the configurations name."""
    monkeypatch.chdir(ROOT)
    for name in VARIABLES:
        monkeypatch.setenv(name, f"/nowhere/{name.lower()}")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_configuration_says_its_command_and_is_read(path: Path) -> None:
    first, *rest = path.read_text().splitlines()
    commands = ("toast pretune", "toast tune", "toast sweep", "toast plan", "scripts/")
    command = next(word for word in commands if word in first)
    assert first.startswith("# ") and str(path.relative_to(ROOT)) in first
    config = load_config(path)
    assert command in ("scripts/", "toast plan", f"toast {config.stage or 'sweep'}")
    said = " ".join(line.removeprefix("# ") for line in rest if line.startswith("# "))
    assert "ot yet measured" in said or "Score" in said
    assert config.name == path.stem or path.parent.name == "fgvc"
    for variable in VARIABLES:
        assert f"/nowhere/{variable.lower()}" in repr(config) or f"${variable}" not in path.read_text()


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOAST_ASSETS")
    with pytest.raises(ValueError, match=r"weights: the environment variable TOAST_ASSETS is not set"):
        load_config(ROOT / "configs/offline/fashion.yaml")


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_a_launch_is_read_by_accelerate(path: Path) -> None:
    config = ClusterConfig.from_yaml_file(path)
    assert config.mixed_precision in ("no", "bf16")
    assert path.name in path.read_text().splitlines()[0]
    sections = yaml.safe_load(path.read_text())
    assert ("deepspeed_config" in sections) == path.stem.startswith("deepspeed")
    if "fsdp_config" in sections:
        assert sections["fsdp_config"]["fsdp_version"] == 2  # what TOAST needs


def _smaller(config: RunConfig) -> RunConfig:
    given = config.data.options.items()
    options = {n: min(v, 40) if isinstance(v, int) else v for n, v in given} | {"val": 8}
    data = config.data.model_copy(update={"options": options})
    return config.model_copy(update={"data": data, "batch_size": 4})


def test_the_embedded_ones_run(tmp_path: Path) -> None:
    pretune = _smaller(load_config(ROOT / "configs/offline/demo-pretune.yaml"))
    assert dry_run(pretune, "pretune")["steps"] == 20
    for name, columns in (("regression", 2), ("multilabel", 19), ("multitask", 2)):
        heads = _smaller(load_config(ROOT / f"configs/offline/demo-{name}.yaml"))
        assert dry_run(heads, "tune")["batch"]["labels"] == (4, columns)
    config = load_config(ROOT / "configs/offline/demo-sweep.yaml", [f"out={tmp_path}"])
    assert sweep(config, dry_run=True) == {}
