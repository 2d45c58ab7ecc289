"""Small models and adapters, made once a session; tests copy what they change."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

# Before Triton is imported: without a GPU its kernels run in its interpreter.  TRITON_INTERPRET=0 takes the GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
# No test asks the Hub, but for those with the stand-in of it.
os.environ["HF_HUB_OFFLINE"] = "1"
# Models are tiny and workers several: threads that wait for one another would take longer than the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import settings

import shiradelta
from shiradelta.util import interrupts
from tests.hub import Hub

if TYPE_CHECKING:
    import torch

# The same examples in every run, more of them in CI; HYPOTHESIS_PROFILE=long looks for new ones.
settings.register_profile("short", max_examples=12, derandomize=True, deadline=None)
settings.register_profile("ci", max_examples=80, derandomize=True, deadline=None)
settings.register_profile("long", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

SHAPES = {
    "model.embed_tokens.weight": (64, 32),
    "model.layers.0.mlp.up_proj.weight": (96, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 96),
    "model.layers.0.norm.weight": (32,),
    "model.layers.1.mlp.up_proj.weight": (96, 32),
    "model.layers.1.mlp.down_proj.weight": (32, 96),
}


# The process that hands out tests needs no torch, which takes two seconds to import.


def random_tensors(dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def write_model(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """A model's folder as transformers writes it: one file, or shards with an index."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "test", "tie_word_embeddings": True}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_lora(folder: Path, modules: dict[str, tuple[int, int]], config: dict[str, object], seed: int = 3) -> Path:
    """A PEFT adapter with random factors."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tensors = {}
    for module, (rows, columns) in modules.items():
        rank = 4
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **config}))
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16 and fp32 models, and deltas of two fine-tunes against the bf16 one."""
    import torch

    root = tmp_path_factory.mktemp("made")
    write_model(root / "bf16", random_tensors(torch.bfloat16))
    write_model(root / "sharded", random_tensors(torch.bfloat16), shards=3)
    write_model(root / "f32", random_tensors(torch.float32))
    for seed, name in ((1, "a"), (2, "b")):
        tuned = {
            key: (
                value.float() + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
            ).bfloat16()
            for key, value in random_tensors(torch.bfloat16).items()
        }
        write_model(root / f"tuned_{name}", tuned)
        shiradelta.convert(
            root / f"tuned_{name}", root / f"{name}.shd", base=root / "bf16", sparsity=0.05, values="int8"
        )
    return root


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A fresh copy of the bf16 model."""
    return Path(shutil.copytree(made / "bf16", tmp_path / "model"))


def read(folder: Path, name: str) -> np.ndarray:
    """A tensor's elements as bits, read by the safetensors library alone."""
    import torch
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            if name in weights.keys():  # noqa: SIM118
                tensor = weights.get_tensor(name).contiguous()
                return tensor.view(torch.uint8).numpy().view(f"<u{tensor.element_size()}").reshape(-1)
    raise KeyError(name)


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread can be started, as on a system without memory for its stack."""

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(interrupts, "_idle", [])
    monkeypatch.setattr(interrupts, "start_new_thread", refuse)
    monkeypatch.setattr(Thread, "start", refuse)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in of the Hub, which is asked in this process and in those that it starts; with an empty cache."""
    from huggingface_hub import constants

    with Hub().running() as server:
        settings = {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        for name, value in {**settings, "NO_PROXY": "127.0.0.1", "HF_TOKEN": ""}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        names = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + names)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
