"""What is known of each family of models, as data.

A row says which module is the trunk (the part that runs twice), where its blocks are, which module of a block
makes the values and in which layout, and what the selector reads. `toast.families.anatomy` finds these parts
in a live model, `toast.register_family` adds a row, `toast families` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from toast.families.layouts import LAYOUTS
from toast.families.tokens import TOKENS

#: What a selector can read; explained at `ToastConfig.select_features`.
FEATURES = ("normed", "unnormed", "mixed")

#: How the final norm takes part; explained at `Family.reads`.
READS = ("norm", "block", "post_norm")

#: decoder: causal language model; encoder: of text; vision: encoder of pictures.
KINDS = ("decoder", "encoder", "vision")


@dataclass(frozen=True)
class Family:
    """One row of knowledge; names are attribute paths.

    Args:
        name: Name of the row.
        trunk: Class of the trunk, `module.Class`; subclasses fit too. Empty: passed by hand.
        blocks: Path of the list of blocks, in the trunk. A `*` stands for every child: `layers.*.blocks`.
        value: Path of the module that makes the values, in a block; `*` for several attentions side by side.
        layout: Where the values lie in that module's output; a key of `LAYOUTS`.
        norm: Path of the final norm, in the trunk; `-1` is the last of a list.
        kind: `decoder`, `encoder` or `vision`.
        reads: `norm` if the final norm takes and gives every token; `block` if it does not (a class token
            alone, the mean of all), so it is applied to what the block gives; `post_norm` if the block
            gives normed features already.
        tokens: The order of tokens, a name of `toast.families.tokens`.
        heads: Attribute of the attention with its number of key and value heads, for layouts that ask.
        head_width: Attribute of the attention with the channels of a head, for the same.
        functional: Whether the attention takes the module's weight and does not call it.
        first_value: Path, in the trunk, of what stands for the value module of the lowest block.
        coarsens: Factor by which the grid of tokens gets coarser where the width changes.
        within: Whether the trunk stands in multi-modal models only.
        methods: Methods of the trunk that run it, and that are steered.
        select_features: What the selector reads, if the configuration does not say.
        official: Which of the official variants its checkpoints are: `vision`, `language`, `convnext`.

    Raises:
        ValueError: If a field is none of the allowed.
    """

    name: str
    trunk: str
    blocks: str
    value: str
    layout: str
    norm: str
    kind: str = "decoder"
    reads: str = "norm"
    tokens: str = "sequence"
    heads: str = "num_heads"
    head_width: str = "head_dim"
    functional: bool = False
    first_value: str = ""
    coarsens: int = 1
    within: bool = False
    methods: tuple[str, ...] = ("forward",)
    select_features: str = "normed"
    official: str = "language"

    def __post_init__(self) -> None:
        """Checks the fields that are names."""
        allowed = {
            "layout": tuple(LAYOUTS), "kind": KINDS, "reads": READS, "tokens": TOKENS,
            "select_features": FEATURES,
        }  # fmt: skip
        for name, names in allowed.items():
            if getattr(self, name) not in names:
                raise ValueError(f"{name}: needs one of {', '.join(names)}; got {getattr(self, name)!r}.")

    @property
    def library(self) -> str:
        """The library that the trunk is from."""
        return self.trunk.partition(".")[0]

    @property
    def taps(self) -> str:
        """Where the selector reads, in words."""
        return {
            "norm": self.norm,
            "block": f"last block, through {self.norm}",
            "post_norm": f"last block, normed by {self.norm}",
        }[self.reads]


def _transformers(name: str, trunk: str, **options: Any) -> Family:
    """A row of transformers, in Llama's arrangement where the options do not say otherwise."""
    llama = {"blocks": "layers", "value": "self_attn.v_proj", "layout": "separate", "norm": "norm"}
    return Family(**({"name": name, "trunk": f"transformers.models.{trunk}"} | llama | options))


def _timm(name: str, trunk: str, **options: Any) -> Family:
    """A row of timm, in the arrangement of its `VisionTransformer` where the options do not say otherwise."""
    vit = {
        "blocks": "blocks", "value": "attn.qkv", "layout": "last_third", "norm": "norm", "kind": "vision",
        "methods": ("forward_features", "forward_intermediates"), "official": "vision",
    }  # fmt: skip
    return Family(**({"name": name, "trunk": f"timm.models.{trunk}"} | vit | options))


_BERT: dict[str, Any] = {
    "blocks": "encoder.layer", "value": "attention.self.value", "norm": "encoder.layer.-1.output.LayerNorm",
    "reads": "post_norm", "kind": "encoder",
}  # fmt: skip
_VISION: dict[str, Any] = {"kind": "vision", "official": "vision"}
_HF_VIT = _VISION | {"value": "attention.v_proj", "norm": "layernorm"}
_CONVNEXT: dict[str, Any] = {
    "blocks": "stages", "value": "downsample", "first_value": "stem", "layout": "input", "tokens": "map",
    "official": "convnext",
}  # fmt: skip

#: The rows. Of several for one trunk the first that fits the live model is taken.
FAMILIES: list[Family] = [
    _timm("timm-vit", "vision_transformer.VisionTransformer"),
    _timm(
        "timm-vit-parallel", "vision_transformer.VisionTransformer",
        value="in_proj", layout="last_width",
    ),
    _timm("timm-vit-parallel-attentions", "vision_transformer.VisionTransformer", value="attns.*.attn.qkv"),
    _timm("timm-vit-relpos", "vision_transformer_relpos.VisionTransformerRelPos"),
    _timm("timm-eva", "eva.Eva", functional=True),
    _timm("timm-eva-separate", "eva.Eva", value="attn.v_proj", layout="separate"),
    _timm("timm-beit", "beit.Beit", functional=True),
    _timm(
        "timm-swin", "swin_transformer.SwinTransformer",
        blocks="layers.*.blocks", tokens="windows", coarsens=2,
    ),
    _timm(
        "timm-swin-v2", "swin_transformer_v2.SwinTransformerV2",
        blocks="layers.*.blocks", tokens="windows", coarsens=2, functional=True,
    ),
    # The class token joins above the blocks, so the blocks' own tokens are read.
    _timm("timm-cait", "cait.Cait", reads="block"),
    _timm("timm-xcit", "xcit.Xcit", reads="block"),
    _timm("timm-convnext", "convnext.ConvNeXt", norm="head.norm", reads="block", **_CONVNEXT),
    _timm("timm-convnext-head-norm-first", "convnext.ConvNeXt", norm="norm_pre", **_CONVNEXT),
    _transformers("llama", "llama.modeling_llama.LlamaModel"),
    _transformers("mistral", "mistral.modeling_mistral.MistralModel"),
    _transformers("mixtral", "mixtral.modeling_mixtral.MixtralModel"),
    _transformers("qwen2", "qwen2.modeling_qwen2.Qwen2Model"),
    _transformers("qwen2-moe", "qwen2_moe.modeling_qwen2_moe.Qwen2MoeModel"),
    _transformers("qwen3", "qwen3.modeling_qwen3.Qwen3Model"),
    _transformers("qwen3-moe", "qwen3_moe.modeling_qwen3_moe.Qwen3MoeModel"),
    _transformers("qwen2-vl", "qwen2_vl.modeling_qwen2_vl.Qwen2VLTextModel", within=True),
    _transformers("qwen2.5-vl", "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLTextModel", within=True),
    _transformers("qwen3-vl", "qwen3_vl.modeling_qwen3_vl.Qwen3VLTextModel", within=True),
    _transformers("gemma", "gemma.modeling_gemma.GemmaModel"),
    _transformers("gemma2", "gemma2.modeling_gemma2.Gemma2Model"),
    _transformers("gemma3", "gemma3.modeling_gemma3.Gemma3TextModel"),
    _transformers("olmo", "olmo.modeling_olmo.OlmoModel"),
    _transformers("olmo2", "olmo2.modeling_olmo2.Olmo2Model"),
    _transformers("phi", "phi.modeling_phi.PhiModel", norm="final_layernorm"),
    _transformers(
        "phi3", "phi3.modeling_phi3.Phi3Model",
        value="self_attn.qkv_proj", layout="last_heads", heads="num_key_value_heads",
    ),
    _transformers("stablelm", "stablelm.modeling_stablelm.StableLmModel"),
    _transformers("starcoder2", "starcoder2.modeling_starcoder2.Starcoder2Model"),
    _transformers("granite", "granite.modeling_granite.GraniteModel"),
    _transformers("cohere", "cohere.modeling_cohere.CohereModel"),
    _transformers("smollm3", "smollm3.modeling_smollm3.SmolLM3Model"),
    _transformers("gpt-oss", "gpt_oss.modeling_gpt_oss.GptOssModel"),
    _transformers("xglm", "xglm.modeling_xglm.XGLMModel", norm="layer_norm"),
    _transformers("opt", "opt.modeling_opt.OPTDecoder", norm="final_layer_norm"),
    _transformers(
        "opt-post-norm", "opt.modeling_opt.OPTDecoder",
        norm="layers.-1.final_layer_norm", reads="post_norm",
    ),
    _transformers(
        "gpt2", "gpt2.modeling_gpt2.GPT2Model",
        blocks="h", value="attn.c_attn", layout="last_third", norm="ln_f",
    ),
    _transformers(
        "gpt-bigcode", "gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeModel",
        blocks="h", value="attn.c_attn", layout="grouped", heads="kv_heads", norm="ln_f",
    ),
    _transformers("gptj", "gptj.modeling_gptj.GPTJModel", blocks="h", value="attn.v_proj", norm="ln_f"),
    _transformers(
        "gpt-neo", "gpt_neo.modeling_gpt_neo.GPTNeoModel",
        blocks="h", value="attn.attention.v_proj", norm="ln_f",
    ),
    _transformers(
        "gpt-neox", "gpt_neox.modeling_gpt_neox.GPTNeoXModel",
        value="attention.query_key_value", layout="grouped", heads="config.num_attention_heads",
        head_width="head_size", norm="final_layer_norm",
    ),
    _transformers(
        "bloom", "bloom.modeling_bloom.BloomModel",
        blocks="h", value="self_attention.query_key_value", layout="grouped", norm="ln_f",
    ),
    _transformers(
        "falcon", "falcon.modeling_falcon.FalconModel",
        blocks="h", value="self_attention.query_key_value", layout="grouped", heads="num_kv_heads",
        norm="ln_f",
    ),
    _transformers(
        "mpt", "mpt.modeling_mpt.MptModel",
        blocks="blocks", value="attn.Wqkv", layout="last_third", norm="norm_f",
    ),
    _transformers(
        "persimmon", "persimmon.modeling_persimmon.PersimmonModel",
        value="self_attn.query_key_value", layout="grouped", norm="final_layernorm",
    ),
    _transformers(
        "codegen", "codegen.modeling_codegen.CodeGenModel",
        blocks="h", value="attn.qkv_proj", layout="four_groups_q_v_k", norm="ln_f",
    ),
    _transformers("bert", "bert.modeling_bert.BertModel", **_BERT),
    _transformers("roberta", "roberta.modeling_roberta.RobertaModel", **_BERT),
    _transformers(
        "modernbert", "modernbert.modeling_modernbert.ModernBertModel",
        value="attn.Wqkv", layout="last_third", norm="final_norm", kind="encoder",
    ),
    _transformers("vit", "vit.modeling_vit.ViTModel", **_HF_VIT),
    _transformers("deit", "deit.modeling_deit.DeiTModel", **_HF_VIT),
    # Its norm is that of the mean over all tokens.
    _transformers(
        "beit-mean", "beit.modeling_beit.BeitModel",
        **(_HF_VIT | {"norm": "pooler.layernorm", "reads": "block"}),
    ),
    _transformers("beit", "beit.modeling_beit.BeitModel", **_HF_VIT),
    _transformers("dinov2", "dinov2.modeling_dinov2.Dinov2Model", **(_HF_VIT | {"blocks": "encoder.layer"})),
    _transformers(
        "dinov3", "dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel",
        blocks="model.layer", value="attention.v_proj", **_VISION,
    ),
    _transformers(
        "clip-vision", "clip.modeling_clip.CLIPVisionModel",
        blocks="encoder.layers", norm="post_layernorm", reads="block", **_VISION,
    ),
    _transformers(
        "siglip-vision", "siglip.modeling_siglip.SiglipVisionModel",
        blocks="encoder.layers", norm="post_layernorm", **_VISION,
    ),
]  # fmt: skip

_LATENT = "its attention keeps a latent of keys and values in the cache, before the values exist"
_SHARED = "several of its layers share the values of another layer"
_RECURRENT = "some of its blocks have no attention, and their states cannot be kept for two passes"

#: Trunks that cannot be steered honestly, and why.
REFUSED: dict[str, str] = {
    f"transformers.models.{trunk}": reason
    for reason, trunks in {
        _LATENT: (
            "deepseek_v2.modeling_deepseek_v2.DeepseekV2Model",
            "deepseek_v3.modeling_deepseek_v3.DeepseekV3Model",
            "longcat_flash.modeling_longcat_flash.LongcatFlashModel",
            "minicpm3.modeling_minicpm3.MiniCPM3Model",
        ),
        _SHARED: (
            "gemma3n.modeling_gemma3n.Gemma3nTextModel",
            "gemma4.modeling_gemma4.Gemma4TextModel",
            "gemma4_unified.modeling_gemma4_unified.Gemma4UnifiedTextModel",
        ),
        _RECURRENT: (
            "mamba.modeling_mamba.MambaModel",
            "mamba2.modeling_mamba2.Mamba2Model",
            "jamba.modeling_jamba.JambaModel",
            "bamba.modeling_bamba.BambaModel",
            "zamba.modeling_zamba.ZambaModel",
            "zamba2.modeling_zamba2.Zamba2Model",
            "recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaModel",
            "qwen3_next.modeling_qwen3_next.Qwen3NextModel",
            "lfm2.modeling_lfm2.Lfm2Model",
            "falcon_h1.modeling_falcon_h1.FalconH1Model",
            "falcon_mamba.modeling_falcon_mamba.FalconMambaModel",
            "granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridModel",
            "nemotron_h.modeling_nemotron_h.NemotronHModel",
            "rwkv.modeling_rwkv.RwkvModel",
        ),
    }.items()
    for trunk in trunks
} | {
    "timm.models.maxxvit.MaxxVit": (
        "its attention alternates between windows and grids of a convolutional map, for which there is no row"
    ),
    "timm.models.vision_transformer_sam.VisionTransformerSAM": (
        "its windows are cut out of the blocks' tokens, for which there is no row"
    ),
    "transformers.models.swin.modeling_swin.SwinModel": "use timm's SwinTransformer, which has a row",
    "transformers.models.swinv2.modeling_swinv2.Swinv2Model": "use timm's SwinTransformerV2, which has a row",
}

#: Names of modules that tell of such a trunk, whatever its class.
REFUSED_SIGNS = {"kv_a_proj_with_mqa": _LATENT}


def register_family(name: str, trunk: str, *, blocks: str, value: str, norm: str, **options: Any) -> Family:
    """Adds a row for a family of models, before the rows that are there.

    Args:
        name: Name of the row.
        trunk: Class of the trunk, `module.Class`, as in `f"{cls.__module__}.{cls.__qualname__}"`.
        blocks: See `Family`, as all that follows.
        value: See `Family`.
        norm: See `Family`.
        **options: Further fields of `Family`, such as `layout="last_third"` (default: `separate`).

    Returns:
        The row. Check it on a live model with `toast.probe`.

    Raises:
        ValueError: If a field is unknown or none of the allowed, or the name is taken.

    Example:
        >>> import toast
        >>> row = toast.register_family(
        ...     "mine", "my_models.Trunk", blocks="layers", value="attention.v", norm="final_norm"
        ... )
        >>> row.layout
        'separate'
    """
    if any(row.name == name for row in FAMILIES):
        raise ValueError(f"name: there is a family {name!r} already; choose another name.")
    row = make_row({"name": name, "trunk": trunk, "blocks": blocks, "value": value, "norm": norm} | options)
    FAMILIES.insert(0, row)
    return row


def make_row(given: dict[str, Any], what: str = "family") -> Family:
    """Returns a row from its fields, checked.

    Args:
        given: Fields of `Family`; `blocks`, `value` and `norm` are required.
        what: What the fields are called in messages.

    Raises:
        ValueError: If a field is missing, unknown, of another type, or none of the allowed.
    """
    types = {field.name: field.type for field in fields(Family)}
    required = {"blocks", "value", "norm"}
    if given.keys() - types or required - given.keys():
        raise ValueError(
            f"{what}: needs {', '.join(sorted(required))} and may have "
            f"{', '.join(sorted(types.keys() - required))}; got {', '.join(sorted(given))}."
        )
    kinds: dict[str, Any] = {"str": str, "bool": bool, "int": int, "tuple[str, ...]": (list, tuple)}
    wrong = [name for name, value in given.items() if not isinstance(value, kinds[str(types[name])])]
    if wrong:
        got = ", ".join(f"{name}={given[name]!r}" for name in wrong)
        raise ValueError(
            f"{what}: needs names as text, 'methods' as a list of them, 'coarsens' as a whole number, "
            f"'functional' and 'within' as True or False; got {got}."
        )
    options = {"name": "by-hand", "trunk": "", "layout": "separate"} | given
    try:
        return Family(**(options | {"methods": tuple(options.get("methods", ("forward",)))}))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
