"""Adapters of torchtune, NeMo and llama.cpp: names, orders of rows, and what does not fit."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import shiradelta
from shiradelta.errors import ShiraDeltaError
from tests.conftest import write_model

LAYER = "model.layers.0"
#: Two heads of queries and one of keys, of four units each.
ABOUT = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}
SHAPES = {
    f"{LAYER}.self_attn.q_proj.weight": (8, 6),
    f"{LAYER}.self_attn.k_proj.weight": (4, 6),
    f"{LAYER}.self_attn.v_proj.weight": (4, 6),
    f"{LAYER}.mlp.gate_proj.weight": (10, 6),
    f"{LAYER}.mlp.up_proj.weight": (10, 6),
    "model.embed_tokens.weight": (9, 6),
}
#: Rows of a head in Meta's order: the halves of the rotation in turn.
IN_TURN = torch.tensor([0, 2, 1, 3])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "base", {name: torch.randn(shape) for name, shape in SHAPES.items()})
    (folder / "config.json").write_text(json.dumps(ABOUT))
    return folder


def changes(source: Path, base: Path | None, **options: Any) -> dict[str, Tensor]:
    shiradelta.convert(source, source.parent / "x.shd", 1.0, base, "f32", **options)
    with shiradelta.open_delta(source.parent / "x.shd") as delta:
        return {name: torch.from_numpy(delta[name].to_dense()) for name in delta}


def refusal(source: Path, base: Path | None, match: str, **options: Any) -> None:
    with pytest.raises(ShiraDeltaError, match=match) as caught:
        changes(source, base, **options)
    assert "\n" not in str(caught.value)


def low_rank(rows: int, rank: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, 6), torch.randn(rows, rank)


# ------------------------------------------------------------------------------------------ torchtune


def torchtune(**parts: Tensor) -> dict[str, Tensor]:
    return {f"layers.0.{key.replace('__', '.')}": tensor for key, tensor in parts.items()}


def test_torchtunes_order_of_queries(base: Path, tmp_path: Path):
    (a, b), (c, d) = low_rank(8), low_rank(10)
    file = {"attn__q_proj__lora_a__weight": a, "attn__q_proj__lora_b__weight": b}
    file |= {"mlp__w1__lora_a__weight": c, "mlp__w1__lora_b__weight": d}
    save_file(torchtune(**file), tmp_path / "adapter.safetensors")
    found = changes(tmp_path / "adapter.safetensors", base, alpha=4.0)
    rows = torch.cat([IN_TURN, IN_TURN + 4])
    torch.testing.assert_close(found[f"{LAYER}.self_attn.q_proj.weight"], 2 * (b @ a)[rows])
    torch.testing.assert_close(found[f"{LAYER}.mlp.gate_proj.weight"], 2 * d @ c)
    refusal(tmp_path / "adapter.safetensors", base, "does not say alpha, and no adapter_config.json is beside it")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4}))
    found = changes(tmp_path / "adapter.safetensors", base)
    torch.testing.assert_close(found[f"{LAYER}.mlp.gate_proj.weight"], 2 * d @ c)
    refusal(tmp_path / "adapter.safetensors", None, "give --base MODEL")


@pytest.mark.parametrize(
    ("parts", "about", "message"),
    [
        ({"attn__q_proj__lora_a__weight": (2, 6)}, {}, "only A of A and B"),
        ({"attn__q_proj__lora_a__weight": (2, 6), "attn__q_proj__lora_b__weight": (6, 2)}, {}, "none of 2 heads"),
        (
            {"attn__q_proj__lora_a__weight": (2, 6), "attn__other__lora_b__weight": (8, 2)},
            {},
            "no layer of torchtune's",
        ),
        ({"attn__q_proj__lora_a__weight": (2, 6)}, {"model_type": "phi3"}, "not of 'phi3'; save the adapter for PEFT"),
        ({"attn__q_proj__lora_a__weight": (2, 6)}, {"num_attention_heads": None}, "no config.json with num_attention"),
    ],
)
def test_what_is_not_torchtunes(
    base: Path, tmp_path: Path, parts: dict[str, tuple[int, ...]], about: dict[str, Any], message: str
):
    (base / "config.json").write_text(json.dumps({**ABOUT, **about}))
    save_file(torchtune(**{key: torch.randn(shape) for key, shape in parts.items()}), tmp_path / "a.safetensors")
    refusal(tmp_path / "a.safetensors", base, message, alpha=2.0)


# ------------------------------------------------------------------------------------------ NeMo

QKV, FC1 = "decoder.layers.0.self_attention.linear_qkv.adapter", "decoder.layers.0.mlp.linear_fc1.adapter"


def nemo(**sizes: int) -> dict[str, Tensor]:
    file = {}
    for module, rows in sizes.items():
        a, b = low_rank(rows)
        name = {"qkv": QKV, "fc1": FC1}[module]
        file |= {f"{name}.linear_in.weight": a, f"{name}.linear_out.weight": b}
    return file


def test_megatrons_fused_layers(base: Path, tmp_path: Path):
    file = nemo(qkv=16, fc1=20)
    save_file(file, tmp_path / "a.safetensors")
    found = changes(tmp_path / "a.safetensors", base, alpha=2.0)
    qkv = file[f"{QKV}.linear_out.weight"] @ file[f"{QKV}.linear_in.weight"]
    gated = file[f"{FC1}.linear_out.weight"] @ file[f"{FC1}.linear_in.weight"]
    wanted = {"self_attn.q_proj": qkv[:8], "self_attn.k_proj": qkv[8:12], "self_attn.v_proj": qkv[12:]}
    wanted |= {"mlp.gate_proj": gated[:10], "mlp.up_proj": gated[10:]}
    assert found.keys() == {f"{LAYER}.{name}.weight" for name in wanted}
    for name, change in wanted.items():
        torch.testing.assert_close(found[f"{LAYER}.{name}.weight"], change)
    refusal(tmp_path / "a.safetensors", base, "does not say alpha; give --alpha")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (nemo(qkv=15), "none of 2 and 1 heads"),
        (nemo(fc1=19), "an odd number of rows"),
        ({f"{QKV}.linear_in.weight": torch.randn(2, 6)}, "only A of A and B is there"),
        ({**nemo(qkv=16), "decoder.final": torch.randn(2)}, "'decoder.final' is no factor"),
        ({**nemo(qkv=16), f"{QKV}_q.linear_in.weight": torch.randn(2, 6)}, "are the same factor; remove one"),
    ],
)
def test_what_is_not_nemos(base: Path, tmp_path: Path, file: dict[str, Tensor], message: str):
    save_file(file, tmp_path / "a.safetensors")
    refusal(tmp_path / "a.safetensors", base, message, alpha=2.0)


def archive(path: Path, entries: dict[str, bytes | tarfile.TarInfo], mode: str = "w:") -> Path:
    """A tar file of some entries: bytes, or an entry without any."""
    with tarfile.open(path, mode) as made:
        for name, content in entries.items():
            entry = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            entry.name = name
            if isinstance(content, bytes):
                entry.size = len(content)
                made.addfile(entry, io.BytesIO(content))
            else:
                made.addfile(entry)
    return path


def saved(tensors: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(tensors, stream)
    return stream.getvalue()


CONFIG = b"""
name: megatron_gpt
peft:
  peft_scheme: lora
  lora_tuning:  # other schemes have their own
    target_modules: ['attention_qkv']
    adapter_dim: 2
    alpha: %s
"""


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
@pytest.mark.parametrize("alpha", [b"2", b"${.adapter_dim}", b"${model.peft.lora_tuning.adapter_dim}"])
def test_an_archive_of_nemo(base: Path, tmp_path: Path, mode: str, alpha: bytes, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    file = nemo(qkv=16, fc1=20)
    entries: dict[str, Any] = {"./model_config.yaml": CONFIG % alpha, "./model_weights.ckpt": saved(file)}
    found = changes(archive(tmp_path / "a.nemo", {".": directory(), **entries}, mode), base)
    qkv = file[f"{QKV}.linear_out.weight"] @ file[f"{QKV}.linear_in.weight"]
    torch.testing.assert_close(found[f"{LAYER}.self_attn.q_proj.weight"], qkv[:8])
    assert len(found) == 5
    assert not list((tmp_path / "temporary").iterdir())


def directory() -> tarfile.TarInfo:
    entry = tarfile.TarInfo()
    entry.type = tarfile.DIRTYPE
    return entry


def link(target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo()
    entry.type, entry.linkname = kind, target
    return entry


WEIGHTS = "model_weights.ckpt"
ARCHIVES: dict[str, tuple[dict[str, Any], str]] = {
    "no weights": ({"model_config.yaml": CONFIG % b"2"}, "has no model_weights.ckpt; save it with NeMo as one file"),
    "ranks": ({f"mp_rank_0{i}/{WEIGHTS}": b"" for i in (0, 1)}, "has the model_weights.ckpt of several ranks"),
    "distributed": ({"model_weights/metadata.json": b"{}"}, "has no model_weights.ckpt"),
    "link": ({WEIGHTS: link("/etc/passwd")}, "is no plain file"),
    "hard link": ({WEIGHTS: link("b", tarfile.LNKTYPE)}, "is no plain file"),
    "folder": ({WEIGHTS: directory()}, "is no plain file"),
    "twice": ({WEIGHTS: b"", f"./{WEIGHTS}": b""}, "is in it twice"),
    "above": ({f"../{WEIGHTS}": saved({"a": torch.ones(2)})}, "has no model_weights.ckpt"),
    "program": ({WEIGHTS: saved(Path("x"))}, r"a\.nemo: model_weights.ckpt: is a pickle of more than tensors"),
    "bytes": ({WEIGHTS: b"abc"}, r"a\.nemo: model_weights.ckpt: is not a file of torch.save"),
    "no alpha": ({WEIGHTS: saved(nemo(qkv=16))}, "does not say alpha; give --alpha"),
    "other alpha": ({"model_config.yaml": CONFIG % b"null", WEIGHTS: saved(nemo(qkv=16))}, "does not say alpha"),
    "two alphas": ({"model_config.yaml": CONFIG % b"2\n    alpha: 3", WEIGHTS: saved(nemo(qkv=16))}, "does not say"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_is_not_read(base: Path, tmp_path: Path, name: str):
    entries, message = ARCHIVES[name]
    refusal(archive(tmp_path / "a.nemo", entries), base, message)


def test_an_archive_that_is_damaged(base: Path, tmp_path: Path):
    raw = archive(tmp_path / "a.nemo", {WEIGHTS: saved(nemo(qkv=16))}).read_bytes()
    zipped = archive(tmp_path / "b.nemo", {WEIGHTS: saved(nemo(qkv=16))}, "w:gz").read_bytes()
    bomb = gzip.compress(bytes(1 << 20)) + gzip.compress(bytes(1 << 24))
    huge = tarfile.TarInfo("x")
    huge.size = 1 << 40
    beyond = gzip.compress(huge.tobuf())
    for number, content in enumerate((b"", b"abc", raw[:700], raw[:-9000], zipped[:300], bomb, beyond, huge.tobuf())):
        (tmp_path / "c.nemo").write_bytes(content)
        refusal(
            tmp_path / "c.nemo", base, r"is no archive of NeMo, or damaged|has no model_weights.ckpt", alpha=number + 1
        )


# ------------------------------------------------------------------------------------------ llama.cpp


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(tensors: dict[str, np.ndarray[Any, Any]], kind: int = 0, **values: Any) -> bytes:
    """A GGUF file of version 3."""
    about = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"}
    about |= {"adapter.lora.alpha": 4.0, **{key.replace("__", "."): value for key, value in values.items()}}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(about))
    for key, value in about.items():
        packed = struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<If", 6, value)
        head += text(key) + packed
    data = b""
    for name, array in tensors.items():
        head += text(name) + struct.pack("<I", array.ndim) + struct.pack(f"<{array.ndim}Q", *array.shape[::-1])
        head += struct.pack("<IQ", kind, len(data))
        data += array.tobytes() + bytes(-array.nbytes % 32)
    return head + bytes(-len(head) % 32) + data


def factors(**parts: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    return {f"{key.replace('__', '.')}": tensor.contiguous().numpy() for key, tensor in parts.items()}


def test_names_and_order_of_llama_cpp(base: Path, tmp_path: Path):
    (a, b), (c, d), (e, f) = low_rank(4), low_rank(10), (torch.randn(9, 2), torch.randn(6, 2))
    held = factors(
        blk__0__attn_k__weight__lora_a=a,
        blk__0__attn_k__weight__lora_b=b[IN_TURN],
        blk__0__ffn_gate__weight__lora_a=c,
        blk__0__ffn_gate__weight__lora_b=d,
        token_embd__weight__lora_a=e,
        token_embd__weight__lora_b=f,
    )
    (tmp_path / "x.gguf").write_bytes(gguf(held))
    found = changes(tmp_path / "x.gguf", base)
    torch.testing.assert_close(found[f"{LAYER}.self_attn.k_proj.weight"], 2 * b @ a)
    torch.testing.assert_close(found[f"{LAYER}.mlp.gate_proj.weight"], 2 * d @ c)
    torch.testing.assert_close(found["model.embed_tokens.weight"], 2 * e @ f.T)
    found = changes(tmp_path / "x.gguf", base, alpha=2.0)
    torch.testing.assert_close(found[f"{LAYER}.mlp.gate_proj.weight"], d @ c)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made[:-40], "header is damaged .* reaches beyond the file"),
        (lambda made: made[:60], "header is damaged"),
        (lambda made: made[:8] + b"\xff" * 8 + made[16:], "header is damaged"),
        (lambda made: made[:4] + b"\x09" + made[5:], "header is damaged .version 9"),
        (lambda made: made.replace(b"lora_b", b"lora_c"), "is no factor of a layer that is known here"),
        (lambda made: made.replace(b"attn_k", b"attn_x"), "is no factor of a layer that is known here"),
        (lambda made: made.replace(b"llama", b"bloom"), "architecture 'bloom', whose names"),
        (lambda made: made.replace(text("lora"), text("oft!")), "of type 'oft!'; only lora"),
        (lambda made: made.replace(b"adapter\x0c", b"model..\x0c"), "llama.cpp's format; give the safetensors"),
    ],
)  # fmt: skip
def test_damaged_gguf(base: Path, tmp_path: Path, change: Any, message: str):
    a, b = low_rank(4)
    made = gguf(factors(blk__0__attn_k__weight__lora_a=a, blk__0__attn_k__weight__lora_b=b))
    (tmp_path / "x.gguf").write_bytes(change(made))
    refusal(tmp_path / "x.gguf", base, message)


def test_a_quantised_factor(base: Path, tmp_path: Path):
    a, b = low_rank(4)
    held = factors(blk__0__attn_k__weight__lora_a=a, blk__0__attn_k__weight__lora_b=b)
    (tmp_path / "x.gguf").write_bytes(gguf(held, kind=2))
    refusal(tmp_path / "x.gguf", base, "is quantised .GGUF's type 2.; make an adapter in f16")
