"""Language models of transformers with a mixture of experts, whose weights are stacked in memory."""

from __future__ import annotations

from typing import Any

from benchmarks.architectures.zoo import DECODER, Architecture, add, text_inputs, transformer

#: Stacked experts as most architectures name them.
STACKED = ("experts.gate_up_proj", "experts.down_proj")
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _experts(
    name: str,
    model: str,
    *usual: str,
    unwrapped: tuple[str, ...] = (),
    experts: tuple[str, ...] = STACKED,
    **options: Any,
) -> None:
    add(
        Architecture(
            name,
            "experts",
            transformer(model, **options),
            text_inputs,
            usual=usual or ("q_proj", "v_proj"),
            unwrapped=unwrapped,
            experts=experts,
            texts=True,
        )
    )


_experts("mixtral", "MixtralForCausalLM", **DECODER, **LOCAL)
_experts("qwen3-moe", "Qwen3MoeForCausalLM", **DECODER, **ROUTED, head_dim=8, decoder_sparse_step=1)
_experts(
    "qwen3-next",
    "Qwen3NextForCausalLM",
    **DECODER,
    **ROUTED,
    head_dim=8,
    shared_expert_intermediate_size=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)
_experts("olmoe", "OlmoeForCausalLM", **DECODER, num_experts=4, num_experts_per_tok=2)
_experts(
    "deepseek-v3",
    "DeepseekV3ForCausalLM",
    "q_a_proj",
    "q_b_proj",
    "kv_b_proj",
    **{**DECODER, "num_key_value_heads": 4},
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
)
_experts(
    "gpt-oss",
    "GptOssForCausalLM",
    **DECODER,
    **LOCAL,
    head_dim=8,
    layer_types=["sliding_attention", "full_attention"],
)
_experts("granite-moe", "GraniteMoeForCausalLM", **DECODER, **LOCAL)
_experts("phimoe", "PhimoeForCausalLM", **DECODER, **LOCAL)
_experts(
    "llama4-text",
    "Llama4ForCausalLM",
    **DECODER,
    head_dim=8,
    intermediate_size_mlp=64,
    num_local_experts=4,
    num_experts_per_tok=1,
    moe_layers=[1],
)
_experts(
    "jamba",
    "JambaForCausalLM",
    **DECODER,
    num_experts=4,
    num_experts_per_tok=2,
    attn_layer_period=2,
    attn_layer_offset=1,
    expert_layer_period=2,
    expert_layer_offset=1,
    mamba_d_state=8,
    mamba_dt_rank=4,
    use_mamba_kernels=False,
)
_experts(
    "nemotron-h",
    "NemotronHForCausalLM",
    unwrapped=("out_proj",),
    experts=("experts.up_proj", "experts.down_proj"),
    **{**DECODER, "num_hidden_layers": 4},
    head_dim=8,
    layers_block_type=["mamba", "mlp", "attention", "moe"],
    ssm_state_size=8,
    mamba_num_heads=8,
    mamba_head_dim=8,
    n_groups=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
)
