"""The tuner class that PEFT calls: puts the adapter layers in, and takes them out again."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from toast import registration, saving
from toast.config import ToastConfig
from toast.families import Anatomy, find_anatomy, unwrapped
from toast.layer import CANNOT_MERGE, ToastLayer, ToastSelector, ToastValue, make_selector, make_value
from toast.steering import SteeredMethod, Steering


class ToastModel(BaseTuner):
    """Wraps a frozen transformer with TOAST (arXiv 2305.15542).

    Made by `toast.wrap`, `peft.get_peft_model`, `PeftModel.from_pretrained` or transformers' `load_adapter`.
    """

    prefix = "toast_"
    tuner_layer_cls = ToastLayer
    target_module_mapping: dict[str, list[str]] = {}  # the family table says what is targeted

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter to a model; if anything fails the model is as it was.

        Raises:
            ValueError: If the model or the configuration cannot be used, with the reason.
        """
        # A configuration object may serve several models; what is filled in below belongs to one.
        config = self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        assert isinstance(config, ToastConfig)
        anatomy = find_anatomy(model, config.anatomy)
        _refuse_foreign_adapters(model)
        saving.check_config(config, anatomy)
        frozen = saving.pretrained_tensors(config, anatomy)
        trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
        had_layers = any(isinstance(module, ToastLayer) for module in model.modules())
        self._anatomy = anatomy
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if not had_layers:
                _attach(model, anatomy)
            saving.load_pretrained(model, adapter_name, frozen)
        except BaseException:
            self._roll_back(model, adapter_name, had_layers)
            for parameter, requires_grad in trainable.items():
                parameter.requires_grad_(requires_grad)
            raise
        finally:
            del self._anatomy

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
        if isinstance(target, ToastSelector | ToastValue):
            target.update_layer(adapter_name, peft_config)
            target._move_adapter_to_device_of_base_layer(adapter_name)
            return
        anatomy = self._anatomy
        layer: ToastSelector | ToastValue
        if current_key == anatomy.norm_name:
            layer = make_selector(target, anatomy.values[-1], anatomy.width)
        else:
            layer = make_value(target, anatomy.width, anatomy.layout)
        layer.update_layer(adapter_name, peft_config)
        layer.train(target.training)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            raise ValueError(CANNOT_MERGE)
        steering = find_steering(self.model)
        if steering is not None:
            steering.detach()
        return super()._unload_and_optionally_merge(merge=False)  # type: ignore[return-value]

    def _roll_back(self, model: nn.Module, adapter_name: str, had_layers: bool) -> None:
        """Takes off what a failed injection left."""
        self.peft_config.pop(adapter_name, None)
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, ToastLayer)]
        if had_layers:
            for _, layer in layers:
                layer.delete_adapter(adapter_name)
            return
        steering = find_steering(model)
        if steering is not None:
            steering.detach()
        for name, layer in layers:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)

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
        return saving.tensors_to_save(config, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return saving.without_adapter_name(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        assert isinstance(config, ToastConfig)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        saving.check_tensors(model, config, adapter_name, remapped)
        return remapped


def find_steering(model: nn.Module) -> Steering | None:
    """Returns the parts of a wrapped model that take part in the two passes; None if it is not wrapped."""
    for module in model.modules():
        for attribute in module.__dict__.values():
            if isinstance(attribute, SteeredMethod):
                return attribute.steering
    return None


def _attach(model: nn.Module, anatomy: Anatomy) -> None:
    selector = model.get_submodule(anatomy.norm_name)
    values = [model.get_submodule(name) for name in anatomy.value_names]
    assert isinstance(selector, ToastSelector)
    assert all(isinstance(value, ToastValue) for value in values)
    Steering(anatomy.trunk, anatomy.family, selector, values).attach()  # type: ignore[arg-type]


def _refuse_foreign_adapters(model: nn.Module) -> None:
    """Refuses bases that carry unmerged adapters of another method."""
    own = {
        id(part) for module in model.modules() if isinstance(module, ToastLayer) for part in module.modules()
    }
    for name, module in model.named_modules():
        if (
            isinstance(module, BaseTunerLayer)
            and id(module) not in own
            and not isinstance(unwrapped(module), ToastLayer)
        ):
            raise ValueError(
                f"the base model already carries an adapter of another method ({type(module).__name__} at {name!r}). "
                "TOAST stands on a plain frozen model: merge that adapter first (merge_and_unload) or unload it."
            )


registration.register(ToastConfig, ToastModel)
