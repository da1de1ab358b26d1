"""The command `toast generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_Folder = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="Causal language model with its tokenizer.")
]
_Adapter = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, help="TOAST adapter. Default: a new one.")
]


def generate(
    model: _Folder,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    adapter: _Adapter = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 40,
    seed: Annotated[int | None, typer.Option(help="Sample with this seed. Default: greedy decoding.")] = None,
) -> None:
    """Continue a prompt with a steered language model.

    A new adapter gives exactly the text of the frozen model.
    """
    for folder, file in ((model, "config.json"), (adapter, "adapter_config.json")):
        if folder is not None and not (folder / file).is_file():
            raise ValueError(f"{folder} has no {file}, which save_pretrained writes.")
    from toast.generation.prompting import continue_prompt

    typer.echo(continue_prompt(model, prompt, adapter, tokens, seed))
