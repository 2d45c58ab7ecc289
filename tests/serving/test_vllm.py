"""The engine in vLLM itself, on a CPU, where `make vllm` has installed it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import shiradelta as sd
from tests.swapping import random_delta

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("SHIRADELTA_VLLM", ROOT / "build" / "vllm"))
PYTHON = ENVIRONMENT / "bin" / "python"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON.exists(), reason="make vllm installs vLLM")]


def test_adapters_in_vllm_are_those_of_a_fresh_load(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 500}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    made = {
        name: random_delta(tuple(one.shape), max(1, one.numel() // 100), i, base=one, scale=0.1)
        for i, (name, one) in enumerate(weights.items())
    }
    sd.save_delta(tmp_path / "a.shd", made)
    sd.apply(tmp_path / "base", tmp_path / "a.shd", out=tmp_path / "tuned")
    preload = next(ENVIRONMENT.rglob("libiomp5.so"), None)
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **more, "LD_PRELOAD": str(preload or ""), "HF_HUB_OFFLINE": "1"}
    command = [str(PYTHON), "-m", "tests.serving.in_vllm", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    base, tuned = found["base"], found["fresh"]
    assert sum(tuned[name] != base[name] for name in base) == 15
    assert found["followed"] == base
    assert found["tuned"] == found["after refusal"] == found["after switches"] == tuned
    assert "adapter 'b' is not loaded" in found["refused"]
    assert found["reverted"] == base
    assert found["reverted text"] == found["text"] != found["tuned text"]
