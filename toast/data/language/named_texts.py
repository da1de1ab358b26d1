"""`open_language`: from a name of a source to rows of tokens."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np

from toast.data.hub import import_datasets, load_split
from toast.data.language.conversations import Form, guess_form
from toast.data.language.encoding import Encoder, tokenizer_digest
from toast.data.language.packing import Packing
from toast.data.language.row_files import PLAIN, SUFFIXES, Row, find_files, read_files
from toast.data.language.rows import LanguageData

Source = Literal["text", "alpaca", "sharegpt", "messages", "hub"]

BATCH: Final = 256
"""Documents that a tokenizer gets at a time, over which it spreads its threads."""


def open_language(
    source: str,
    tokenizer: Any,
    *,
    path: Path | str | None = None,
    name: str | None = None,
    split: str | None = "train",
    block: int,
    packing: str = "none",
    template: str | None = None,
    limit: int | None = None,
    streaming: bool = False,
    text_field: str = "text",
    config: str | None = None,
    form: str | None = None,
) -> LanguageData:
    r"""Reads text, instructions or conversations and turns them into rows of tokens.

    Everything is read and encoded here, so that what is malformed shows before training starts. The tokens
    lie in a memory-mapped temporary file (under `TMPDIR`) that goes away with the data.

    | source | rows | loss on |
    | --- | --- | --- |
    | text | a field of .jsonl, .json, .parquet; each .txt file is one document | all tokens and EOS |
    | alpaca | `instruction`, `input` (may lack), `output` | the output and EOS |
    | sharegpt | `conversations` of `from` and `value`, or `role` and `content` | answers, ends of turns |
    | messages | `messages` of `role` and `content` | answers, ends of turns |
    | hub | of one of these forms, from the Hub or a folder, through `datasets` | as the form has it |

    Where a chat template marks answers with `{% generation %}` its marks are used, else each answer is found
    by rendering the conversation up to it.

    Args:
        source: Name of the source.
        tokenizer: A tokenizer of transformers.
        path: File, or folder of files; for "hub" a folder that `datasets.load_dataset` takes.
        name: For "hub": name of the data set on the Hub.
        split: Name of the split, in any common spelling. Of a folder of files: `train.jsonl`, or all in its
            folder `train`; where nothing is called so, "train" is all that is not called like another split.
            None is all files, whatever they are called.
        block: Most tokens of a row; see `check_block`.
        packing: "none": a document is a row. "documents": whole documents share a row, with `position_ids`
            that start at 0 in each, which is how transformers keeps their attention apart (pass no
            attention mask, and `use_cache=False`: with a cache it does not look for packed documents; see
            `leaks`). "blocks", for text alone: documents are joined by EOS and cut every `block` tokens, as
            GPT was pre-trained; attention crosses documents. But for blocks, a document longer than `block`
            loses its end, which the summary counts.
        template: For "alpaca": "alpaca" (default, the official prompt) or "chat", the tokenizer's chat
            template. For conversations: "chat" (default). Or the path of a file with a Jinja chat template.
        limit: Most documents to read, from the first.
        streaming: For "hub": fetch rows as they are read, and no more than `limit`.
        text_field: Name of the field that holds a text.
        config: For "hub": name of the configuration of a set that has several.
        form: For "hub": form of the rows, "text", "alpaca", "sharegpt" or "messages"; by default found by
            the fields of the first row.

    Raises:
        ValueError: If an option does not fit the source, the tokenizer lacks EOS or a chat template, a file
            is missing or malformed (the message says file, line and reason), or no token counts.
        ImportError: If the library `datasets` is not installed.
    """
    for option, value, known in (("source", source, Source), ("packing", packing, Packing)):
        if value not in get_args(known):
            raise ValueError(f"{option} must be one of {', '.join(get_args(known))}; got {value!r}.")
    if block < 2:
        raise ValueError(f"block must be at least 2 tokens, one to read and one to predict; got {block}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 document; got {limit}.")
    if source == "hub":
        rows, read_form = hub_rows(path, name, config, split or "train", form, text_field, streaming, limit)
        remarks: tuple[str, ...] = ()
    else:
        for_hub = {"name": name, "config": config, "form": form, "streaming": streaming or None}
        rows, read_form, remarks = file_rows(source, path, split, text_field, for_hub)
    if packing == "blocks" and read_form != "text":
        raise ValueError(
            f"packing='blocks' cuts anywhere, and is for text; rows of form {read_form!r} need "
            "'documents' or 'none'."
        )
    encoder = Encoder(tokenizer, read_form, template, text_field)
    documents = _store(_encoded(itertools.islice(rows, limit), encoder))
    settings = [read_form, template, encoder.chat and encoder.chat.template, tokenizer_digest(tokenizer)]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    return LanguageData(documents, packing, block, digest, remarks=remarks)  # type: ignore[arg-type]


def file_rows(
    source: str, path: Path | str | None, split: str | None, text_field: str, for_hub: dict[str, Any]
) -> tuple[Iterator[Row], Form, tuple[str, ...]]:
    """Opens files; returns their rows, the form of these, and what is unusual."""
    for option, value in for_hub.items():
        if value is not None:
            raise ValueError(f"{option} is for source 'hub'; source {source!r} reads files, got {value!r}.")
    if path is None:
        raise ValueError(f"source {source!r} needs path, a file or a folder.")
    form: Form = source  # type: ignore[assignment]
    suffixes = (*SUFFIXES, PLAIN) if form == "text" else SUFFIXES
    found = find_files(Path(path), split, suffixes)
    return read_files(found.files, text_field), form, found.remarks


def hub_rows(
    path: Path | str | None,
    name: str | None,
    config: str | None,
    split: str,
    form: str | None,
    text_field: str,
    streaming: bool,
    limit: int | None,
) -> tuple[Iterator[Row], Form]:
    """Opens a data set of the Hub; returns its rows and the form of these."""
    if form is not None and form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}; got {form!r}.")
    if (path is None) == (name is None):
        raise ValueError("source 'hub' needs either name (a data set on the Hub) or path (a local folder).")
    if streaming and limit is None:
        raise ValueError("streaming needs limit, the number of documents to fetch.")
    place = name or str(path)
    opened = load_split(place, split, config=config, streaming=streaming)
    rows = (Row(f"{place}, split {split!r}, row {number}", row) for number, row in enumerate(opened, 1))
    first = next(rows, None)
    if first is None:
        raise ValueError(f"data set {place!r}, split {split!r}, is empty.")
    known: Form = form or guess_form(first, text_field)  # type: ignore[assignment]
    return itertools.chain([first], rows), known


def _encoded(rows: Iterator[Row], encoder: Encoder) -> Iterator[dict[str, Any]]:
    """Encodes rows, a batch at a time."""
    while batch := list(itertools.islice(rows, BATCH)):
        for tokens, counts in encoder.encode(batch):
            yield {
                "tokens": np.array(tokens, dtype=np.int32),
                "counts": np.array(counts, dtype=np.bool_),
                "length": len(tokens),
                "counted": sum(counts[1:]),
            }


def _store(documents: Iterator[dict[str, Any]]) -> Any:
    """Writes documents to a temporary Arrow file and returns them as a memory-mapped `Dataset`."""
    datasets = import_datasets()
    first = next(documents, None)
    if first is None:
        raise ValueError("the data holds no documents.")
    features = datasets.Features(
        tokens=datasets.List(datasets.Value("int32")),
        counts=datasets.List(datasets.Value("bool")),
        length=datasets.Value("int64"),
        counted=datasets.Value("int64"),
    )
    folder = tempfile.mkdtemp(prefix="toast-language-")
    try:
        stored = datasets.Dataset.from_generator(
            lambda: itertools.chain([first], documents),
            features=features,
            cache_dir=folder,
            fingerprint=uuid.uuid4().hex,  # else the generator's code would be hashed
        ).with_format("arrow")
    except datasets.exceptions.DatasetGenerationError as error:
        shutil.rmtree(folder)
        raise (error.__cause__ or error) from None
    weakref.finalize(stored, shutil.rmtree, folder, ignore_errors=True)
    return stored
