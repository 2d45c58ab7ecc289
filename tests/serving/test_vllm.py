"""The engine in vLLM itself, on a CPU, where `make vllm` has installed it."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import shiradelta as sd
from shiradelta.errors import TargetError
from shiradelta.serving.plugin import UNPACKED
from shiradelta.serving.session import SwapRequest
from shiradelta.serving.vllm_client import RUNNING, VLLMServer, weight_version
from tests.swapping import random_delta

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("SHIRADELTA_VLLM", ROOT / "build" / "vllm"))
PYTHON = ENVIRONMENT / "bin" / "python"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON.exists(), reason="make vllm installs vLLM")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, `base`, a delta for all its tensors, `a.shd`, and the patched model, `tuned`."""
    transformers = pytest.importorskip("transformers")
    made_in = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 500}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).to(torch.bfloat16)
    model.save_pretrained(made_in / "base")
    weights = load_file(made_in / "base" / "model.safetensors")
    made = {
        name: random_delta(tuple(one.shape), max(1, one.numel() // 100), i, base=one, scale=0.1)
        for i, (name, one) in enumerate(weights.items())
    }
    sd.save_delta(made_in / "a.shd", made)
    sd.apply(made_in / "base", made_in / "a.shd", out=made_in / "tuned")
    return made_in


def environment(*paths: Path, **more: str) -> dict[str, str]:
    preload = next(ENVIRONMENT.rglob("libiomp5.so"), None)
    path = os.pathsep.join(map(str, (ROOT, *paths)))
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", UNPACKED: "1", **more}
    return {**os.environ, **more, "LD_PRELOAD": str(preload or "")}


def test_adapters_in_vllm_are_those_of_a_fresh_load(folder: Path):
    command = [str(PYTHON), "-m", "tests.serving.in_vllm", str(folder)]
    within = environment(VLLM_ENABLE_V1_MULTIPROCESSING="0")
    done = subprocess.run(command, cwd=ROOT, env=within, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    base, tuned = found["base"], found["fresh"]
    assert sum(tuned[name] != base[name] for name in base) == 15
    assert found["followed"] == base
    assert found["tuned"] == found["after refusal"] == found["after switches"] == tuned
    assert "adapter 'b' is not loaded" in found["refused"]
    assert found["reverted"] == base
    assert found["reverted text"] == found["text"] != found["tuned text"]


class Server:
    """vLLM's server, and what a client of it sees."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, method: str, route: str, body: Any) -> tuple[int, Any]:
        data = None if method == "GET" else json.dumps(body).encode() if body is not None else b""
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            with urlopen(Request(f"{self.url}/{route}", data, headers, method=method), timeout=120) as answer:
                text = answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()
        return 200, json.loads(text) if text.startswith("{") else text

    def call(self, route: str, body: Any = None) -> Any:
        status, answer = self("GET" if body is None else "POST", route, body)
        assert status == 200, answer
        return answer

    def checksums(self) -> dict[str, str]:
        """By vLLM's own hand."""
        return dict(self.call("weight_checker", {"action": "checksum"})["checksums"])

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        how = {"temperature": 0, "max_tokens": count, "min_tokens": count, "return_token_ids": True}
        (choice,) = self.call("v1/completions", {"model": "m", "prompt": prompt, **how})["choices"]
        return list(choice["token_ids"])

    def metric(self, name: str) -> float:
        lines = self.call("metrics").splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))

    def hits(self) -> float:
        """Tokens that the prefix cache has saved."""
        return self.metric("prefix_cache_hits_total")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    # As an installation registers the engine, in the server's process and in its engine's.
    installed = folder / "installed" / "shiradelta-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: shiradelta\nVersion: 0\n")
    (installed / "entry_points.txt").write_text("[vllm.general_plugins]\nshd = shiradelta.serving.plugin:register\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m", "--dtype", "bfloat16"]
    options += ["--enforce-eager", "--max-model-len", "256", "--block-size", "32", "--skip-tokenizer-init"]
    options += ["--weight-transfer-config", '{"backend": "shd"}', "--gpu-memory-utilization", "0.5"]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "base"), *options]
    within = environment(installed.parent, VLLM_SERVER_DEV_MODE="1", CUDA_VISIBLE_DEVICES="")
    log = folder / "server.txt"
    with open(log, "w") as stream:
        process = subprocess.Popen(command, cwd=folder, env=within, stdout=stream, stderr=stream)
    made = Server(f"http://127.0.0.1:{port}")
    try:
        end = time.monotonic() + 900
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            try:
                made.call("health")
                break
            except OSError:
                time.sleep(0.5)
        yield made
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_a_server_is_switched_between_batches(server: Server, folder: Path):
    client = VLLMServer(server)
    base, prompt = server.checksums(), [3 + 7 * i % 400 for i in range(40)]
    client.init()
    assert client.version() == "default"
    plain = server.tokens(prompt, 8)
    before = server.hits()
    assert server.tokens(prompt, 8) == plain
    assert server.hits() > before  # the prefix cache is on
    tuned: list[dict[str, str]] = []
    for number, running in enumerate(RUNNING):
        before = server.hits()
        with ThreadPoolExecutor(1) as pool:
            running_one = pool.submit(server.tokens, [5] * 20, 200)
            while not server.metric("num_requests_running"):
                assert not running_one.done()
            request = SwapRequest(load={} if number else {"a": str(folder / "a.shd")}, active={"a": 1.0})
            version = client.update(request, policy=str(number), running=running)
            answered = len(running_one.result())
        assert answered == 200 if running != "abort" else answered < 200
        assert client.version() == version == weight_version({"a": 1.0}, str(number))
        tuned.append(server.checksums())
        now = server.tokens(prompt, 8)
        assert now != plain
        assert server.hits() == before  # nothing that was computed with the old weights was used
        with pytest.raises(TargetError, match="refuses /update_weights"):
            client.update(SwapRequest(active={"b": 1.0}), policy="refused")
        assert client.version() == version
        assert server.tokens(prompt, 8) == now
        client.update(SwapRequest(active={}))
        assert client.version() == weight_version({}, str(number))
        assert server.checksums() == base
        assert server.tokens(prompt, 8) == plain
    assert tuned[0] == tuned[1] == tuned[2]
    assert sum(tuned[0][name] != base[name] for name in base) == 15


def test_a_trainer_publishes_into_a_server_that_answers(server: Server, folder: Path, tmp_path: Path):
    """After the last step the server's tensors are the trainer's, by vLLM's own digests."""
    VLLMServer(server).init()
    server.call("pause?mode=wait", {})  # as a sender leaves it that is killed in the middle
    server.call("start_weight_update", {})
    command = [sys.executable, "-m", "examples.publish_vllm", str(folder / "base"), str(tmp_path / "run"), server.url]
    done = subprocess.run([*command, "--steps", "6"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["1", "2", "3", "4", "5", "6"]
    assert ':6","adapters":{"step 5 -> 6":1.0}}' in lines[-1]
    trained = load_file(tmp_path / "run" / "trained" / "6" / "model.safetensors")
    base = load_file(folder / "base" / "model.safetensors")
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    compared = 0
    for key, found in server.checksums().items():
        name = key.rpartition(":")[2]
        fused = next((own for own in parts if own in name), None)
        names = [name] if fused is None else [name.replace(fused, part) for part in parts[fused]]
        if "embed" in name or "lm_head" in name:  # padded
            continue
        wanted, before = (torch.cat([of[one] for one in names]).view(torch.uint8).numpy() for of in (trained, base))
        assert hashlib.sha256(wanted).hexdigest() == found, name
        compared += not np.array_equal(wanted, before)
    assert compared == 8  # norms are too large for so small steps
