"""Serves pictures over HTTP, each request with an adapter of its own: `python scripts/serve.py A B --demo`.

Requests are gathered into batches by LitServe, and one batch holds whatever adapters its requests name. What
can be wrong about a request is found before it is queued, since LitServe answers all requests of a batch with
the error of one.

    POST /predict  {"adapter": "A", "image": "<base64>"} -> {"label": 3, "name": "dress", "probability": 0.9}
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from pydantic import Base64Bytes, BaseModel, Field, field_validator
from torch import Tensor

from toast.commands.errors import run_script
from toast.data.vision import BadSample, transforms
from toast.data.vision.decoding import decode
from toast.report.opening import open_model

try:
    import litserve
except ModuleNotFoundError as error:
    raise SystemExit("this needs litserve: pip install 'toast-steering[serve]'") from error

MOST = 20 * 2**20  # bytes of a picture


class Question(BaseModel):
    """A request."""

    adapters: ClassVar[frozenset[str]] = frozenset()

    adapter: str
    image: Base64Bytes = Field(max_length=MOST)

    @field_validator("adapter")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in cls.adapters:
            raise ValueError(f"needs one of {', '.join(sorted(cls.adapters))}")
        return name

    @field_validator("image")
    @classmethod
    def _is_picture(cls, data: bytes) -> bytes:
        try:
            decode(data, "image")
        except BadSample as error:
            raise ValueError(f"needs a picture: {error}") from error
        return data


class Steered(litserve.LitAPI):
    """One backbone with several adapters.

    Args:
        adapters: Folders of adapters by name; of one backbone, with heads of one size.
        opening: Where the backbone is, as `open_model` takes it.
        **options: LitServe's.
    """

    def __init__(self, adapters: dict[str, Path], opening: dict[str, Any], **options: Any) -> None:
        super().__init__(**options)
        self.adapters = adapters
        self.opening = opening

    def setup(self, device: str) -> None:
        """Opens the model in the process that runs it."""
        first, *others = self.adapters
        opened = open_model(self.adapters[first], **self.opening)
        self.model: Any = opened.model
        self.names = {first: self.model.active_adapter} | {name: name for name in others}
        for name in others:
            self.model.load_adapter(str(self.adapters[name]), name)
        self.model.to(device).eval()
        self.place, self.backbone, self.classes = device, opened.backbone, opened.classes
        self.transform = transforms(opened.backbone.data, train=False)

    def decode_request(self, request: Question) -> tuple[str, Tensor]:
        """Returns the adapter and the picture as the model takes it."""
        return self.names[request.adapter], self.transform(decode(request.image, "image"))

    def batch(self, inputs: list[tuple[str, Tensor]]) -> tuple[list[str], Tensor]:
        """Returns the adapters and the pictures of a batch."""
        names, pixels = zip(*inputs, strict=True)
        return list(names), torch.stack(pixels).to(self.place)

    @torch.inference_mode()
    def predict(self, batch: tuple[list[str], Tensor]) -> Tensor:
        """Returns probabilities, `(batch, classes)`: two passes, however many adapters there are."""
        names, pixels = batch
        args, kwargs = self.backbone.feed({"pixels": pixels})
        return self.backbone.logits(self.model(*args, **kwargs, adapter_names=names)).softmax(-1).cpu()

    def unbatch(self, output: Tensor) -> list[Tensor]:
        """Returns the answers of a batch."""
        return list(output)

    def encode_response(self, output: Tensor) -> dict[str, Any]:
        """Returns what is sent."""
        label = int(output.argmax())
        name = self.classes[label] if self.classes else None
        return {"label": label, "name": name, "probability": float(output[label])}


def main(
    adapters: Annotated[
        list[Path], typer.Argument(exists=True, file_okay=False, help="Folders of adapters.")
    ],
    base: Annotated[str | None, typer.Option("--model", help="The backbone, as for toast visualize.")] = None,
    weights: Annotated[Path | None, typer.Option(help="File with the backbone's weights (timm).")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Use the backbone in the package.")] = False,
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 8000,
    most: Annotated[int, typer.Option(min=1, help="Requests of a batch.")] = 16,
    wait: Annotated[float, typer.Option(min=0, help="Seconds that a batch waits to be filled.")] = 0.01,
) -> None:
    """Serve the adapters of one backbone."""
    named = {place.resolve().name: place for place in adapters}
    if len(named) < len(adapters):
        raise ValueError(f"adapters: need folders of different names; got {', '.join(map(str, adapters))}.")
    Question.adapters = frozenset(named)
    opening = {"base": base, "weights": weights, "demo": demo}
    api = Steered(named, opening, max_batch_size=most, batch_timeout=wait)
    server = litserve.LitServer(api, accelerator="auto", timeout=60)
    server.run(host="127.0.0.1", port=port, generate_client_file=False)


if __name__ == "__main__":
    run_script(main)
