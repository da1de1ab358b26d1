"""Opens the splits that a configuration names, as data sets of the loop."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from toast.training.answer_kinds import Answers, ClassAnswers, TokenAnswers
from toast.training.backbones import Backbone
from toast.training.many_heads import Heads, answers_of
from toast.training.run_config import RunConfig

Collate = Callable[[Sequence[Any]], dict[str, Any]]


@dataclass
class Splits:
    """The data of a run: map-style data sets, keys of the training split being (epoch, index).

    Args:
        train: What is trained on.
        validation: What selects; None if nothing does.
        test: What is measured once; None if there is none.
        collate: Makes a batch of samples.
        classes: Vision: names of the labels; empty for language and where heads are configured.
        answers: What a model's outputs are held against.
        fingerprint: Identifies the training samples and what is done to them.
        lengths: Language: tokens of each training row; None where all have one shape.
        summary: Figures to show.
        further: Vision: other splits that are measured at the end, by name.
        corrupted: Vision: the test split made worse, by corruption and severity.
        remarks: What is unusual about the data, but does not stop a run.
    """

    train: Any
    validation: Any | None
    test: Any | None
    collate: Collate
    classes: tuple[str, ...]
    answers: Answers
    fingerprint: str
    lengths: list[int] | None
    summary: dict[str, Any]
    further: dict[str, Any] = field(default_factory=dict)
    corrupted: dict[str, dict[int, Any]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def held_out(self) -> dict[str, Any]:
        """The splits that can be measured, by name."""
        own = {"validation": self.validation, "test": self.test}
        return {name: data for name, data in own.items() if data is not None} | self.further


def vision_sources(config: RunConfig) -> dict[str, Any]:
    """Opens and checks the sources of all splits: `train`, `validation`, `test`, and further ones by name.

    Raises:
        ValueError: If one is missing or malformed, with file, row and reason.
    """
    from toast.data import vision

    data = config.data

    def opened(split: str) -> Any:
        source = vision.open_vision(data.source, root=data.root, name=data.name, split=split, **data.options)
        if not (source.classes or config.heads):
            columns = ", ".join(() if source.fields is None else source.fields.columns)
            raise ValueError(
                f"data.source: {source.name} has columns of targets, {columns}, and no classes; needs heads, "
                "such as heads.NAME.kind=regression."
            )
        source.remarks = vision.check(source, by_class=not config.heads)
        return source

    sources: dict[str, Any] = {"train": opened(data.train), "validation": None, "test": None}
    if data.validation is not None:
        sources["validation"] = opened(data.validation)
    elif data.validation_share:
        share = data.validation_share
        sources["train"], sources["validation"] = vision.split_validation(
            sources["train"], share, config.seed
        )
    if data.test is not None:
        sources["test"] = opened(data.test)
    elif data.test_share:
        raise ValueError("data.test_share is for text; name the test split of images with data.test.")
    for split in config.evaluation.splits:
        if split in sources:
            raise ValueError(f"evaluation.splits: {split} is set by data.{split}.")
        sources[split] = opened(split)
    if (config.evaluation.corruptions or config.evaluation.corruption) and sources["test"] is None:
        raise ValueError("evaluation.corruptions: these measure the test split; name one with data.test.")
    for name, source in sources.items():
        if source is None:
            continue
        limit = data.limit if name == "train" else config.evaluation.limit or data.limit
        sources[name] = source.subset(some(len(source), limit))
        if source.classes != sources["train"].classes:
            raise ValueError(
                f"data: the {name} split has {len(source.classes)} classes, the training split "
                f"{len(sources['train'].classes)}, or others; needs the same ones in the same order."
            )
        if name != "train" and (remark := vision.repeated(sources["train"], sources[name])):
            sources[name].remarks = (*sources[name].remarks, remark)
    return sources


def vision_answers(config: RunConfig, train: Any, record: Any = None) -> Answers:
    """Returns what a model's outputs are held against: the classes of the training split, or its heads.

    Args:
        config: The run's configuration.
        train: The source of the training split.
        record: Of heads: what a run has recorded of them; None makes them from the training split.
    """
    if config.heads:
        return head_answers(config, train, record)
    return ClassAnswers(train.classes, config.label_smoothing)


def head_answers(config: RunConfig, train: Any, record: Any = None) -> Answers:
    """Returns the configured heads, see `vision_answers`.

    Raises:
        ValueError: If the training split lacks a column, or its values are not what the head needs.
    """
    return (
        answers_of(config, record)
        if record
        else Heads.fit(config.heads, train.fields, config.label_smoothing)
    )


def vision_splits(
    config: RunConfig, sources: dict[str, Any], backbone: Backbone, answers: Answers | None = None
) -> Splits:
    """Makes data sets of the sources, for a backbone's images.

    Args:
        config: The run's configuration.
        sources: Of `vision_sources`.
        backbone: How pictures are prepared.
        answers: What a model's outputs are held against; None is `vision_answers`.
    """
    from toast.data import vision

    answers = answers or vision_answers(config, sources["train"])

    def labels(source: Any) -> Any:
        return answers.encode(source.fields) if isinstance(answers, Heads) else None

    known = [field.name for field in fields(vision.Augmentation)]
    unknown = sorted(set(config.augment.options) - set(known))
    if unknown:
        raise ValueError(f"augment.options: needs some of {', '.join(known)}; got {', '.join(unknown)}.")
    augmentation = replace(vision.Augmentation.preset(config.augment.preset), **config.augment.options)
    plain = vision.transforms(backbone.data, train=False, augment=augmentation)
    varied = vision.transforms(backbone.data, train=True, augment=augmentation)
    train = vision.VisionDataset(
        sources["train"], varied, config.seed, augmented=not augmentation.is_none, views=config.augment.views,
        labels=labels(sources["train"]),
    )  # fmt: skip
    targets = config.evaluation.attention_on_target
    held_out = {
        name: sources[name]
        and vision.VisionDataset(
            sources[name],
            plain,
            config.seed,
            augmented=False,
            with_targets=targets,
            labels=labels(sources[name]),
        )
        for name in sources
        if name != "train"
    }

    def corrupted(name: str, severity: int) -> Any:
        mean, std = backbone.data["mean"], backbone.data["std"]
        return vision.Corrupted(held_out["test"], name, severity, mean, std)

    if config.evaluation.corruption is not None:
        name, _, severity = config.evaluation.corruption.partition(":")
        held_out["test"] = corrupted(name, int(severity))
    counts = {name: len(source) for name, source in sources.items() if source is not None}
    return Splits(
        train=train,
        validation=held_out["validation"],
        test=held_out["test"],
        collate=vision.collate,
        classes=() if config.heads else sources["train"].classes,
        answers=answers,
        fingerprint=f"{sources['train'].fingerprint}:{augmentation}:{config.augment.views}:{backbone.data}",
        lengths=None,
        summary={"images": counts, **({} if config.heads else {"classes": len(sources["train"].classes)})},
        further={name: held_out[name] for name in config.evaluation.splits},
        corrupted={
            name: {severity: corrupted(name, severity) for severity in severities}
            for name, severities in config.evaluation.corruptions.items()
        },
        remarks=remarks_of(sources),
    )


def language_splits(config: RunConfig, backbone: Backbone) -> Splits:
    """Opens the splits of a language model's data.

    Raises:
        ValueError: As `vision_sources`.
    """
    from toast.data import language

    data = config.data
    language.check_block(data.block, backbone.model.config)

    def opened(split: str) -> Any:
        options: dict[str, Any] = {"path": data.root, "name": data.name, "split": split, **data.options}
        if data.source != "hub":
            options |= {"name": None} | place_of_split(data.root, split, split == data.train)
        return language.open_language(
            data.source, backbone.tokenizer, block=data.block, packing=data.packing, template=data.template,
            limit=data.limit, streaming=data.streaming, **options,
        )  # fmt: skip

    train = opened(data.train)
    splits: dict[str, Any] = {"validation": None, "test": None}
    for name, share in (("test", data.test_share), ("validation", data.validation_share)):
        given = getattr(data, name)
        if given is not None:
            splits[name] = opened(given)
        elif share:
            train, splits[name] = held_out_rows(train, share, name, config.seed)
    validation, test = splits["validation"], splits["test"]
    pad = backbone.tokenizer.pad_token_id
    pad = backbone.tokenizer.eos_token_id if pad is None else pad
    rows = {n: len(s) for n, s in (("train", train), ("validation", validation), ("test", test)) if s}
    return Splits(
        train=Keyed(train),
        validation=validation and Keyed(validation),
        test=test and Keyed(test),
        collate=partial(language.collate, pad_token_id=pad),
        classes=(),
        answers=TokenAnswers(config.label_smoothing),
        fingerprint=train.fingerprint,
        lengths=train.lengths,
        summary={"rows": rows, **train.summary},
        remarks=remarks_of({"train": train, "validation": validation, "test": test}),
    )


def place_of_split(root: Path | None, split: str, is_train: bool) -> dict[str, Any]:
    """Returns path and split of language files.

    The training split is `root`, or in it where that is a folder; others lie beside it, or in it as well.
    """
    is_folder = root is not None and root.is_dir()
    if is_train:
        return {"path": root, "split": split if is_folder else "train"}
    beside = Path(split) if root is None else root.parent / split
    if is_folder and not beside.exists():
        return {"path": root, "split": split}
    return {"path": beside, "split": None}


def remarks_of(splits: dict[str, Any]) -> tuple[str, ...]:
    """Returns what the splits say is unusual about them, each once."""
    remarked: dict[str, list[str]] = {}
    for name, data in splits.items():
        for remark in () if data is None else data.remarks:
            remarked.setdefault(remark, []).append(name)
    return tuple(f"{', '.join(names)}: {remark}" for remark, names in remarked.items())


def held_out_rows(rows: Any, share: float, name: str, seed: int) -> tuple[Any, Any]:
    """Cuts a share of rows off, at random but always the same ones."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    held = round(share * len(rows))
    if not 0 < held < len(rows):
        raise ValueError(f"data.{name}_share: {share} of {len(rows)} rows leaves one side empty.")
    return rows.subset(sorted(order[held:])), rows.subset(sorted(order[:held]))


class Keyed:
    """Rows that are the same in every epoch, with their index."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """Returns a row; an epoch in the key changes nothing."""
        index = key[1] if isinstance(key, tuple) else key
        return {**self.rows[index], "index": index}


def some(count: int, limit: int | None) -> list[int]:
    """Returns the indices of some samples: all, or as many as wanted, spread over the split."""
    if limit is None or limit >= count:
        return list(range(count))
    return [index * count // limit for index in range(limit)]
