"""The tuner class that PEFT calls: puts the adapter layers in, and takes them out again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from toast import registration
from toast.config import ToastConfig
from toast.families.anatomy import Anatomy, find_anatomy, unwrapped
from toast.families.layouts import fresh_weight_like
from toast.files.json_files import few
from toast.injection import filling, fitting, following, loading, pretrained, shares
from toast.injection.refusing import (
    HEADS,
    refuse_clashes,
    refuse_names,
    refuse_second_wrapping,
    refuse_steered_modules,
    refuse_unknown_modules,
    warn_of_second_bias,
)
from toast.layer import CANNOT_MERGE, ToastLayer, refuse_several
from toast.probing import probe
from toast.saving import contents
from toast.saving.initial import with_initial
from toast.saving.names import as_written, without_adapter_name
from toast.selector import ToastSelector
from toast.steering import Steering, find_steering
from toast.value import ToastValue

logger = logging.getLogger(__name__)

# What comes first in the names of a compiled model's modules.
_COMPILED = "_orig_mod."


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
        refuse_second_wrapping(model, adapter_name)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter to a model; if anything fails the model is as it was.

        Raises:
            ValueError: If the model or the configuration cannot be used, with the reason.
        """
        before = loading.Snapshot(model)
        config = self.peft_config[adapter_name]
        settings = dict(vars(config))
        try:
            self._inject(model, adapter_name, *args, **kwargs)
        except BaseException:
            for module in model.modules():
                if isinstance(module, ToastLayer):  # lets go of the configuration, even if an error holds it
                    module.configs = {}
            before.restore()
            vars(config).clear()
            vars(config).update(settings)
            self.peft_config.pop(adapter_name, None)
            if not self.peft_config:
                # transformers sets it before it asks PEFT, and would then refuse a second try.
                model.__dict__.pop("_hf_peft_config_loaded", None)
            raise

    def _inject(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        given = self.peft_config[adapter_name]
        assert isinstance(given, ToastConfig)
        refuse_names(model, adapter_name)
        # A configuration object may serve several models; what is filled in below belongs to one.
        config = filling.as_written(given)
        anatomy = find_anatomy(model, config.anatomy)
        if anatomy.is_plain:
            shares.place_shares(config, len(anatomy.blocks))
        pretrained.follow_pretrained(config, len(anatomy.blocks))
        fitting.check_config(config, anatomy)
        refuse_unknown_modules(model, config)
        refuse_steered_modules(anatomy, config.modules_to_save)
        assert isinstance(config.steer_from, int)  # no share any more
        steered = anatomy.from_block(config.steer_from)
        self._check_targets(model, config, steered)
        if (call := loading.current()) is not None:
            call.check(model, config, steered)
        config.checksums = None  # of files, not of what the model will hold
        frozen = pretrained.pretrained_tensors(config, steered, fitting.fingerprint(anatomy))
        if config.target_modules is None:
            config.target_modules = steered.target_modules
        config.anatomy = config.anatomy if anatomy.guessed is None else anatomy.guessed
        config = self.peft_config[adapter_name] = filling.fill(given, config, model)
        if config is not given:
            logger.warning(
                "The configuration of adapter %r is in use on another backbone; this model takes a copy.",
                adapter_name,
            )
            # PEFT writes the head of a task into the object that it has given, and looks for it in this one.
            config.modules_to_save = (
                config.modules_to_save or [*HEADS.get(config.task_type or "", ())] or None
            )
        had_layers = any(isinstance(module, ToastLayer) for module in model.modules())
        self._anatomy = steered
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            del self._anatomy
        if not had_layers:
            _attach(model, anatomy)
        names = {name for layer in model.modules() if isinstance(layer, ToastLayer) for name in layer.configs}
        for name in names:
            refuse_clashes(model, name, names - {name})
        steering = find_steering(model)
        assert steering is not None
        steering.refresh()
        pretrained.load_pretrained(model, adapter_name, frozen)
        self._pretrained = {adapter_name: frozen}
        if anatomy.guessed is not None:
            _prove(model, anatomy)
        if not frozen and "backbone" in config.filled:  # otherwise it is loaded
            warn_of_second_bias(config, steered)

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:
        """Says what is wrapped, whichever way `target_modules` names it."""
        wrapped = {self._anatomy.norm_name, *self._anatomy.value_names}
        return key in wrapped or f"{_COMPILED}{key}" in wrapped

    def _check_targets(self, model: nn.Module, config: ToastConfig, anatomy: Anatomy) -> None:
        """Refuses `target_modules` that are not what TOAST wraps."""
        if config.target_modules is None:
            return
        matches = super()._check_target_module_exists
        layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ToastLayer))
        named = {
            name
            for name, _ in model.named_modules()
            if name and not name.startswith(layers) and matches(config, name)
        }
        needed = {anatomy.norm_name, *anatomy.value_names}
        # PEFT also takes the ends of names for names, which a short one may be.
        if named != needed and (
            isinstance(config.target_modules, str) or set(config.target_modules) != needed
        ):
            raise ValueError(
                f"target_modules: needs the final norm and the value projections of the steered blocks, or "
                f"None, which takes them: {few(needed)}; {config.target_modules!r} names "
                f"{few(named) or 'none of the modules'}. Say with steer_from which blocks are steered, and "
                "with anatomy or toast.register_family where else their values are."
            )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter active.

        Raises:
            ValueError: If more than one TOAST adapter is named; nothing has changed then.
        """
        refuse_several([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes as PEFT does, which passes over two things.

        These are layers in a module of the base whose name contains the prefix of the adapters' parameters,
        and the head of the adapter that takes over, if the deleted one had none.
        """
        super().delete_adapter(adapter_name)
        layers: list[Any] = [module for module in self.model.modules() if isinstance(module, ToastLayer)]
        for layer in layers:
            if adapter_name in layer.configs:
                layer.delete_adapter(adapter_name)
                self.active_adapter = list(layer.active_adapters)
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper) and not module.active_adapters:
                for name in set(self.active_adapters) & set(module.modules_to_save):
                    module.set_adapter(name, inference_mode=self.peft_config[name].inference_mode)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Casts as PEFT does, which makes what it casts trainable, and has rounded what was read before."""
        steering, loaded = find_steering(self.model), self.__dict__.pop("_loaded", {})
        if steering is not None:
            pretrained.put_back(self.model, loaded)
            # PEFT dispatches a split model again once it has loaded.
            steering.fetch_parameters(needs_gradients=False)
        trainable = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        parameters = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            parameter.requires_grad_(trainable[name])
            if name in loaded and f".{adapter_name}." in f"{name}.":
                head = parameters.get(name.replace(f".modules_to_save.{adapter_name}.", ".original_module."))
                if head is not parameter and head is not None:  # PEFT leaves it in the file's precision
                    parameter.data = parameter.data.to(head.dtype)
                _unround(parameter, loaded[name])
        pretrained.load_pretrained(
            self.model, adapter_name, self.__dict__.pop("_pretrained", {}).get(adapter_name, {})
        )

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config  # all is filled in

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
        if current_key not in (anatomy.norm_name, *anatomy.value_names):  # PEFT names those of tensors so
            current_key = f"{_COMPILED}{current_key}"
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
        """PEFT's way to name an adapter for each sample of a batch."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.model.training:
            raise ValueError("adapter_names: is for inference. Call model.eval(), or train one by one.")
        if isinstance(names, str) or not names:
            raise ValueError(f"adapter_names: needs a list with a name for each sample; got {names!r}.")
        steering = find_steering(self.model)
        assert steering is not None
        with steering.holding_each(names):
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
        refuse_clashes(model, adapter_name, unwanted_adapter_names)  # those of other methods among them
        return contents.tensors_to_save(model, config, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return without_adapter_name(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        assert isinstance(config, ToastConfig)
        state_dict = with_initial({as_written(name): tensor for name, tensor in state_dict.items()})
        fitting.check_tensors(model, config, adapter_name, state_dict)
        loading.check_values(model, state_dict)
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        live = {as_written(name): name for name in model.state_dict()}
        remapped = {live.get(name, name): tensor for name, tensor in remapped.items()}
        remapped |= pretrained.frozen_tensors(model, config, adapter_name)
        empty = any(parameter.is_meta and name in remapped for name, parameter in model.named_parameters())
        if isinstance(model, PeftModel) and (empty or getattr(model, "hf_device_map", None) is not None):
            # When they are in, PEFT rounds those of an empty adapter to the base's precision, and loses those
            # of a model that it dispatches again; see _cast_adapter_dtype.
            model.base_model._loaded = {n.removeprefix("base_model.model."): t for n, t in remapped.items()}
        return remapped


@torch.no_grad()
def _unround(parameter: nn.Parameter, read: Tensor) -> None:
    """Gives a parameter the digits that were read from a file, if it has lost them by a cast and back."""
    if parameter.dtype != read.dtype or parameter.shape != read.shape or parameter.is_meta:
        return
    read = read.to(parameter.device)
    if any(torch.equal(parameter, read.to(low).to(read.dtype)) for low in (torch.float16, torch.bfloat16)):
        parameter.copy_(read)


def _attach(model: nn.Module, anatomy: Anatomy) -> None:
    selector = model.get_submodule(anatomy.norm_name)
    assert isinstance(selector, ToastSelector)
    Steering(model, anatomy, selector).attach()


def _prove(model: nn.Module, anatomy: Anatomy) -> None:
    """Shows on the live model that a guessed row is right.

    Raises:
        ValueError: If it is not, or that cannot be shown.
    """
    what = (
        f"{type(model).__name__} is of no known family; by names and shapes its parts are {anatomy.guessed}"
    )
    instead = "Say where its parts are with toast.register_family or ToastConfig(anatomy={...})."
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{what}, which cannot be verified while weights are on the meta device. {instead}")
    try:
        result = probe(model)
    except (ValueError, RuntimeError, TypeError, AssertionError, StopIteration) as error:
        raise ValueError(f"{what}, which could not be verified: {error} {instead}") from error
    if not result.proved:
        raise ValueError(f"{what}, which is wrong:\n{result}\n{instead}")
    logger.warning("%s, as a probe shows:\n%s", what, result)


registration.register(ToastConfig, ToastModel)
following.follow()
