"""`scripts/serve.py` over real HTTP: eight clients, several adapters, wrong requests among the right."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

import toast
from toast.data.vision import transforms
from toast.embedded.backbone import load_backbone
from toast.embedded.task import load_task
from toast.report.opening import open_model
from toast.saving.contents import save_adapter

ROOT = Path(__file__).parents[1]


def ask(port: int, question: Any) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/predict",
        json.dumps(question).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def as_png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "png")
    return base64.b64encode(stream.getvalue()).decode()


def test_clients_get_the_answers_of_their_adapters(tmp_path: Path) -> None:
    pytest.importorskip("litserve", reason="needs the extra 'serve'")
    pictures = [to_pil_image(image) for image in load_task(0, 8)[1].images]
    expected = {}
    for name in ("a", "b"):
        model = toast.wrap(load_backbone(10), modules_to_save=["head"]).eval()
        for key, parameter in model.named_parameters():
            if "to_signal" in key or "modules_to_save" in key:
                torch.nn.init.normal_(parameter, std=0.02 if "to_signal" in key else 0.5)
        save_adapter(model, tmp_path / name)
        opened = open_model(tmp_path / name, demo=True)
        prepare = transforms(opened.backbone.data, train=False)
        with torch.inference_mode():
            expected[name] = opened.model(torch.stack([prepare(each) for each in pictures])).softmax(-1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "serve.py", tmp_path / "a", tmp_path / "b", "--demo",
         "--port", str(port), "--wait", "0.2"],
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                assert server.poll() is None and time.monotonic() < until
                time.sleep(0.5)
        questions = [{"adapter": "ab"[i % 2], "image": as_png(picture)} for i, picture in enumerate(pictures)]
        wrong = [
            (questions[0] | {"adapter": "c"}, "needs one of a, b"),
            (questions[0] | {"image": base64.b64encode(b"no picture").decode()}, "needs a picture"),
            (questions[0] | {"image": "*"}, "the file is empty"),
            ({"adapter": "a"}, "Field required"),
        ]
        with ThreadPoolExecutor(8) as clients:  # wrong ones in between, so that they could spoil a batch
            mixed = [each for pair in zip(questions, [*wrong, *wrong], strict=True) for each in pair]
            given = [each[0] if isinstance(each, tuple) else each for each in mixed]
            answers = list(clients.map(lambda question: ask(port, question), given))
        for i, (status, answer) in enumerate(answers[::2]):
            assert status == 200, answer
            probabilities = expected["ab"[i % 2]][i]
            assert answer["label"] == int(probabilities.argmax())
            assert answer["probability"] == pytest.approx(float(probabilities.max()), abs=1e-4)
        for (status, answer), (_, message) in zip(answers[1::2], [*wrong, *wrong], strict=True):
            assert status == 422 and message in json.dumps(answer)
    finally:
        server.terminate()
        server.wait(30)
