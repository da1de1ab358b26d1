"""TOAST is one of PEFT's methods after any import, in any order, in any command, on any Python."""

from __future__ import annotations

import copy
import pickle
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file

import toast
from tests.conftest import DATA
from tests.fresh import ROOT, failures
from tests.models import awaken
from tests.official.test_models import weights
from tests.training.settings import vision, write_language_model
from toast.training.config_files import to_yaml

MODULES = [module.name for module in pkgutil.walk_packages(toast.__path__, "toast.")]
REGISTERED = """
import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
kind = peft.PeftType.TOAST
assert kind in PEFT_TYPE_TO_CONFIG_MAPPING and kind in PEFT_TYPE_TO_TUNER_MAPPING
"""
CHECKS = f"""{REGISTERED}
import toast
assert peft.get_peft_config({{"peft_type": "TOAST"}}) == toast.ToastConfig()
assert PEFT_TYPE_TO_TUNER_MAPPING[kind] is toast.ToastModel
for module in (peft, __import__("toast.saving.contents").saving):
    for loader in (module.__loader__, module.__spec__.loader):
        assert type(loader).__name__ == "SourceFileLoader"
"""
ORDERS = [
    "import toast, peft",
    "import peft, toast",
    "import toast, importlib.util; importlib.util.find_spec('peft')",
    "from peft import PeftModel; import toast.cli",
    "import toast.layer; toast.ToastConfig()",
    # A module that is asked for by its loader, as `python -m` does, and one that ends in an error after PEFT.
    "import importlib.util, runpy\n"
    "runpy.run_module('toast.saving.contents', run_name='__main__', alter_sys=True)",
    "import sys; sys.modules['toast.layer'] = None\n"
    "try: import toast.value\n"
    "except ImportError: del sys.modules['toast.layer']\n"
    "import toast.fusing",
]
THREADS = """
import threading
def load(name):
    __import__(name)
names = ["toast.saving.contents", "peft", "toast.layer", "toast.training.methods"]
threads = [threading.Thread(target=load, args=(name,)) for name in names[{0}:] + names[:{0}]]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
# Programs that never import `toast`, in an environment where it is installed.
INSTALLED = (
    f"import os, site; os.environ['TOAST_HOOK'] = '1'; site.addsitedir({str(ROOT / 'build_hook')!r})\n"
)
UNAWARE = {
    "a program that imports PEFT": REGISTERED,
    "a program that asks for PEFT": "from importlib.util import find_spec; assert find_spec('peft')"
    + REGISTERED,
    "a program that knows TOAST as well": "import toast.saving.contents" + REGISTERED,
    "a program in a broken place": "import sys; sys.modules['toast.registration'] = None; import peft.tuners",
    "a program in another broken place": "import sys; sys.modules['toast.model'] = None; import peft.tuners",
}
FAULT = """
import sys, toast; sys.modules["toast.model"] = None
import peft
assert not hasattr(peft.PeftType, "TOAST") and peft.LoraConfig()
del sys.modules["toast.model"]; import toast.fusing
"""
COMMANDS = [
    "families",
    "configs",
    "generate {places}/model bread --adapter {places}/adapter --tokens 3",
    "pretune {places}/stage.yaml name=generic",
    "tune {places}/stage.yaml method=toast-lite method.start={places}/runs/generic name=run",
    "tune {places}/stage.yaml method=lora name=lora",
    "evaluate {places}/runs/run",
    "plan {places}/stage.yaml",
    "sweep configs/offline/demo-sweep.yaml --dry-run",
    "report {places}/runs/run --out {places}/report.html --pictures 1",
    "visualize {places}/runs/run {places}/pictures/test/class0/000.png --out {places}/maps",
    "visualize {places}/adapter bread --model {places}/model --tokens 2 --out {places}/texts",
    "compare {places}/runs/run {places}/runs/lora --out {places}/table",
    "features {places}/runs/run --out {places}/features.safetensors",
    "export {places}/runs/run --out {places}/model.pt2",
    "import-official {places}/official.pth {places}/imported",
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands need: models, an adapter, a configuration, a checkpoint, pictures."""
    from transformers import LlamaForCausalLM

    place = tmp_path_factory.mktemp("places")
    model = LlamaForCausalLM.from_pretrained(write_language_model(place / "model"))
    toast.save_adapter(awaken(toast.wrap(model)), place / "adapter")
    config = vision(place, epochs=None, steps=1)
    (place / "stage.yaml").write_text(to_yaml(config))
    boxes = '{"class0/000.png": [1, 3, 12, 17], "class1/001.png": [2, 3, 12, 17]}'
    (place / "pictures" / "test" / "boxes.json").write_text(boxes)
    torch.save({"model": weights(load_file(DATA / "toast_vit.safetensors"))}, place / "official.pth")
    return place


@pytest.fixture(scope="module")
def failed(places: Path) -> dict[str, str]:
    """What each process that failed has said, by its name: all are started here, for that takes seconds."""
    commands = (
        "import sys; sys.argv = ['toast', *{!r}.format(places={!r}).split()]\n"
        "from toast.cli import main; main()"
    )
    return failures(
        {name: f"import {name}{REGISTERED}" for name in MODULES}
        | {order: f"{order}\n{CHECKS}" for order in ORDERS}
        | {f"threads {turn}": THREADS.format(turn % 4) + CHECKS for turn in range(8)}
        | {"fault": FAULT + CHECKS}
        | {name: INSTALLED + code for name, code in UNAWARE.items()}
        | {command: commands.format(command, str(places)) for command in COMMANDS}
    )


def test_every_module_alone_registers(failed: dict[str, str]) -> None:
    """Whichever module is imported first, also where that is what pulls PEFT in."""
    assert len(MODULES) > 100
    assert {name: said for name, said in failed.items() if name in MODULES} == {}


def test_every_order_registers(failed: dict[str, str]) -> None:
    assert {order: said for order, said in failed.items() if order in ORDERS or "threads" in order} == {}


def test_a_fault_of_ours_does_not_break_peft(failed: dict[str, str]) -> None:
    assert "fault" not in failed


def test_a_program_that_never_heard_of_toast_knows_it(failed: dict[str, str]) -> None:
    assert {name: said for name, said in failed.items() if name in UNAWARE} == {}


def test_every_command_in_the_readme_starts_on_its_own(failed: dict[str, str]) -> None:
    assert {command: said for command, said in failed.items() if command in COMMANDS} == {}
    elsewhere = {"demo"}  # minutes: tests/demo
    promised = re.findall(r"^(?:.*&& )?toast ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(promised) <= {command.split()[0] for command in COMMANDS} | elsewhere


def test_importing_toast_is_quick() -> None:
    code = "import sys, toast; assert not {'torch', 'peft', 'transformers', 'timm'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["TOAST", "LORA"])
def test_the_type_behaves_like_the_built_in_ones(name: str) -> None:
    kind = getattr(PeftType, name)
    assert kind is PeftType(name) is PeftType[name] is vars(PeftType)[name] is PeftType.__members__[name]
    assert kind in PeftType and list(PeftType).count(kind) == 1 and name in dir(PeftType)
    assert kind == name and hash(kind) == hash(name) and len({kind, name}) == 1
    assert (kind.name, kind.value, repr(kind)) == (name, name, f"<PeftType.{name}: '{name}'>")
    assert str(kind) == format(kind) == f"PeftType.{name}"
    assert vars(kind).keys() == vars(PeftType.IA3).keys()
    assert kind._sort_order_ == list(PeftType).index(kind)
    assert len(PeftType) == len(list(PeftType)) == len(set(PeftType))
    assert copy.copy(kind) is copy.deepcopy(kind) is kind
    assert all(pickle.loads(pickle.dumps(kind, version)) is kind for version in range(6))
    with pytest.raises(AttributeError):
        setattr(PeftType, name, "another")
    if sys.version_info >= (3, 12):
        assert name in PeftType and f"no {name}" not in PeftType
