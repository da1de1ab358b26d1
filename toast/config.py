"""The configuration of a TOAST adapter, a `PeftConfig`: what is steered, how, and what is trained."""

from __future__ import annotations

import copy
import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from toast import registration
from toast.files.adapter_folder import checksums_for, weights_of
from toast.files.json_files import read_json
from toast.presets import OFFICIAL

Features = Literal["normed", "unnormed", "mixed"]
Initialisation = Literal["identity", "official"]
ValueBias = Literal["once", "twice"]
FeedbackForm = Literal["auto", "per_token", "composed"]
ReconstructionForm = Literal["relative", "official"]
SteeredTokens = Literal["all", "prompt"]

#: Names of the parameter groups that can be trained. `lora` are the low-rank factors of TOAST-Lite.
GROUPS = ("task_embedding", "channel_transform", "to_state", "to_signal", "lora")


@dataclass
class ToastConfig(PeftConfig):
    """Configuration of a TOAST adapter (arXiv 2305.15542).

    Shapes: a backbone of `L` blocks and `width` channels. Symbols as in docs/design.md.

    Args:
        modules_to_save: Names of modules that are trained and saved in full beside the adapter, as in PEFT;
            for a classifier `["head"]`.
        select_features: What the selector reads: the features after the final norm (`normed`, official ViT),
            before it (`unnormed`, official LLaMA), or similarity from the normed and values from the
            un-normed features (`mixed`, official ConvNeXt). None takes the family's.
        select_from: Block, counted from 0, whose output the selector reads (through the final norm where
            `select_features` says so). The first pass ends there. None is the last block. A float
            below 1 is a share of the depth, as for `steer_from`.
        steer_from: First block, counted from 0, whose values are steered. The blocks below give the same in
            both passes, so they run once, keep one key-value cache, and backward ends above them. A float
            below 1 is a share of the depth: 0.75 steers the last quarter of the blocks, from
            block 9 of 12 or 22 of 30 on. It becomes the block's number when an adapter is made.
        steer_tokens: `all` steers every token, so a decoded token costs two passes. `prompt` steers what the
            first call with a new key-value cache brings; tokens after it run once, and attend to its steered
            keys and values. Without a cache, and so in training, all tokens are steered either way.
        value_bias: `once` computes the values of the second pass as `W_V (x + s) + b`, the paper's equation;
            `twice` as `W_V x + b + W_V s + b`, the official ViT code. Where the projections have a bias, a
            model with `twice` differs from the frozen one before any training.
        init: `identity` starts without a signal (`to_state` identity, `to_signal` zero), which is exactly the
            frozen model unless `value_bias="twice"` adds a bias; `official` draws both from a normal
            distribution of deviation 0.02, truncated at two deviations.
        lora_rank: Rank of the factors of TOAST-Lite; 0 is full TOAST.
        lora_alpha: Numerator of the LoRA scaling `lora_alpha / lora_rank` (official: 1). None is four times
            the rank.
        lora_dropout: Dropout before the LoRA factors.
        pretrained: Folder of the pre-tuned full adapter whose feedback a Lite adapter freezes. With
            `save_frozen=False` it is needed again at loading.
        save_frozen: Whether a saved Lite adapter holds its frozen feedback, but for what `init` makes again.
            If not, it names `pretrained` and `feedback_checksum`, and loading checks them.
        feedback_checksum: SHA-256 over the frozen feedback weights. Set when the adapter is saved or loaded.
        train: Names of the trained groups, of `GROUPS`, or `"all"`. None is everything that is not frozen
            by the Lite variant: task embedding, channel transform, and the feedback or its LoRA factors.
        feedback_form: How the linear feedback is computed: `per_token`, `composed` (in weight space), or
            `auto` for the cheaper one. Does not affect results beyond rounding.
        reconstruction_form: `relative` takes each token's error by the size of its states and the mean over
            blocks, so that it starts at about 1 for every backbone; `official` the sum of mean squared
            errors. See `toast.reconstruction_loss`. None is `relative`, or `official` for an adapter that
            was saved before there was a choice.
        reconstruction_weight: λ, factor of the reconstruction loss in pre-tuning (official: ViT 0.1, LLaMA 1,
            ConvNeXt 0.01, with the official form).
        reconstruction_scale: Factor on both sides of the difference in the official form (official: ViT 1,
            LLaMA 0.1).
        anatomy: For a family that is not known: `{"blocks": "encoder.layer", "value": "attention.value",
            "norm": "encoder.norm", "layout": "separate"}`, names relative to `"trunk"` (default: the model
            itself), `value` relative to a block; optional `"methods"`, the trunk's methods to steer.
        target_modules: Names of the modules that are wrapped, as in PEFT. They follow from the family and
            `steer_from`: leave it, or name exactly these.
        backbone: What the adapter was made for: family, blocks, widths, and a few of its weights. Filled when
            an adapter is made, checked when it is loaded; None skips the check.
        family: Name of the family row that was used. Filled from the model.
        checksums: By name of a saved tensor, its type and the CRC-32 over its bytes. Filled when the adapter
            is saved, compared before it is loaded. A tensor of another type, which was converted since, and
            one without an entry are not compared.

    Raises:
        ValueError: If a setting is none of the allowed, with the allowed ones.
    """

    modules_to_save: list[str] | None = None
    select_features: Features | None = None
    select_from: int | float | None = None
    steer_from: int | float = 0
    steer_tokens: SteeredTokens = "all"
    value_bias: ValueBias = "once"
    init: Initialisation = "identity"
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    pretrained: str | None = None
    save_frozen: bool = True
    feedback_checksum: str | None = None
    train: list[str] | Literal["all"] | None = None
    feedback_form: FeedbackForm = "auto"
    reconstruction_form: ReconstructionForm | None = None
    reconstruction_weight: float = 1.0
    reconstruction_scale: float = 1.0
    anatomy: dict[str, Any] | None = None
    target_modules: list[str] | str | None = field(default=None)
    backbone: dict[str, Any] | None = None
    family: str | None = None
    checksums: dict[str, str] | None = field(default=None, compare=False)

    #: The checksums of the tensors that were last asked for, until the configuration is written beside them.
    written: ClassVar[dict[str, str] | None] = None
    #: The folder that it was read from, if any. What is saved there is checked before a model is changed.
    folder: ClassVar[Path | None] = None
    #: What was filled in for a model, see `toast.injection.filling`: by field, the value before and after.
    filled: ClassVar[Mapping[str, tuple[Any, Any]]] = {}

    def __post_init__(self) -> None:
        """Checks the settings and fills the PEFT type."""
        super().__post_init__()
        importlib.import_module(
            "toast.model"
        )  # registers TOAST, if the order of imports has left that undone
        self.peft_type = registration.mint_peft_type()
        if isinstance(self.pretrained, Path):
            self.pretrained = str(self.pretrained)
        if self.family is not None:  # an injection has filled both in, and the configuration was saved since
            self.filled = {"target_modules": (None, self.target_modules)}  # type: ignore[misc]
        if self.reconstruction_form is None:
            # `family` is filled by an injection, which leaves no form open: one without was saved before.
            self.reconstruction_form = "relative" if self.family is None else "official"
        for name in ("select_from", "steer_from"):  # NumPy's numbers, which cannot be saved
            value = getattr(self, name)
            if isinstance(value, Real) and not isinstance(value, bool):
                setattr(self, name, int(value) if isinstance(value, Integral) else float(value))
        self._check_types()
        if self.lora_alpha is None:
            self.lora_alpha = 4.0 * self.lora_rank if self.is_lite else 1.0
        _check_choice("reconstruction_form", self.reconstruction_form, get_args(ReconstructionForm))
        if self.reconstruction_form == "relative" and self.reconstruction_scale != 1:
            raise ValueError(
                "reconstruction_scale: needs reconstruction_form='official', for a relative error has no "
                f"scale; got {self.reconstruction_scale!r}. Leave it out, and set reconstruction_weight."
            )
        _check_choice("init", self.init, get_args(Initialisation))
        _check_choice("steer_tokens", self.steer_tokens, get_args(SteeredTokens))
        _check_choice("value_bias", self.value_bias, get_args(ValueBias))
        _check_choice("feedback_form", self.feedback_form, get_args(FeedbackForm))
        _check_choice("select_features", self.select_features, (*get_args(Features), None))
        if isinstance(self.train, str) and self.train != "all":
            raise ValueError(f"train: needs 'all' or a list of {', '.join(GROUPS)}; got {self.train!r}.")
        for group in self.train or ():
            if self.train != "all":
                _check_choice("train", group, GROUPS)
        self._check_lite()

    def _check_types(self) -> None:
        """Refuses numbers out of their range and values of another type."""
        if self.select_from is not None:
            _check_place("select_from", self.select_from, "None, a block")
        _check_place("steer_from", self.steer_from, "a block")
        _check_number("lora_rank", self.lora_rank, 0, whole=True, what="0 (full TOAST) or a positive rank")
        if self.lora_alpha is not None:
            _check_number("lora_alpha", self.lora_alpha, 0, what="None or a number above 0", above=True)
        _check_number("lora_dropout", self.lora_dropout, 0, what="a probability from 0 to below 1", below=1)
        _check_number("reconstruction_weight", self.reconstruction_weight, 0, what="0 or a positive number")
        _check_number(
            "reconstruction_scale", self.reconstruction_scale, 0, what="a number above 0", above=True
        )
        for name, kind, what in (
            ("save_frozen", bool, "True or False"),
            ("modules_to_save", list, "None or a list of module names"),
            ("train", str | list, "None, 'all' or a list of groups"),
            ("pretrained", str, "None or the folder of an adapter"),
            ("feedback_checksum", str, "None or text"),
            ("family", str, "None or text"),
            ("anatomy", dict, "None or a dictionary of names"),
            ("target_modules", str | list | set | tuple, "None, a regular expression or module names"),
            ("backbone", dict, "None or a dictionary"),
            ("checksums", dict, "None or a dictionary"),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) and (value is not None or name == "save_frozen"):
                raise ValueError(f"{name}: needs {what}; got {value!r}.")
        _check_entries("checksums", self.checksums or {}, str, "text")
        known = self.backbone or {}
        sizes = {name: value for name, value in known.items() if name != "weights"}
        _check_entries("backbone", sizes, str | int, "names and sizes")
        weights = known.get("weights")
        if weights is not None and not (
            isinstance(weights, list) and all(isinstance(w, Real) for w in weights)
        ):
            raise ValueError(f"backbone: needs a list of numbers as 'weights', or None; got {weights!r}.")

    def _check_lite(self) -> None:
        """Refuses what makes sense for TOAST-Lite only, or loses what was trained."""
        if self.train not in (None, "all") and "lora" in self.train and not self.is_lite:
            raise ValueError("train: 'lora' needs TOAST-Lite; set lora_rank, for example to 4.")
        if not self.is_lite and (self.lora_alpha != 1 or self.lora_dropout):
            raise ValueError("lora_alpha and lora_dropout need TOAST-Lite; set lora_rank, for example to 4.")
        if not self.is_lite and not self.save_frozen:
            raise ValueError("save_frozen=False needs TOAST-Lite; set lora_rank, for example to 4.")
        if not self.save_frozen and {"to_state", "to_signal"} & set(self.trained_groups):
            raise ValueError(
                "save_frozen=False leaves the feedback out of the saved adapter, so it cannot be trained; "
                f"got train={self.train!r}. Leave out to_state and to_signal, or set save_frozen=True."
            )
        if not self.save_frozen and self.pretrained is None:
            raise ValueError(
                "save_frozen=False needs the folder of the pre-tuned adapter that holds the frozen feedback; "
                "pass pretrained='...', or leave save_frozen=True to keep the feedback in the adapter."
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> ToastConfig:
        """Reads a saved configuration as PEFT does, and keeps in mind where it was."""
        path = Path(pretrained_model_name_or_path, subfolder or "", CONFIG_NAME)
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            if not path.is_file():
                raise
            read_json(path)
            raise ValueError(f"{path}: {error}") from error
        if isinstance(config, ToastConfig):
            config.folder = path.parent  # type: ignore[misc]
        return config  # type: ignore[no-any-return]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes the configuration as PEFT does, with the checksums of the tensors beside it."""
        written, folder = copy.copy(self), Path(save_directory)
        saved, self.written = self.written, None  # type: ignore[misc]
        keeps = saved is None and self.checksums is not None and self.folder == folder
        if not keeps or not weights_of(folder).is_file():
            # Otherwise settings were changed, and are written where they came from.
            written.checksums = checksums_for(saved, folder)
        super(ToastConfig, written).save_pretrained(save_directory, **kwargs)

    @property
    def is_lite(self) -> bool:
        """Whether this is TOAST-Lite: frozen feedback with LoRA factors."""
        return self.lora_rank > 0

    @property
    def trained_groups(self) -> tuple[str, ...]:
        """Names of the groups that are trained, `train` resolved."""
        if self.train == "all":
            return GROUPS if self.is_lite else GROUPS[:-1]
        if self.train is not None:
            return tuple(self.train)
        return ("task_embedding", "channel_transform", "lora") if self.is_lite else GROUPS[:-1]

    @classmethod
    def official(cls, variant: str, **options: Any) -> ToastConfig:
        """Returns the settings of an official variant, with `options` on top.

        Args:
            variant: `vision`, `language` or `convnext`, or one of these with `-lite`.
            **options: Fields that override the variant's.

        Raises:
            ValueError: If there is no such variant, or an option is unknown.
        """
        _check_choice("variant", variant, tuple(OFFICIAL))
        return make_config({"init": "official"} | OFFICIAL[variant] | options)


def make_config(options: dict[str, Any]) -> ToastConfig:
    """Returns a configuration from keyword options.

    Raises:
        ValueError: If an option is no field of `ToastConfig`; it names the nearest ones and all.
    """
    known = {f.name for f in fields(ToastConfig)}
    unknown = sorted(set(options) - known)
    if unknown:
        near = [name for option in unknown for name in difflib.get_close_matches(option, known, n=1)]
        guess = f" Did you mean {', '.join(near)}?" if near else ""
        own = ", ".join(f for f in ToastConfig.__annotations__ if f in known)
        raise ValueError(
            f"unknown option {', '.join(unknown)}.{guess} The options of ToastConfig are: {own}."
        )
    return ToastConfig(**options)


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: needs one of {', '.join(map(repr, allowed))}; got {value!r}.")


def _check_entries(name: str, held: dict[Any, Any], kind: Any, what: str) -> None:
    for key, value in held.items():
        if not isinstance(key, str) or not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(  # noqa: TRY004 - an entry is wrong, not the type of the argument
                f"{name}: needs names with {what}; got {value!r} at {key!r}."
            )


def _check_place(name: str, value: object, what: str) -> None:
    what = f"{what} counted from 0, or a share of the depth from 0.0 to below 1.0"
    whole = isinstance(value, int)
    _check_number(name, value, 0, whole=whole, below=float("inf") if whole else 1, what=what)


def _check_number(
    name: str,
    value: object,
    least: float,
    what: str,
    whole: bool = False,
    above: bool = False,
    below: float = float("inf"),
) -> None:
    fits = isinstance(value, int if whole else Real) and not isinstance(value, bool)
    if not fits or not least <= value < below or (above and value == least):  # type: ignore[operator]
        raise ValueError(f"{name}: needs {what}; got {value!r}.")
