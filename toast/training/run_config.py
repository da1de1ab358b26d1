"""The settings of a run: each with its default and what it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from toast.evaluation.choosing import CHOOSING
from toast.training.format_config import FormatConfig, refuse_unanswered
from toast.training.head_config import HeadConfig, measures_of
from toast.training.method_config import MethodConfig, refuse_missing
from toast.training.method_table import names_of
from toast.training.setting_types import SECTION, Integer, Name, Number, Positive, Share, as_precision
from toast.training.sweep_config import StudyConfig, SweepConfig


class _Section(BaseModel):
    """Settings that belong together."""

    model_config = SECTION


class ModelConfig(_Section):
    """The frozen backbone.

    Args:
        library: `timm`, `transformers`, or `demo` for the small ViT that the package ships.
        name: Name of the model in the library, or a folder or Hub name for transformers.
        pretrained: Whether the library loads its weights.
        weights: A safetensors or PyTorch file with the weights, instead of the library's own (timm).
        options: Further arguments of the library's constructor, such as `img_size`.
        dtype: Precision of the frozen weights; what is trained stays float32.
    """

    library: Literal["timm", "transformers", "demo"] = "timm"
    name: str | None = None
    pretrained: bool = True
    weights: Path | None = None
    options: dict[str, Any] = {}
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _named(self) -> ModelConfig:
        if self.library != "demo" and self.name is None:
            raise ValueError("name: needs the name of a model, such as vit_base_patch16_224.augreg_in21k")
        return self


class DataConfig(_Section):
    """Where samples come from.

    Args:
        source: Vision: `folder`, `hub`, `torchvision`, `fgvc`, `vtab`, `demo`. Language: `text`, `alpaca`,
            `sharegpt`, `messages`, `hub`.
        root: Folder of the data.
        name: Name within the source, such as `CIFAR100`, `cub`, or that of a Hub data set.
        train: Name of the split that is trained on.
        validation: Name of the split that selects; None cuts `validation_share` from the training split.
        validation_share: Share of the training split, by class for vision, that is held out to select.
            0 trains on everything and selects nothing.
        test: Name of the split that is measured once, at the end; None has none. Of language files, `train`
            is `root` itself, and `validation` and `test` are files beside it, or splits in it if that is a
            folder.
        test_share: Language: share of the training rows that is held out as the test split, if none is named.
        options: Further options of the source.
        block: Tokens of a row (language).
        packing: `blocks` joins documents and cuts them; `documents` packs whole documents into a row, with
            attention inside each; `none` is a document a row (language).
        template: `chat` for the tokenizer's chat template, else the source's own (language).
        limit: Only so many samples of each split; None takes all.
        streaming: Read a Hub data set as it comes (language).
        bad_share: Share of the training images that may be unreadable before the run stops.
    """

    source: str
    root: Path | None = None
    name: str | None = None
    train: str = "train"
    validation: str | None = None
    validation_share: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    test: str | None = None
    test_share: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    options: dict[str, Any] = {}
    block: Annotated[Integer, Field(gt=1)] = 512
    packing: Literal["blocks", "documents", "none"] = "blocks"
    template: str | None = None
    limit: Annotated[Integer, Field(gt=0)] | None = None
    streaming: bool = False
    bad_share: Share = 0.01


class AugmentConfig(_Section):
    """How training images are varied, by timm.

    Args:
        preset: `none` (resize and centre crop), `flip`, `crop-flip`, `randaugment`.
        options: Fields of the preset to change, such as `scale`, `color_jitter`, `re_prob`.
        views: A fixed number of variants a sample, so that they can be stored; None draws anew each epoch.
    """

    preset: Literal["none", "flip", "crop-flip", "randaugment"] = "none"
    options: dict[str, Any] = {}
    views: Annotated[Integer, Field(gt=0)] | None = None


class OptimizerConfig(_Section):
    """Optimiser and schedule, both timm's.

    Args:
        name: Name of the optimiser in timm, such as `adamw`, `sgd`, `lion`.
        learning_rate: Peak rate of a head and of other methods' parameters; the rates of TOAST's groups
            follow from it, see `toast.parameter_groups`.
        rates: Peak rates of single groups as they are, such as `{head: 3e-3, to_state: 1e-4}`.
        scaled: Whether the rates of TOAST's groups are scaled; else they are `learning_rate`. None is by the
            optimiser: yes, unless its steps follow the gradient (SGD) or are made of a whole matrix (Muon).
        weight_decay: Of the matrices; vectors, biases and maps that start as the identity have none.
        momentum: Of SGD.
        options: Further arguments of the optimiser.
        schedule: `cosine`, `linear` or `constant`, after the warm-up.
        warm_up: Share of all steps over which the rate rises from 0.
        least: Rate at the end, as a share of the peak.
        clip: Greatest norm of all gradients together; None does not clip.
    """

    name: str = "adamw"
    learning_rate: Positive = 1e-3
    rates: dict[str, Positive] = {}
    scaled: bool | None = None
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    momentum: Share = 0.9
    options: dict[str, Any] = {}
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warm_up: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    least: Share = 0.0
    clip: Positive | None = 1.0


class FirstPassConfig(_Section):
    """Whether what the frozen backbone computes of a sample is stored and read again in every epoch.

    For TOAST that is its first pass, for the linear probe the features before the head, for the attentive one
    the final tokens. Without augmentation
    (or with a fixed number of views) and dropout the losses are those of a run that computes it.

    Args:
        mode: `computed` each time, `cached`, or `auto`: cached where nothing speaks against it and it needs
            less than `limit`.
        folder: Where it is stored, under a name made of what it is a function of: the backbone's weights, the
            data, what is done to them, the adapter's settings, the precision. None is `out/first-pass`.
        limit: Largest size in GiB that `auto` stores.
    """

    mode: Literal["computed", "cached", "auto"] = "computed"
    folder: Path | None = None
    limit: Positive = 4.0


class EvaluationConfig(_Section):
    """What is measured.

    Args:
        every: Epochs between measurements on the validation split; 0 measures at the end only.
        before: Measure validation and test split, of which there are, once more before the first step.
        batch_size: Samples at a time over all processes; None is twice the training batch.
        attention_on_target: Vision with boxes: measure how much attention falls into them.
        predictions: Write each test sample's prediction.
        splits: Vision: further splits that are measured once, at the end, such as one of another origin.
        corruption: Vision: what the test split is measured under instead of as it is, with its severity, such
            as `blur:3`; for one measurement of a run that has ended.
        corruptions: Vision: what the test split is measured under once more at the end, with severities from
            1 to 5, such as `{noise: [1, 3, 5], blur: [3]}`; see `toast.data.vision.corrupting`.
        format: Language: a format that answers generated for the test split have to keep.
        limit: Only so many samples of each split.
    """

    every: Annotated[Integer, Field(ge=0)] = 1
    before: bool = False
    batch_size: Annotated[Integer, Field(gt=0)] | None = None
    attention_on_target: bool = True
    predictions: bool = False
    splits: list[str] = []
    corruption: Annotated[str, Field(pattern=r"^\w+:\d$")] | None = None
    corruptions: dict[str, list[Integer]] = {}
    format: FormatConfig | None = None
    limit: Annotated[Integer, Field(gt=0)] | None = None


class CheckpointConfig(_Section):
    """When a run can be resumed from.

    Args:
        every: Steps between checkpoints; None writes one at the end of each epoch.
        keep: How many of the newest are kept.
        best: Measure of the validation split; what was trained when it was best (of `loss`, `perplexity` and
            `calibration_error` the least, of others the greatest) is measured and saved at the end, instead
            of the last. It is held in memory and in each checkpoint.
        patience: Measurements without a better `best` after which training is over.
    """

    every: Annotated[Integer, Field(gt=0)] | None = None
    keep: Annotated[Integer, Field(gt=0)] = 1
    best: str | None = None
    patience: Annotated[Integer, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> CheckpointConfig:
        if self.patience is not None and self.best is None:
            raise ValueError("patience: needs best, the measure that has to get better, such as accuracy")
        return self


class RunConfig(_Section):
    """All settings of a run.

    Args:
        name: Name of the run; its folder is `out/name`.
        task: `vision` or `language`.
        heads: Targets by name, instead of one label a picture or of the next token: classes, numbers, several
            labels. Of text, the model is then a classifier (`AutoModelForSequenceClassification`).
        stage: `pretune` or `tune`, if the file is for one of them only.
        out: Folder of run folders.
        epochs: Passes over the training split; not with `steps`.
        steps: Optimiser steps.
        batch_size: Samples of an optimiser step, over all processes and micro-batches.
        micro_batches: In how many parts a step's batch is computed (gradient accumulation).
        seed: Of parameters, order, augmentation and dropout.
        precision: `no`, `bf16` or `fp16`; None is what `accelerate launch` says, or that of the frozen
            weights.
        checkpointing: Activation checkpointing: less memory, one more forward.
        workers: Processes that load data.
        log_every: Steps between logged losses.
        trackers: Of Accelerate; `tensorboard` writes into the run folder, `wandb` and `trackio` if installed.
        label_smoothing: Of the cross-entropy (vision).
        on_nonfinite: What a loss or gradient that is not finite does: `stop` ends the run with a checkpoint
            from before; `skip` leaves such steps out, counts and names them.
        reconstruction_weight: Pre-tuning: factor of the reconstruction loss; None is the adapter's.
    """

    name: Name = "run"
    task: Literal["vision", "language"] = "vision"
    stage: Literal["pretune", "tune"] | None = None
    out: Path = Path("runs")
    model: ModelConfig
    data: DataConfig
    heads: dict[Name, HeadConfig] = {}
    augment: AugmentConfig = AugmentConfig()
    method: MethodConfig = MethodConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    first_pass: FirstPassConfig = FirstPassConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sweep: SweepConfig | None = None
    study: StudyConfig | None = None
    epochs: Annotated[Integer, Field(gt=0)] | None = None
    steps: Annotated[Integer, Field(gt=0)] | None = None
    batch_size: Annotated[Integer, Field(gt=0)] = 32
    micro_batches: Annotated[Integer, Field(gt=0)] = 1
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 0
    precision: Annotated[Literal["no", "bf16", "fp16"] | None, BeforeValidator(as_precision)] = None
    checkpointing: bool = False
    workers: Annotated[Integer, Field(ge=0)] = 0
    log_every: Annotated[Integer, Field(gt=0)] = 10
    trackers: list[str] = ["tensorboard"]
    label_smoothing: Share = 0.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    reconstruction_weight: Annotated[Number, Field(ge=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_heads(cls, given: Any) -> Any:
        """Names a head that a setting on top spells otherwise: it has that setting alone."""
        heads = given.get("heads") if isinstance(given, dict) else None
        if isinstance(heads, dict):
            known = [name for name, head in heads.items() if isinstance(head, dict) and "kind" in head]
            unknown = [n for n, head in heads.items() if isinstance(head, dict) and "kind" not in head]
            if unknown:
                raise ValueError(
                    f"heads.{unknown[0]}: there is no head of this name; there are "
                    f"{', '.join(known) or 'none'}. A new one needs kind: classes, regression or multilabel"
                )
        return given

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.out / self.name

    def checked_sweep(self) -> SweepConfig:
        """Returns the section of a sweep.

        Raises:
            ValueError: If there is none, no row, or nothing to select on.
        """
        if self.sweep is None or not self.sweep.rows:
            raise ValueError("sweep: needs a section with rows, such as rows: {lora: {method: lora}}.")
        has_validation = self.data.validation is not None or self.data.validation_share
        if self.sweep.searches and not has_validation:
            raise ValueError(
                "sweep: needs a validation split to select on; set data.validation, or data.validation_share."
            )
        return self.sweep

    def check_stage(self, stage: Literal["pretune", "tune"]) -> None:
        """Checks what a stage needs before model and data are opened.

        Raises:
            ValueError: If the configuration is for the other one, or what it starts from is not there.
        """
        if self.stage not in (None, stage):
            raise ValueError(f"stage: this configuration is for {self.stage}; the command is {stage}.")
        if self.method.start is not None:
            refuse_missing(self.method.start)

    def check_split(self, name: str) -> None:
        """Checks that a split can be measured by a name.

        Raises:
            ValueError: If it cannot.
        """
        names = ("validation", "test", *self.evaluation.splits)
        if name not in names:
            raise ValueError(
                f"split: needs one of {', '.join(names)}; got {name!r}. Other splits are named by "
                "evaluation.splits=[…]."
            )

    @model_validator(mode="after")
    def _goes_together(self) -> RunConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs, steps: needs one of the two; both are given")
        if self.epochs is None and self.steps is None:
            self.epochs = 1
        held_out = self.evaluation
        if self.task == "language" and (held_out.splits or held_out.corruptions or held_out.corruption):
            raise ValueError(
                "evaluation.splits, evaluation.corruptions, evaluation.corruption: for vision; the task is "
                "language"
            )
        if held_out.corruptions and held_out.corruption:
            raise ValueError("evaluation.corruption, evaluation.corruptions: needs at most one of the two")
        if held_out.format is not None:
            refuse_unanswered(self.task, self.data.source, self.data.packing, self.method.name)
        self._heads_fit()
        self._chooses_well()
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size: needs a multiple of micro_batches ({self.micro_batches}); got {self.batch_size}"
            )
        if self.first_pass.mode == "cached":
            reason = self.method.row.why_not_stored(self.task)
            if reason:
                able = names_of(lambda row: self.task in row.stores)
                raise ValueError(
                    f"first_pass: {self.method.name}: {reason}; needs mode: computed, or one of {able}"
                )
        return self

    def _heads_fit(self) -> None:
        dotted = [name for name in self.heads if "." in name]
        if dotted:
            raise ValueError(f"heads: needs names without a dot, which figures have; got {dotted[0]!r}")
        if self.heads and self.study is not None:
            raise ValueError("study: compares classifiers and language models, without heads")
        if self.heads and self.task == "language":
            if self.evaluation.format is not None:
                raise ValueError("evaluation.format: a model with heads generates no answers")
            if self.data.streaming:
                raise ValueError("data.streaming: with heads all texts are read at once; needs false")
            if self.data.packing != "none":
                raise ValueError("data.packing: with heads a row is one text; needs none")
            if not self.method.row.classifies_text:
                able = names_of(lambda row: row.classifies_text)
                raise ValueError(f"method: {self.method.name} is not offered for heads on text; needs {able}")

    def _chooses_well(self) -> None:
        best = self.checkpoint.best
        known = measures_of(self.heads) if self.heads else CHOOSING[self.task]
        if best is None:
            return
        if best not in known:
            raise ValueError(f"checkpoint.best: needs one of {', '.join(known)}; got {best!r}")
        if self.data.validation is None and not self.data.validation_share:
            raise ValueError(
                "checkpoint.best: needs a validation split; set data.validation or data.validation_share"
            )
        if not self.evaluation.every:
            raise ValueError("checkpoint.best: needs measurements on the way; evaluation.every is 0")
