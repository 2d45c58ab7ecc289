"""Sources of every kind that `convert` and `apply` read."""

from __future__ import annotations

import json

from tests import whole_adapters
from tests.source_files import (
    SHAPES,
    UP,
    Json,
    Made,
    Random,
    Strange,
    Tree,
    Weights,
    adapter,
    bf16,
    f32,
    factors,
    folder,
    i64,
    model,
)


def peft(rng: Random) -> Tree:
    config = {
        "alpha_pattern": {r"layers\.(0|2)\.mlp\.up_proj": 8, "v_proj": 2},
        "rank_pattern": {"model.layers.9.q_proj": 4, "k_proj": 8},
        "target_modules": ["up_proj"],
        "modules_to_save": ["score"],
        "use_rslora": True,
        "fan_in_fan_out": False,
        "trainable_token_indices": {"embed_tokens": [0, 3]},
    }
    tensors = {name: made for module in UP for name, made in factors(rng, module).items()}
    tensors |= {"model.embed_tokens.token_adapter.trainable_tokens_delta": f32(rng, 2, 8), "score.weight": f32(rng, 3)}
    return adapter(tensors | {"model.layers.0.norm.weight": f32(rng, 8)}, **config)


def adalora(rng: Random) -> Tree:
    tensors = factors(rng, UP[0], "lora_A", "lora_B") | {f"{UP[0]}.lora_E": f32(rng, 2, 1)}
    return adapter(tensors, peft_type="ADALORA", init_r=2, target_r=1, rank_pattern={f"{UP[0]}.lora_E": [True, False]})


def lycoris(rng: Random) -> Tree:
    tensors = {f"{UP[0]}.{part}": f32(rng, *shape) for part, shape in _LOHA.items()}
    tensors |= {f"{UP[1]}.lokr_w1": f32(rng, 4, 2), f"{UP[1]}.lokr_w2_a": f32(rng, 4, 2)}
    tensors |= {f"{UP[1]}.lokr_w2_b": f32(rng, 2, 4), f"{UP[1]}.alpha": f32(rng), f"{UP[0]}.alpha": f32(rng)}
    return {"source/x.safetensors": Weights(tensors | {"model.layers.0.norm.w_norm": f32(rng, 8)})}


_LOHA = {"hada_w1_a": (16, 2), "hada_w1_b": (2, 8), "hada_w2_a": (16, 2), "hada_w2_b": (2, 8)}


def kohya(rng: Random) -> Tree:
    tensors: dict[str, Made] = {}
    for module in UP:
        name = "lora_te_" + module.replace(".", "_")
        rows, columns = SHAPES[f"{module}.weight"]
        tensors |= {f"{name}.lora_down.weight": f32(rng, 2, columns), f"{name}.lora_up.weight": f32(rng, rows, 2)}
        tensors[f"{name}.alpha"] = f32(rng)
    return {"source/x.safetensors": Weights(tensors, {"ss_network_alpha": "4.0", "ss_network_dim": "2"})}


def diffusers(rng: Random) -> Tree:
    config = {"text_encoder.lora_alpha": 4, "text_encoder.r": 2, "text_encoder.alpha_pattern": {"q_proj": 1}}
    tensors = {f"text_encoder.{name}": made for name, made in factors(rng, UP[0]).items()}
    return {"source/x.safetensors": Weights(tensors, {"lora_adapter_metadata": json.dumps(config)})}


def shira(rng: Random) -> Tree:
    tensors = {f"{UP[0]}.shira_weight": f32(rng, 3), f"{UP[0]}.shira_indices": i64(0, 1, 15, 7, 0, 3, shape=[2, 3])}
    return adapter(tensors, peft_type="SHIRA")


def sparse(rng: Random) -> Tree:
    tensors = {f"{UP[0]}.weight.values": f32(rng, 3), f"{UP[0]}.weight.positions": i64(1, 5, 127)}
    tensors |= {"model.conv.weight.values": f32(rng, 2), "model.conv.weight.positions": i64(7, 3)}
    return {"source/x.safetensors": Weights(tensors)}


def dense(rng: Random) -> Tree:
    tensors = {f"{UP[0]}.diff": f32(rng, 16, 8), "model.conv.diff": f32(rng, 6, 4, 3, 3)}
    return {"source/x.safetensors": Weights(tensors | {"model.layers.0.norm.w_norm": f32(rng, 8)})}


def full(rng: Random) -> Tree:
    return folder("source", model(rng), 3)


def pipeline(rng: Random) -> Tree:
    tree = {"base/model_index.json": Json({"_class_name": "Pipeline", "text_encoder": ["transformers", "Model"]})}
    return tree | folder("base/text_encoder", model(rng)) | folder("base/unet", {"a.weight": bf16(rng, 4, 4)})


BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 12,
}


def bert(rng: Random) -> Tree:
    """A LoRA whose module needs transformers' own names to be found."""
    module = "bert.encoder.layer.0.attention.self.query"
    return adapter({f"{module}.lora_A.weight": f32(rng, 2, 8), f"{module}.lora_B.weight": f32(rng, 8, 2)})


def bert_base(rng: Random) -> Tree:
    shapes = {"embeddings.word_embeddings.weight": [12, 8], "encoder.layer.0.attention.self.query.weight": [8, 8]}
    return folder("base", {name: f32(rng, *shape) for name, shape in shapes.items()}, config=BERT)


def sentence(at: str) -> Tree:
    """What sentence-transformers lays beside a model."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules.append({"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
    return {
        f"{at}/modules.json": Json(modules),
        f"{at}/1_Pooling/config.json": Json({"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True}),
    }


_BASES = {kohya: pipeline, diffusers: pipeline, bert: bert_base}
#: Kind -> (its files, whether it needs the base, what makes the base).
KINDS: dict[str, tuple[whole_adapters.Make, bool, whole_adapters.Make]] = {
    made.__name__: (made, needs, _BASES.get(made, whole_adapters.base_of))
    for made, needs in (
        *((peft, True), (adalora, False), (lycoris, True), (kohya, True), (diffusers, True), (shira, True)),
        *((sparse, True), (dense, False), (full, True), (bert, True)),
    )
}
KINDS |= whole_adapters.KINDS


def whole(kind: str, rng: Random) -> Strange:
    """A source that can be converted, or a target that fits."""
    if kind == "target":
        return Strange(kind, folder("source", model(rng), rng.choice((1, 3))) | sentence("source"), "source", None)
    make, needs_base, make_base = KINDS[kind]
    files, with_base = make(rng), needs_base or rng.random() < 0.7
    files |= make_base(rng) if with_base else {}
    file = next((name for name in files if name.startswith("source/x.")), "source")
    options = {"sparsity": rng.choice((0.01, 0.5, 1.0)), "values": rng.choice(("f32", "int4", "sign", "int8"))}
    options |= rng.choice(({}, {}, {"scope": "model"}, {"skip": "*"}, {"skip": "*"}, {"zstd": True}))
    options |= whole_adapters.OPTIONS.get(kind, {})
    return Strange(kind, files, file, "base" if with_base else None, options)
