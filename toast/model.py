"""The tuner class that PEFT calls: puts the adapter layers in, and takes them out again."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from toast import checking, following, loading, pretrained, registration, saving
from toast.adapter import Adapter
from toast.anatomy import Anatomy, find_anatomy, unwrapped
from toast.config import ToastConfig
from toast.initial import with_initial
from toast.layer import CANNOT_MERGE, ToastLayer, refuse_several
from toast.layouts import fresh_weight_like
from toast.names import without_adapter_name
from toast.selector import ToastSelector
from toast.steering import SteeredMethod, Steering
from toast.value import ToastValue

logger = logging.getLogger(__name__)


class ToastModel(BaseTuner):
    """Wraps a frozen transformer with TOAST (arXiv 2305.15542).

    Made by `toast.wrap`, `peft.get_peft_model`, `PeftModel.from_pretrained` or transformers' `load_adapter`.
    """

    prefix = "toast_"
    tuner_layer_cls = ToastLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # the family table says what is targeted

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        # Before PEFT enters the new configuration, maybe in the place of one of the same name.
        _refuse_second_wrapping(model, adapter_name)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter to a model; if anything fails the model is as it was.

        Raises:
            ValueError: If the model or the configuration cannot be used, with the reason.
        """
        before = loading.Snapshot(model)
        try:
            self._inject(model, adapter_name, *args, **kwargs)
        except BaseException:
            before.restore()
            self.peft_config.pop(adapter_name, None)
            if not self.peft_config:
                # transformers sets it before it asks PEFT, and would then refuse a second try.
                model.__dict__.pop("_hf_peft_config_loaded", None)
            raise

    def _inject(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # A configuration object may serve several models; what is filled in below belongs to one.
        config = self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        assert isinstance(config, ToastConfig)
        anatomy = find_anatomy(model, config.anatomy)
        pretrained.follow_pretrained(config)
        checking.check_config(config, anatomy)
        _refuse_unknown_modules(model, config.modules_to_save)
        _refuse_steered_modules(anatomy, config.modules_to_save)
        steered = anatomy.from_block(config.steer_from)
        if (call := loading.current()) is not None:
            call.check(model, config, steered)
        config.checksums = None  # of files, not of what the model will hold
        frozen = pretrained.pretrained_tensors(config, steered, checking.fingerprint(anatomy))
        had_layers = any(isinstance(module, ToastLayer) for module in model.modules())
        self._anatomy = steered
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            del self._anatomy
        if not had_layers:
            _attach(model, anatomy)
        steering = find_steering(model)
        assert steering is not None
        steering.refresh()
        pretrained.load_pretrained(model, adapter_name, frozen)
        self._pretrained = {adapter_name: frozen}
        if anatomy.guessed is not None:
            _prove(model, anatomy)
            config.anatomy = anatomy.guessed

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter active.

        Raises:
            ValueError: If more than one TOAST adapter is named; nothing has changed then.
        """
        refuse_several([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Casts as PEFT does, which makes what it casts trainable, and has rounded what was read before."""
        steering = find_steering(self.model)
        if steering is not None:
            pretrained.put_back(self.model, self.__dict__.pop("_loaded", {}))
            # PEFT dispatches a split model again once it has loaded.
            steering.fetch_parameters(needs_gradients=False)
        trainable = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trainable[name])
        pretrained.load_pretrained(
            self.model, adapter_name, self.__dict__.pop("_pretrained", {}).get(adapter_name, {})
        )

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, ToastConfig)
        peft_config.target_modules = self._anatomy.target_modules
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, ToastConfig)
        anatomy = self._anatomy
        is_norm = current_key == anatomy.norm_name
        fresh = fresh_weight_like(anatomy.values[-1] if is_norm else unwrapped(target))
        if fresh["device"].type == "meta":  # of a base that is offloaded in part, PEFT has removed the hooks
            held = (*self.model.parameters(), *self.model.buffers())
            fresh["device"] = next((t.device for t in held if not t.is_meta), fresh["device"])
        if isinstance(target, ToastSelector | ToastValue):
            target.update_layer(adapter_name, peft_config, fresh)
            target.train(target.training)
            return
        layer: ToastSelector | ToastValue
        if is_norm:
            layer = ToastSelector(target, anatomy.width, anatomy.family.reads, anatomy.family.tokens)
        else:
            unit = next(unit for unit in anatomy.units if unit.name == current_key)
            layer = ToastValue(target, unit, anatomy.family.tokens, anatomy.family.functional)
        layer.update_layer(adapter_name, peft_config, fresh)
        layer.train(target.training)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's own looks for a device at the weights of `child`; a norm may have none, and ours are placed.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's way to use several adapters in one batch, which needs a first pass for each."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: TOAST cannot use several adapters in one batch; call once for each."
            )
        yield

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            raise ValueError(CANNOT_MERGE)
        steering = find_steering(self.model)
        if steering is not None:
            steering.detach()
        return super()._unload_and_optionally_merge(merge=False)  # type: ignore[no-any-return]

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        assert isinstance(config, ToastConfig)
        return saving.tensors_to_save(model, config, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return without_adapter_name(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        assert isinstance(config, ToastConfig)
        state_dict = with_initial(state_dict)
        checking.check_tensors(model, config, adapter_name, state_dict)
        loading.check_values(model, state_dict)
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        remapped |= pretrained.frozen_tensors(model, config, adapter_name)
        if getattr(model, "hf_device_map", None) is not None and isinstance(model, PeftModel):
            # PEFT dispatches the model again when they are in, and loses them; see _cast_adapter_dtype.
            model.base_model._loaded = {n.removeprefix("base_model.model."): t for n, t in remapped.items()}
        return remapped


def find_steering(model: nn.Module) -> Steering | None:
    """Returns the parts of a wrapped model that take part in the two passes; None if it is not wrapped."""
    for module in model.modules():
        for attribute in module.__dict__.values():
            if isinstance(attribute, SteeredMethod):
                return attribute.steering
    return None


def active_parts(model: nn.Module, what: str) -> tuple[Steering, Adapter]:
    """Returns the same of a model that has to be wrapped, and its active adapter.

    Args:
        model: The model.
        what: What needs it, for the message.

    Raises:
        ValueError: If it is not.
    """
    steering = find_steering(model)
    adapter = None if steering is None else steering.adapter
    if steering is None or adapter is None:
        raise ValueError(f"{what} needs a model with an active TOAST adapter; wrap it with toast.wrap first.")
    return steering, adapter


def _attach(model: nn.Module, anatomy: Anatomy) -> None:
    selector = model.get_submodule(anatomy.norm_name)
    assert isinstance(selector, ToastSelector)
    Steering(model, anatomy, selector).attach()


def _prove(model: nn.Module, anatomy: Anatomy) -> None:
    """Shows on the live model that a guessed row is right.

    Raises:
        ValueError: If it is not, or that cannot be shown.
    """
    from toast.probing import probe

    what = (
        f"{type(model).__name__} is of no known family; by names and shapes its parts are {anatomy.guessed}"
    )
    instead = "Say where its parts are with toast.register_family or ToastConfig(anatomy={...})."
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{what}, which cannot be proved while weights are on the meta device. {instead}")
    try:
        result = probe(model)
    except (ValueError, RuntimeError, TypeError, AssertionError, StopIteration) as error:
        raise ValueError(f"{what}, which could not be proved: {error} {instead}") from error
    if not result.proved:
        raise ValueError(f"{what}, which is wrong:\n{result}\n{instead}")
    logger.warning("%s, as a probe shows:\n%s", what, result)


def _refuse_second_wrapping(model: nn.Module, adapter_name: str) -> None:
    if any(isinstance(module, BaseTuner) for module in model.modules()):
        raise ValueError(
            f"this {type(model).__name__} is wrapped by PEFT already; add another adapter with "
            "model.add_adapter(name, config), or take the first off with model.unload()."
        )
    _refuse_foreign_adapters(model)
    if any(adapter_name in module.configs for module in model.modules() if isinstance(module, ToastLayer)):
        raise ValueError(
            f"this model has an adapter {adapter_name!r} already, which would be lost; choose another name, "
            "or take the first off with delete_adapter or unload()."
        )


def _refuse_unknown_modules(model: nn.Module, modules_to_save: list[str] | None) -> None:
    """Refuses names that PEFT would ignore; it adds some of its own for classifiers, so one must fit."""
    names = [name for name, _ in model.named_modules()]
    if modules_to_save and not any(name.endswith(wanted) for name in names for wanted in modules_to_save):
        raise ValueError(
            f"modules_to_save: {type(model).__name__} has no module "
            f"{' or '.join(map(repr, modules_to_save))}; its children are "
            f"{', '.join(name for name, _ in model.named_children())}."
        )


def _refuse_steered_modules(anatomy: Anatomy, modules_to_save: list[str] | None) -> None:
    """Refuses to keep modules that are, or hold, what TOAST wraps."""
    for steered in (anatomy.norm_name, *anatomy.value_names):
        parts = steered.split(".")
        holders = [".".join(parts[: end + 1]) for end in range(len(parts))]
        for wanted in modules_to_save or ():
            if any(holder.endswith(wanted) for holder in holders):
                raise ValueError(
                    f"modules_to_save: {wanted!r} is or holds {steered!r}, which TOAST wraps and needs "
                    "frozen. Name other modules, such as the head."
                )


def _refuse_foreign_adapters(model: nn.Module) -> None:
    """Refuses bases that carry unmerged adapters of another method."""
    own = {
        id(part) for module in model.modules() if isinstance(module, ToastLayer) for part in module.modules()
    }
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and id(module) not in own:
            raise ValueError(
                "the base model already carries an adapter of another method "
                f"({type(module).__name__} at {name!r}). TOAST stands on a plain frozen model: merge that "
                "adapter first (merge_and_unload) or unload it."
            )


registration.register(ToastConfig, ToastModel)
following.follow()
