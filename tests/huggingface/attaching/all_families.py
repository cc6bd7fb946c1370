"""Tiny configurations of every family that can have a memory, and what they need of their own."""

from __future__ import annotations

from typing import Any

WINDOW, SEGMENT_LEN, NUM_SINKS, OWN_WINDOW, MAX_POSITIONS = 11, 5, 2, 7, 23
NUM_LAYERS = 2

_TYPES = ["sliding_attention", "full_attention"]
_SLIDING = {"sliding_window": OWN_WINDOW, "layer_types": _TYPES}
_WHOLE_HEADS = {"hidden_size": 40, "head_dim": None}
_EXPERTS = {
    "moe_intermediate_size": 28,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 28,
}
_MLP_TYPES = {"mlp_layer_types": ["dense", "sparse"]}
_GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}

# Where experts are computed by one product, sizes must be multiples of 4.
COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 52,
    "intermediate_size": 60,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}

ALL_CONFIGS: dict[str, dict[str, Any]] = {
    "afmoe": {**_SLIDING, **_EXPERTS, "num_dense_layers": 1},
    "apertus": {},
    "arcee": {},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, **_WHOLE_HEADS},
    "beam": {**_SLIDING, **_EXPERTS, "n_group": 1, "topk_group": 1},
    "bitnet": _WHOLE_HEADS,
    "cohere": _WHOLE_HEADS,
    "cohere2": _SLIDING,
    "cohere2_moe": {**_SLIDING, **_EXPERTS},
    "cwm": _SLIDING,
    "dots1": {**_EXPERTS, **_GROUPS, "n_shared_experts": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, **_EXPERTS, **_WHOLE_HEADS},
    "exaone4": {**_SLIDING, **_WHOLE_HEADS},
    "exaone_moe": {**_SLIDING, **_EXPERTS, **_GROUPS, **_WHOLE_HEADS},
    "flex_olmo": {**_EXPERTS, **_WHOLE_HEADS},
    "flint": {**_SLIDING, **_EXPERTS},
    "gemma": {},
    "gemma2": {**_SLIDING, "attn_logit_softcapping": 7.0},
    "gemma3_text": _SLIDING,
    "gemma3n_text": {
        **_SLIDING,
        "num_hidden_layers": 4,
        "layer_types": 2 * _TYPES,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 101,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 6,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        **_SLIDING,
        "vocab_size_per_layer_input": 101,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 14,
    },
    "gemma4_unified_text": {**_SLIDING, "global_head_dim": 14},
    "glm": {},
    "glm4": {},
    "glm4_moe": {**_EXPERTS, **_GROUPS},
    "gpt2": {
        "n_embd": 52,
        "n_layer": NUM_LAYERS,
        "n_head": 4,
        "n_positions": MAX_POSITIONS,
        "scale_attn_by_inverse_layer_idx": True,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
    "gpt_bigcode": {"n_embd": 52, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": MAX_POSITIONS},
    "gpt_neox": {**_WHOLE_HEADS, "num_key_value_heads": None, "rotary_pct": 0.4},
    "gpt_oss": {**_SLIDING, **_EXPERTS},
    "granite": _WHOLE_HEADS,
    "granite_swa": {**_SLIDING, **_WHOLE_HEADS},
    "granitemoe": {**_EXPERTS, **_WHOLE_HEADS},
    "granitemoe_swa": {**_SLIDING, **_EXPERTS, **_WHOLE_HEADS},
    "granitemoeshared": {**_EXPERTS, **_WHOLE_HEADS, "shared_intermediate_size": 28},
    "helium": {"hidden_size": 40},
    "hy_v3": {**_EXPERTS, "n_shared_experts": 1},
    "hyperclovax": _WHOLE_HEADS,
    "jais2": {},
    "kolibri1": {**_SLIDING, **_EXPERTS},
    "laguna": {**_SLIDING, **_EXPERTS, **_MLP_TYPES},
    "llama": {},
    "mellum": {**_SLIDING, **_EXPERTS, **_MLP_TYPES},
    "mimo_v2_flash": {**_SLIDING, **_EXPERTS, **_GROUPS, **_MLP_TYPES, "v_head_dim": 6},
    "minimax_m2": {**_EXPERTS},
    "ministral": _SLIDING,
    "ministral3": {"sliding_window": None},
    "mistral": {"sliding_window": OWN_WINDOW},
    "mixtral": {**_EXPERTS, "sliding_window": None},
    "modernbert-decoder": {**_SLIDING, **_WHOLE_HEADS},
    "nanochat": _WHOLE_HEADS,
    "olmo": _WHOLE_HEADS,
    "olmo2": _WHOLE_HEADS,
    "olmo3": {**_SLIDING, **_WHOLE_HEADS},
    "olmoe": {**_EXPERTS, **_WHOLE_HEADS},
    "phi": {**_WHOLE_HEADS, "partial_rotary_factor": 0.6},
    "phi3": {**_WHOLE_HEADS, "partial_rotary_factor": 0.6, "sliding_window": None},
    "phimoe": {**_EXPERTS, **_WHOLE_HEADS, "sliding_window": None},
    "qwen2": _WHOLE_HEADS,
    "qwen2_moe": {**_EXPERTS, **_WHOLE_HEADS},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "seed_oss": {},
    "smollm3": {**_WHOLE_HEADS, "no_rope_layer_interval": 2},
    "solar_open": {**_EXPERTS, **_GROUPS, "n_shared_experts": 1},
    "starcoder2": {**_WHOLE_HEADS, "sliding_window": None},
    "vaultgemma": {**_SLIDING, "attn_logit_softcapping": 7.0},
}
"""By `config.model_type`: what is other than in `COMMON`; None is left out."""


def make_config(family: str, **changes: Any) -> dict[str, Any]:
    """All settings of a tiny model."""
    settings = COMMON | ALL_CONFIGS[family] | changes
    return {name: value for name, value in settings.items() if value is not None}
