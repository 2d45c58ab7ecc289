"""Language models of transformers: decoders, encoders, both, and state spaces."""

from __future__ import annotations

from typing import Any

from benchmarks.architectures.zoo import (
    DECODER,
    SPECIAL,
    TEXT,
    VOCABULARY,
    Architecture,
    Inputs,
    add,
    text_inputs,
    tokens,
    transformer,
)


def _text(name: str, model: str, *usual: str, unwrapped: tuple[str, ...] = (), **options: Any) -> None:
    add(
        Architecture(
            name,
            "text",
            transformer(model, **options),
            text_inputs,
            usual=usual or ("q_proj", "v_proj"),
            unwrapped=unwrapped,
            texts=True,
        )
    )


def _both(name: str, model: str, *usual: str, **options: Any) -> None:
    """An encoder with a decoder."""

    def inputs() -> Inputs:
        return {"input_ids": tokens(), "decoder_input_ids": tokens()}

    layers = usual or ("q_proj", "v_proj")
    add(Architecture(name, "text", transformer(model, **options), inputs, usual=layers, texts=True, answers=True))


HEADS = {**TEXT, **SPECIAL}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, **SPECIAL}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64, **SPECIAL}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
T5: dict[str, Any] = {
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
}

_text("llama", "LlamaForCausalLM", **DECODER)
_text("llama-tied", "LlamaForCausalLM", **DECODER, tie_word_embeddings=True)
_text("mistral", "MistralForCausalLM", **DECODER)
_text("qwen2", "Qwen2ForCausalLM", **DECODER)
_text("qwen3", "Qwen3ForCausalLM", **DECODER, head_dim=8)
_text("gemma2", "Gemma2ForCausalLM", **DECODER, head_dim=8)
_text("gemma3-text", "Gemma3ForCausalLM", **DECODER, head_dim=8)
_text("phi", "PhiForCausalLM", "q_proj", "v_proj", "fc1", "fc2", **HEADS)
_text("phi3", "Phi3ForCausalLM", "qkv_proj", "o_proj", **DECODER)
_text("gpt2", "GPT2LMHeadModel", "c_attn", **GPT2)
_text("gpt-bigcode", "GPTBigCodeForCausalLM", "c_attn", **GPT2)
_text("gpt-neox", "GPTNeoXForCausalLM", "query_key_value", **HEADS)
_text("gptj", "GPTJForCausalLM", **GPT2, rotary_dim=4)
_text("falcon", "FalconForCausalLM", "query_key_value", **SMALL, num_attention_heads=4)
_text("bloom", "BloomForCausalLM", "query_key_value", hidden_size=32, n_layer=2, n_head=4, vocab_size=256, **SPECIAL)
_text("mpt", "MptForCausalLM", "Wqkv", d_model=32, n_layers=2, n_heads=4, max_seq_len=64, vocab_size=VOCABULARY)
_text("opt", "OPTForCausalLM", **HEADS, ffn_dim=64, word_embed_proj_dim=32)
_text("cohere", "CohereForCausalLM", **DECODER)
_text("olmo2", "Olmo2ForCausalLM", **DECODER)
_text("granite", "GraniteForCausalLM", **DECODER)
_text("stablelm", "StableLmForCausalLM", **DECODER)
_text("starcoder2", "Starcoder2ForCausalLM", **DECODER)
_text("smollm3", "SmolLM3ForCausalLM", **DECODER)
_text("lfm2", "Lfm2ForCausalLM", **DECODER, layer_types=["conv", "full_attention"])
_text("mamba", "MambaForCausalLM", "in_proj", "x_proj", unwrapped=("out_proj",), **SMALL, state_size=8)
_text(
    "mamba2",
    "Mamba2ForCausalLM",
    "in_proj",
    unwrapped=("out_proj",),
    **SMALL,
    state_size=8,
    num_heads=8,
    head_dim=8,
    n_groups=2,
)
_text("rwkv", "RwkvForCausalLM", "key", "value", "receptance", "output", **SMALL, context_length=64)

_text("bert", "BertForMaskedLM", "query", "value", **TEXT)
_text("bert-classifier", "BertForSequenceClassification", "query", "value", **TEXT, num_labels=3)
_text("roberta", "RobertaForMaskedLM", "query", "value", **TEXT)
_text("electra", "ElectraForMaskedLM", "query", "value", **TEXT, embedding_size=16)
_text("albert", "AlbertForMaskedLM", "query", "value", **TEXT, embedding_size=16)
_text(
    "deberta-v2",
    "DebertaV2ForMaskedLM",
    "query_proj",
    "value_proj",
    **TEXT,
    relative_attention=True,
    position_buckets=16,
    pos_att_type=["c2p", "p2c"],
)
_text("modernbert", "ModernBertForMaskedLM", "Wqkv", **HEADS, cls_token_id=1, sep_token_id=2)
_text(
    "distilbert",
    "DistilBertForMaskedLM",
    "q_lin",
    "v_lin",
    dim=32,
    hidden_dim=64,
    n_layers=2,
    n_heads=4,
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
)
_text("mpnet", "MPNetForMaskedLM", "q", "v", **TEXT)
_text("nomic-bert", "NomicBertModel", **TEXT)
_text("gte", "GteModel", **TEXT)
_text("jina-embeddings-v3", "JinaEmbeddingsV3Model", **TEXT)

_both("t5", "T5ForConditionalGeneration", "q", "v", **T5)
_both("bart", "BartForConditionalGeneration", **BART, vocab_size=VOCABULARY, max_position_embeddings=64, **SPECIAL)
