"""Small random models of every type that transformers lists, built from their configurations."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto

V = 61
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = (3, 41)
"""Tokens of text. Those of images and the like are given the numbers from V - 1 down."""

TASKS = {
    "causal": (
        "AutoModelForCausalLM",
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ),
    "image-text": (
        "AutoModelForImageTextToText",
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ),
    "multimodal": (
        "AutoModelForMultimodalLM",
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ),
}

# By what a configuration calls its sizes. The first pattern that fits a name counts; what is
# smaller already stays.
SIZES: list[tuple[re.Pattern[str], int]] = [
    (re.compile(names), size)
    for names, size in [
        (r"n_tokens|.*vocab_size.*|.*_vocab", V),
        (r"mamba_(d_head|head_?dim)", 16),
        (r"mamba_d_ssm", 64),
        (r"(.*_)?head_dim|d_kv|d_head|dim_head|.*_dim_head|kv_channels|attention_head_size", 8),
        (r"rotary_dim", 8),
        (r".*intermediate_size.*|.*ffn_dim|dim_ff|dff|d_ff|d_inner|mlp_dim|n_inner", 24),
        (r".*ffn_hidden_size|feed_forward_size|.*expert_dim", 24),
        (r".*hidden_size(_global)?|n_embd|d_model|(.*_)?(embedding|input)_size|(.*_)?dims?", 32),
        (r"(.*_)?(n_|num_)?(hidden_)?layers?|depth|.*_depth|num_blocks", 1),
        (r"(.*_)?num_key_value_heads|linear_num_(key|value)_heads", 2),
        (r".*heads?", 4),
        (r".*_rank", 8),
        (r"first_k_dense_replace|moe_layer_start_index", 0),
        (r"max_position_embeddings|n_positions|n_ctx|max_seq_len", 64),
        (r"max_(source|target)_positions|context_length", 64),
        (r"num_(local_)?experts|n_routed_experts|moe_num_experts", 4),
        (r"(num_)?experts_per_tok(en)?|num_experts_per_token|moe_topk|moe_k|n_group|.*_group", 2),
        (r"mamba_n_groups|mamba_ngroups|n_groups|.*state_size|mamba_d_state", 2),
        (r"base_channels", 32),
        (r"zero_expert_num|(mamba_)?chunk_size", 4),
        (r"image_size|resolution", 16),
        (r"patch_size", 4),
    ]
]

NUMBER_OF_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
TYPES_OF_LAYERS = ("layer_types", "layers_block_type")
NOT_A_FIELD = ("transformers_version", "architectures", "dtype", "id2label", "label2id")
SPECIAL_TOKEN = re.compile(r".*_token_(id|index)|.*_(start|end|newline|patch)_id")
# Without a cache, as in training; logits of a size for which the gates of tokens differ; what
# routers add to the loss, and enough of it.
EVERYWHERE = {
    "use_cache": False,
    "initializer_range": 0.3,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}
# Options that change logits, or have a forward use them outside of its loss: a variant each.
OPTIONS: dict[str, tuple[Any, Any]] = {
    "final_logit_softcapping": (None, 5.0),
    "lm_head_multiplier": (1.0, 0.5),
    "logit_scale": (None, 2.0),
    "logits_scaling": (1.0, 0.5),
    "logits_soft_cap": (None, 5.0),
    "mtp_loss_scaling_factor": (0.0, 0.5),
    "output_multiplier": (1.0, 0.25),
    "z_loss_coefficient": (0.0, 0.1),
}


# What a configuration needs besides, by its model_type, which may be of one within another.
def _rope(**others: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | others}


_THREE_AXES = _rope(mrope_section=[2, 1, 1])
_ZAMBA = {
    "num_hidden_layers": 3,
    "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    "attention_head_dim": 16,
    "attention_hidden_size": 64,
}
_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
# Their own flatten the logits of so small a model: all gates would be 1.
_STEEP = {"logit_scale": 2.0}
_STEEPER = {"output_multiplier": 2.0}
BESIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 41, "audio_token_offset": 45},
    "apertus1p5_vision_tokenizer": {"codebook_size": 4},
    "blip-2": {"image_token_index": 60},
    "chameleon": {"vocabulary_map": {"<image>": 60}},
    "cohere": _STEEP,
    "cohere2": _STEEP,
    "cohere2_moe": _STEEP,
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _THREE_AXES["rope_parameters"]},
    },
    "cosmos3_edge_text": _THREE_AXES,
    "deepseek_ocr2_text": {"mlp_layer_types": ["sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "diffusion_gemma_text": {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"per_layer_config": None, "v_head_dim": 16, "head_dim": 16},
    "dory": {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "ernie4_5_vl_moe_text": _rope(mrope_section=[1, 1, 2])
    | {
        "mlp_layer_types": ["sparse"],
        "moe_intermediate_size": [24, 24],
    },
    "falcon_h1": {"mamba_d_head": 16},
    "emu3": {"vocabulary_map": {"<image>": 60}},
    "fast_vlm": {"vision_config": _VISION},
    "flint": {"mlp_only_layers": []},
    "florence_vision": {"embed_dim": [32, 32, 32, 32], "depths": [1, 1, 1, 1]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 24},
    "glm4v_text": _THREE_AXES,
    "glm4v_moe_text": _rope(mrope_section=[2, 1, 1], partial_rotary_factor=1.0),
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "1/2",
        "vision_config": _VISION | {"hidden_size": 64},
    },
    "glm_ocr_text": _THREE_AXES,
    "hrm_text": {"H_cycles": 1, "L_cycles": 1},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": _THREE_AXES | {"head_dim": 8},
    "hy_v4_vl_text": _THREE_AXES,
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "inkling_vision": {"num_hidden_layers": 4, "n_layers": 4},
    "instructblip": {"image_token_index": 60},
    "instructblipvideo": {"video_token_index": 60},
    "jamba": {"expert_layer_offset": 0, "expert_layer_period": 1},
    "kosmos-2": {"latent_query_num": 1},
    "lfm2_moe": {"layer_types": ["full_attention"]},
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"head_dim": 16},
    "muse_glimmer_text": _STEEPER,
    "muse_spark_text": _STEEPER,
    "ministral": {"head_dim": 8},
    "mistral4": _rope(llama_4_scaling_beta=0.1, original_max_position_embeddings=64),
    "mistral_large4_text": {"kv_source_layers": [0]},
    "molmo2_adapter": {"vision_feature_layer": [0, 0]},
    "muse_spark_audio": {"hidden_sizes": [32], "patch_sizes": [4]},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "paddleocr_vl_text": _THREE_AXES,
    "perception_lm": {"vision_config": _VISION | {"model_args": {"embed_dim": 32}}},
    "qwen2_5_omni_text": _THREE_AXES,
    "qwen2_5_vl_text": _THREE_AXES,
    "qwen2_vl_text": _THREE_AXES,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "hash_seed": 0,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "rwkv": {"num_hidden_layers": 2},
    "step3p5": {"sliding_window": 4},
    "udop": {"decoder_start_token_id": 0},
    "wavtokenizer_encoder": {"codebook_size": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA | {"hybrid_layer_ids": [1, 2]},
}
# AutoModelForCausalLM takes the configuration of these, and the model that of their decoder.
WITHIN = {"musicgen": "decoder", "musicgen_melody": "decoder"}
# The forward of these does not go without an image, of a shape, nor without what is named.
_IMAGE = (2, 3, 16, 16)
_VIDEO = (2, 1, 3, 16, 16)
WITH_IMAGE: dict[str, tuple[tuple[int, ...], dict[str, Callable[[Tensor], Tensor]]]] = {
    "blip": (_IMAGE, {}),
    "blip-2": (_IMAGE, {}),
    "git": (_IMAGE, {}),
    "idefics": (
        _VIDEO,
        {"image_attention_mask": lambda tokens: torch.ones_like(tokens)[..., None]},
    ),
    "instructblip": (_IMAGE, {"qformer_input_ids": torch.clone}),
    "instructblipvideo": (_VIDEO, {"qformer_input_ids": torch.clone}),
    "kosmos-2": (
        _IMAGE,
        {
            "image_embeds_position_mask": lambda tokens: (tokens * 0).index_fill(
                1, torch.tensor(0), 1
            )
        },
    ),
}


def small(fields: dict[str, Any], layers: int, special: list[int] | None = None) -> dict[str, Any]:
    """The fields of a default configuration, with small sizes.

    Of layers there is one of each type, or so many, and lists with an entry for each layer are cut
    to these.
    """
    special = [V] if special is None else special
    count = next((fields[n] for n in NUMBER_OF_LAYERS if isinstance(fields.get(n), int)), 0)
    types = next((fields[name] for name in TYPES_OF_LAYERS if fields.get(name)), [None] * count)
    # The last of each: where there are experts, the first layers have none.
    kept = sorted({one: i for i, one in enumerate(types)}.values())[-layers:] or [0]
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name in NOT_A_FIELD or name.startswith("_"):
            continue
        if name == "per_layer_config" and value:
            value = {kept.index(int(i)): of for i, of in value.items() if int(i) in kept}
        elif isinstance(value, dict) and ("model_type" in value or name.endswith("config")):
            value = small(value, layers, special)
        elif isinstance(value, (list, tuple)) and len(value) == count > 2:
            value = [value[i] for i in kept]
        elif name in EVERYWHERE:
            value = EVERYWHERE[name]
        elif type(value) is int:
            value = smaller(name, value, fields, special, len(kept))
        found[name] = value
    found |= copy.deepcopy(BESIDES.get(found.get("model_type", ""), {}))
    return found


def smaller(name: str, value: int, fields: dict[str, Any], special: list[int], layers: int) -> int:
    """A number of a configuration."""
    if name in SPECIAL:
        return min(value, SPECIAL[name])
    if SPECIAL_TOKEN.fullmatch(name):
        if value >= TEXT[0]:
            special[0] -= 1
            return special[0]
        return value
    if name in NUMBER_OF_LAYERS:
        return min(value, layers)
    # Those that are not grouped stay so.
    other = name.replace("key_value", "attention")
    if value == fields.get(other):
        name = other
    size = next((size for pattern, size in SIZES if pattern.fullmatch(name)), value)
    return min(value, size)


def changed(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """With changes wherever a configuration, or one within it, has a field of that name."""
    return {
        name: changes[name]
        if name in changes
        else changed(value, changes)
        if isinstance(value, dict)
        else value
        for name, value in fields.items()
    }


@dataclass(frozen=True)
class Case:
    """A type of model, or a variant of it."""

    task: str
    kind: str
    changes: dict[str, Any] = field(default_factory=dict, hash=False)
    layers: int = 3  # at most

    @property
    def name(self) -> str:
        """As in "causal-bamba[z_loss_coefficient=0.1]"."""
        variant = "".join(f"[{name}={value}]" for name, value in self.changes.items())
        return f"{self.task}-{self.kind}{variant}"

    def config(self) -> Any:
        """Small, with the changes wherever a configuration, or one within it, has such a field."""
        config_class = transformers.CONFIG_MAPPING[self.kind]
        fields = small(config_class().to_dict(), self.layers)
        return config_class(**changed(fields, self.changes))

    def variants(self) -> list[Case]:
        """One for each of the options above: on where it is off by default, or off."""
        try:
            fields = [self.config().to_dict()]
        except Exception:  # build() raises the same
            return []
        defaults: dict[str, Any] = {}
        for one in fields:
            defaults |= {name: one[name] for name in OPTIONS if name in one}
            fields += [value for value in one.values() if isinstance(value, dict)]
        found = []
        for name, value in defaults.items():
            off, on = OPTIONS[name]
            variant = Case(self.task, self.kind, {name: on if value == off else off})
            with contextlib.suppress(Exception):  # a field that has to be a number
                variant.config()
                found.append(variant)
        return found


def cases() -> list[Case]:
    """Every type of every task; of those with the same model for several tasks, the first."""
    items = [(task, *item) for task, (_, names) in TASKS.items() for item in names.items()]
    first = {(kind, model): task for task, kind, model in reversed(items)}
    return [Case(task, kind) for task, kind, model in items if first[kind, model] == task]


def build(case: Case, seed: int = 0) -> Any:
    """A model, in float32 and for evaluation."""
    auto, names = TASKS[case.task]
    config = case.config()
    config = getattr(config, WITHIN.get(case.kind, ""), config)
    torch.manual_seed(seed)
    try:
        model = getattr(transformers, auto).from_config(config, attn_implementation="eager")
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        model = getattr(transformers, names[case.kind])(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # which start as zeros
                parameter.normal_(std=0.3)
        head = model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if weight is not None and weight.ndim == 2 and weight.std() < 0.2:
            weight.normal_(std=0.3)
    # Its backward computes its forward again, if asked to.
    return model.train(case.kind == "reformer")


def batch(case: Case, length: int = 9, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """What a model is given besides labels, and these: of two rows, some ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(*TEXT, (2, length), generator=generator)
    labels = tokens.clone()
    labels[:, :2] = -100
    labels[-1, -3] = -100
    given = {"input_ids": tokens}
    if case.kind in WITH_IMAGE:
        shape, others = WITH_IMAGE[case.kind]
        given["pixel_values"] = torch.rand(shape, generator=generator)
        given |= {name: of(tokens) for name, of in others.items()}
    return given, labels
