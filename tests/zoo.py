"""One tiny random model of every family in `toast.families.table`, from the libraries' own configurations.

The tables say what is special in a row; sizes that a family's configuration knows come from `SIZES`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from timm.layers import LayerNorm
from timm.models.maxxvit import MaxxVitCfg, MaxxVitTransformerCfg
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, ParallelThingsBlock
from torch import Tensor, nn

VOCABULARY, LENGTH, CLASSES = 37, 7, 5

#: Of transformers, under the names of most families; `attribute_map` translates for the others.
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    "image_size": 16, "patch_size": 4, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip

#: Of timm's ViTs.
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}


@dataclass(frozen=True)
class Row:
    """A family: what is built, and from what.

    Args:
        made: Class of the configuration, in transformers; `module.Class` of the model, in `timm.models`.
        options: What the configuration or the model takes beside the sizes.
        auto: The class of transformers that makes a model of the configuration.
        picture: Shape of what is given for one picture; empty if the model takes none.
        marks: The argument that marks the tokens of pictures by 1, if there is one.
        grid: Frames, rows and columns of patches, if the model takes patches and asks.
        dtype: The most exact that the library's code allows.
    """

    made: str
    options: dict[str, Any] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"
    picture: tuple[int, ...] = ()
    marks: str = ""
    grid: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float64


#: The default kernel of experts, a grouped product, has no double precision.
_MOE: dict[str, Any] = {
    "num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager",
}  # fmt: skip
_SLIDING: dict[str, Any] = {
    "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
_NO_ROPE_SCALING: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}

DECODERS: dict[str, Row] = {
    "llama": Row("LlamaConfig"),
    "mistral": Row("MistralConfig", {"sliding_window": 6}),
    "mixtral": Row("MixtralConfig", _MOE),
    "qwen2": Row("Qwen2Config"),
    "qwen2-moe": Row(
        "Qwen2MoeConfig", _MOE | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    ),
    "qwen3": Row("Qwen3Config"),
    "qwen3-moe": Row("Qwen3MoeConfig", _MOE | {"moe_intermediate_size": 24}),
    "gemma": Row("GemmaConfig"),
    "gemma2": Row("Gemma2Config", _SLIDING | {"query_pre_attn_scalar": 8}),
    "gemma3": Row("Gemma3TextConfig", _SLIDING | {"query_pre_attn_scalar": 8}),
    "olmo": Row("OlmoConfig", {"clip_qkv": 1.0}),
    "olmo2": Row("Olmo2Config"),
    "phi": Row("PhiConfig"),
    "phi3": Row("Phi3Config"),
    "stablelm": Row("StableLmConfig"),
    "starcoder2": Row("Starcoder2Config"),
    "granite": Row("GraniteConfig", {"attention_multiplier": 8**-0.5, "residual_multiplier": 0.5}),
    "cohere": Row("CohereConfig", {"logit_scale": 1.0}),
    "smollm3": Row("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}),
    "gpt2": Row("GPT2Config"),
    "gpt-bigcode": Row("GPTBigCodeConfig", {"multi_query": True}),
    "gpt-bigcode-multi-head": Row("GPTBigCodeConfig", {"multi_query": False}),
    "gptj": Row("GPTJConfig", {"rotary_dim": 4}),
    "gpt-neo": Row(
        "GPTNeoConfig", {"attention_types": [[["global", "local", "global"], 1]], "window_size": 4}
    ),
    "gpt-neox": Row("GPTNeoXConfig"),
    "opt": Row("OPTConfig", {"ffn_dim": 40, "word_embed_proj_dim": 32}),
    "opt-post-norm": Row(
        "OPTConfig", {"ffn_dim": 40, "word_embed_proj_dim": 20, "do_layer_norm_before": False}
    ),
    "bloom": Row("BloomConfig"),
    "falcon-7b": Row("FalconConfig", {"multi_query": True, "num_kv_heads": None}),
    "falcon-rw": Row(
        "FalconConfig",
        {"multi_query": False, "num_kv_heads": None, "alibi": True, "bias": True, "parallel_attn": False},
    ),
    "falcon-40b": Row("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "mpt": Row("MptConfig", {"attn_config": {"clip_qkv": 1.0}, "expansion_ratio": 2}),
    "persimmon": Row("PersimmonConfig"),
    "codegen": Row("CodeGenConfig", {"rotary_dim": 4}),
    "gpt-oss": Row("GptOssConfig", _MOE | _SLIDING | _NO_ROPE_SCALING),
    # Its attention makes a float32 of the least number of the scores' dtype.
    "xglm": Row("XGLMConfig", {"ffn_dim": 40}, dtype=torch.float32),
    "bert-decoder": Row("BertConfig", {"is_decoder": True}),
    "roberta-decoder": Row("RobertaConfig", {"is_decoder": True}),
}

_CLASSIFIER: dict[str, Any] = {"auto": "AutoModelForImageClassification", "picture": (3, 16, 16)}
_FEATURES: dict[str, Any] = {"auto": "AutoModel", "picture": (3, 16, 16)}
_TEXT: dict[str, Any] = {"auto": "AutoModelForSequenceClassification"}

ENCODERS: dict[str, Row] = {
    "vit": Row("ViTConfig", **_CLASSIFIER),
    "deit": Row("DeiTConfig", {"architectures": ["DeiTForImageClassification"]}, **_CLASSIFIER),
    "dinov2": Row("Dinov2Config", {"mlp_ratio": 2, "layerscale_value": 0.5}, **_CLASSIFIER),
    # In training its rescaling of positions is random; off as dropout is.
    "dinov3": Row(
        "DINOv3ViTConfig",
        {"num_register_tokens": 2, "layerscale_value": 0.5, "pos_embed_rescale": None},
        **_FEATURES,
    ),
    "clip-vision": Row("CLIPVisionConfig", **_FEATURES),
    "siglip-vision": Row("SiglipVisionConfig", **_FEATURES),
    "beit": Row(
        "BeitConfig", {"use_relative_position_bias": True, "layer_scale_init_value": 0.5}, **_CLASSIFIER
    ),
    "beit-class-token": Row(
        "BeitConfig",
        {"use_relative_position_bias": True, "layer_scale_init_value": 0.5, "use_mean_pooling": False},
        **_CLASSIFIER,
    ),
    "bert": Row("BertConfig", **_TEXT),
    "roberta": Row("RobertaConfig", **_TEXT),
    "modernbert": Row(
        "ModernBertConfig",
        {
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2,
        },
        **_TEXT,
    ),
}  # fmt: skip

_SWIN: dict[str, Any] = {
    "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "drop_path_rate": 0.0,
}  # fmt: skip
_EVA = VIT | {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
_CONVNEXT: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20), "ls_init_value": 0.5}
_SMALL: dict[str, Any] = {"picture": (3, 16, 16)}
_LARGE: dict[str, Any] = {"picture": (3, 64, 64)}

TIMM: dict[str, Row] = {
    "timm-vit": Row("vision_transformer.VisionTransformer", VIT, **_SMALL),
    "timm-vit-parallel-scaling": Row(
        "vision_transformer.VisionTransformer",
        VIT | {"block_fn": ParallelScalingBlock, "init_values": 0.5},
        **_SMALL,
    ),
    "timm-vit-parallel-things": Row(
        "vision_transformer.VisionTransformer",
        VIT | {"block_fn": ParallelThingsBlock, "init_values": 0.5},
        **_SMALL,
    ),
    "timm-vit-diff-parallel": Row(
        "vision_transformer.VisionTransformer", VIT | {"block_fn": DiffParallelScalingBlock}, **_SMALL
    ),
    "timm-vit-relpos": Row(
        "vision_transformer_relpos.VisionTransformerRelPos",
        VIT | {"rel_pos_type": "bias", "init_values": 0.5},
        **_SMALL,
    ),
    "timm-deit-distilled": Row(
        "deit.VisionTransformerDistilled", VIT | {"global_pool": "token"}, **_SMALL
    ),
    "timm-eva": Row("eva.Eva", _EVA, **_SMALL),
    "timm-eva-separate": Row(
        "eva.Eva", _EVA | {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True}, **_SMALL
    ),
    "timm-eva-no-bias": Row("eva.Eva", _EVA | {"qkv_bias": False}, **_SMALL),
    "timm-dinov3": Row(
        "eva.Eva",
        VIT
        | {
            "dynamic_img_size": True, "qkv_bias": False, "init_values": 0.5, "rope_type": "dinov3",
            "rope_temperature": 100, "rope_rotate_half": True, "use_rot_pos_emb": True, "num_heads": 2,
            "use_abs_pos_emb": False, "num_reg_tokens": 4, "use_fc_norm": False,
            "norm_layer": partial(LayerNorm, eps=1e-5),
        },
        **_SMALL,
    ),
    "timm-beit": Row("beit.Beit", VIT | {"use_rel_pos_bias": True, "init_values": 0.5}, **_SMALL),
    # A map of 6 by 6 is padded to windows of 4, every second block of the stage shifts them.
    "timm-swin": Row(
        "swin_transformer.SwinTransformer", _SWIN | {"img_size": 24, "window_size": 4}, picture=(3, 24, 24)
    ),
    "timm-swin-v2": Row(
        "swin_transformer_v2.SwinTransformerV2",
        _SWIN | {"img_size": 24, "window_size": 4, "pretrained_window_sizes": (0, 0)},
        picture=(3, 24, 24),
    ),
    "timm-cait": Row("cait.Cait", VIT | {"init_values": 0.5, "depth_token_only": 1}, **_SMALL),
    "timm-xcit": Row(
        "xcit.Xcit",
        VIT | {"img_size": 32, "patch_size": 8, "eta": 0.5, "cls_attn_layers": 1},
        picture=(3, 32, 32),
    ),
    "timm-convnext": Row("convnext.ConvNeXt", _CONVNEXT, **_LARGE),
    "timm-convnext-v2": Row(
        "convnext.ConvNeXt", _CONVNEXT | {"use_grn": True, "ls_init_value": None}, **_LARGE
    ),
    "timm-convnext-head-norm-first": Row(
        "convnext.ConvNeXt", _CONVNEXT | {"head_norm_first": True}, **_LARGE
    ),
    "timm-maxvit": Row(
        "maxxvit.MaxxVit",
        {
            "cfg": MaxxVitCfg(
                embed_dim=(8, 16), depths=(1, 1), block_type=("M", "M"), stem_width=8,
                transformer_cfg=MaxxVitTransformerCfg(dim_head=8, window_size=(2, 2)),
            ),
            "img_size": 32,
        },
        picture=(3, 32, 32),
    ),
}  # fmt: skip

#: A picture takes four tokens of a sequence, between its marks; text has lower tokens.
_VIDEO, _START, _IMAGE, _END = 33, 34, 35, 36
_QWEN: dict[str, Any] = {
    "image_token_id": _IMAGE, "vision_start_token_id": _START, "vision_end_token_id": _END,
    "video_token_id": _VIDEO,
}  # fmt: skip
_MROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
}
_MULTIMODAL: dict[str, Any] = {"auto": "AutoModelForImageTextToText"}
_PATCHES = _MULTIMODAL | {"picture": (16, 96), "grid": (1, 4, 4), "marks": "mm_token_type_ids"}
_PICTURES = _MULTIMODAL | {"picture": (3, 16, 16)}
_LISTS_OF_PICTURES = _MULTIMODAL | {"picture": (1, 3, 16, 16)}

MULTIMODAL: dict[str, Row] = {
    "llava": Row(
        "LlavaConfig",
        {
            "text_config": Row("LlamaConfig"), "vision_config": Row("CLIPVisionConfig", {"patch_size": 8}),
            "image_token_index": _IMAGE, "image_seq_length": 4,
        },
        **_PICTURES,
    ),
    "qwen2-vl": Row(
        "Qwen2VLConfig",
        _QWEN
        | {
            "text_config": Row("Qwen2VLTextConfig", _MROPE),
            "vision_config": Row("Qwen2VLVisionConfig", {"depth": 2, "embed_dim": 16, "num_heads": 2}),
        },
        **_PATCHES,
    ),
    "qwen2.5-vl": Row(
        "Qwen2_5_VLConfig",
        _QWEN
        | {
            "text_config": Row("Qwen2_5_VLTextConfig", _MROPE),
            "vision_config": Row(
                "Qwen2_5_VLVisionConfig",
                {
                    "hidden_size": 16, "out_hidden_size": 32, "depth": 2, "num_heads": 2, "window_size": 8,
                    "fullatt_block_indexes": [1],
                },
            ),
        },
        **_PATCHES,
    ),
    "qwen3-vl": Row(
        "Qwen3VLConfig",
        _QWEN
        | {
            "text_config": Row("Qwen3VLTextConfig", _MROPE),
            "vision_config": Row(
                "Qwen3VLVisionConfig",
                {
                    "hidden_size": 16, "out_hidden_size": 32, "depth": 2, "num_heads": 2,
                    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
                },
            ),
        },
        **_PATCHES,
    ),
    "gemma3-vision": Row(
        "Gemma3Config",
        {
            "text_config": Row("Gemma3TextConfig", _SLIDING | {"query_pre_attn_scalar": 8}),
            "vision_config": Row("SiglipVisionConfig", {"vision_use_head": False}),
            "image_token_index": _IMAGE, "boi_token_index": _START, "eoi_token_index": _END,
            "mm_tokens_per_image": 4,
        },
        marks="token_type_ids",
        **_PICTURES,
    ),
    "idefics3": Row(
        "Idefics3Config",
        {
            "text_config": Row("LlamaConfig"), "vision_config": Row("Idefics3VisionConfig"),
            "image_token_id": _IMAGE,
        },
        **_LISTS_OF_PICTURES,
    ),
    "smolvlm": Row(
        "SmolVLMConfig",
        {
            "text_config": Row("LlamaConfig"), "vision_config": Row("SmolVLMVisionConfig"),
            "image_token_id": _IMAGE,
        },
        **_LISTS_OF_PICTURES,
    ),
}  # fmt: skip

#: All rows, for `build` and `example`; hence names are unique over the tables.
ROWS = DECODERS | ENCODERS | TIMM | MULTIMODAL


def _configuration(row: Row) -> Any:
    """A configuration of transformers with the sizes that it has, and no dropout."""
    kind = getattr(transformers, row.made)
    known = {entry.name for entry in dataclasses.fields(kind)} | kind.attribute_map.keys()
    sizes = {name: size for name, size in SIZES.items() if name in known}
    given = copy.deepcopy(row.options)  # configurations write into the dictionaries that they are given
    options = {name: _configuration(o) if isinstance(o, Row) else o for name, o in given.items()}
    config = kind(**(sizes | options))
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def _draw(model: nn.Module) -> None:
    """Random weights; what scales (norms, layer scales, sinks) stays near what the configuration says."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "bias" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                parameter.normal_(std=0.2)


def build(name: str, dtype: torch.dtype | None = None, auto: str | None = None) -> Any:
    """The model of a row with seeded random weights, in evaluation mode and double precision if it can.

    Another class of transformers may be asked for with `auto`.
    """
    return copy.deepcopy(_built(name, auto)).to(dtype or ROWS[name].dtype).eval()


@functools.cache
def _built(name: str, auto: str | None) -> Any:
    """The same in single precision. A copy takes a fifth of the time."""
    row = ROWS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in TIMM:
            module, _, kind = row.made.partition(".")
            made = getattr(importlib.import_module(f"timm.models.{module}"), kind)
            model = made(num_classes=CLASSES, **row.options)
        else:
            made = getattr(transformers, auto or row.auto)
            model = made.from_config(_configuration(row), dtype=torch.float32)
            if model.can_generate():
                model.generation_config.pad_token_id = 0
        _draw(model)
    return model


def example(name: str, batch: int = 2, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Random inputs of a row's model, by keyword."""
    row, inputs = ROWS[name], {}
    if row.picture:
        pixels = torch.randn(batch, *row.picture, dtype=dtype or row.dtype)
        if name in TIMM:
            return {"x": pixels}
        inputs["pixel_values"] = pixels.flatten(0, 1) if row.grid else pixels
        if name not in MULTIMODAL:
            return inputs
    if row.grid:
        inputs["image_grid_thw"] = torch.tensor([row.grid] * batch)
    ids = torch.randint(1, _VIDEO, (batch, LENGTH))
    if row.picture:
        picture = torch.tensor([_START, *[_IMAGE] * 4, _END]).expand(batch, -1)
        ids = torch.cat((ids[:, :2], picture, ids[:, 2:]), 1)
    if row.marks:
        inputs[row.marks] = (ids == _IMAGE).long()
    return inputs | {"input_ids": ids}
