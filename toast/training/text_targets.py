"""Opens the texts of a run with heads: their targets are fields of the rows."""

from __future__ import annotations

from functools import partial
from typing import Any

from toast.training.answer_kinds import Answers
from toast.training.backbones import Backbone
from toast.training.data import Splits, held_out_rows, place_of_split, remarks_of
from toast.training.many_heads import Heads
from toast.training.run_config import RunConfig


def text_sources(config: RunConfig) -> dict[str, Any]:
    """Reads the texts of all splits: `train`, `validation`, `test`.

    Raises:
        ValueError: If one is missing or malformed, with file, row and reason.
    """
    from toast.data.language.labelled_texts import open_labelled

    data = config.data

    def opened(split: str) -> Any:
        options: dict[str, Any] = {"path": data.root, "name": data.name, "split": split, **data.options}
        if data.source != "hub":
            options |= {"name": None} | place_of_split(data.root, split, split == data.train)
        return open_labelled(data.source, limit=data.limit, **options)

    sources: dict[str, Any] = {"train": opened(data.train), "validation": None, "test": None}
    for name, share in (("test", data.test_share), ("validation", data.validation_share)):
        if getattr(data, name) is not None:
            sources[name] = opened(getattr(data, name))
        elif share:
            sources["train"], sources[name] = held_out_rows(sources["train"], share, name, config.seed)
    return sources


def text_splits(config: RunConfig, sources: dict[str, Any], backbone: Backbone, answers: Answers) -> Splits:
    """Makes data sets of the texts, for a backbone's tokenizer."""
    from toast.data import language
    from toast.data.language.encoding import tokenizer_digest
    from toast.data.language.labelled_texts import EncodedTexts, collate_texts

    assert isinstance(answers, Heads)
    data, tokenizer = config.data, backbone.tokenizer
    language.check_block(data.block, backbone.model.config)
    encoded = {
        name: source and EncodedTexts(source, answers.encode(source.fields), tokenizer, data.block)
        for name, source in sources.items()
    }
    return Splits(
        train=encoded["train"],
        validation=encoded["validation"],
        test=encoded["test"],
        collate=partial(collate_texts, pad_token_id=tokenizer.pad_token_id),
        classes=(),
        answers=answers,
        fingerprint=f"{sources['train'].fingerprint}:{tokenizer_digest(tokenizer)}:{data.block}",
        lengths=[len(row) for row in encoded["train"].tokens],
        summary={"rows": {name: len(source) for name, source in sources.items() if source is not None}},
        remarks=remarks_of(sources),
    )
