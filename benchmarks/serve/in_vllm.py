"""The ways of vLLM, run by the interpreter of its environment: HotSwap as its weight transfer engine, and its LoRAs."""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-unimported"
from __future__ import annotations

import gc
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import vllm_environment
from benchmarks.serve.workload import RANK, Load, Request, Server, measure


def measured(
    interpreter: Path,
    model: Path,
    files: Path,
    adapters: Sequence[str],
    load: Load,
    changes: Sequence[int],
    repeats: int,
    dtype: str,
    threads: int,
) -> list[dict[str, Any]]:
    """What `measure` gives for the ways of vLLM.

    Raises:
        subprocess.CalledProcessError: vLLM ended with an error.
    """
    wanted = {
        "model": str(model),
        "files": str(files),
        "adapters": list(adapters),
        "load": asdict(load),
        "changes": list(changes),
        "repeats": repeats,
        "dtype": dtype,
    }
    found: list[dict[str, Any]] = vllm_environment.run(interpreter, __name__, wanted, threads)
    return found


def _engine(wanted: Mapping[str, Any], load: Load, **more: Any) -> Any:
    from vllm import LLM

    return LLM(
        wanted["model"],
        dtype=wanted["dtype"],
        enforce_eager=True,
        gpu_memory_utilization=0.5,
        max_model_len=load.prompt + load.answer,
        max_num_seqs=load.batch,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        **more,
    )


def _generator(engine: Any, load: Load, lora: Callable[[str], Any]) -> Callable[[Sequence[Request]], list[float]]:
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=load.answer, min_tokens=load.answer, detokenize=False)
    numbers = itertools.count()

    def generate(requests: Sequence[Request]) -> list[float]:
        for one in requests:
            prompt = {"prompt_token_ids": one.prompt}
            engine.llm_engine.add_request(str(next(numbers)), prompt, how, lora_request=lora(one.adapter))
        moments: list[float] = []
        while engine.llm_engine.has_unfinished_requests():
            for answer in engine.llm_engine.step():
                if answer.finished:
                    moments.append(load.now())
        assert len(moments) == len(requests)
        return moments

    return generate


def _hotswap(wanted: Mapping[str, Any], load: Load) -> Server:
    from vllm.config import WeightTransferConfig

    engine = _engine(wanted, load, weight_transfer_config=WeightTransferConfig(backend="shd"))
    engine.init_weight_transfer_engine({"init_info": {}})

    def update(**request: Any) -> None:
        engine.start_weight_update()
        engine.update_weights({"update_info": request})
        engine.finish_weight_update()

    update(load={name: f"{wanted['files']}/{name}.shd" for name in wanted["adapters"]})
    return Server(load, _generator(engine, load, lambda name: None), lambda name: update(active={name: 1.0}))


def _loras(wanted: Mapping[str, Any], load: Load) -> Server:
    from vllm.lora.request import LoRARequest

    adapters = wanted["adapters"]
    slots = {"max_loras": min(len(adapters), load.batch), "max_cpu_loras": len(adapters), "max_lora_rank": RANK}
    engine = _engine(wanted, load, enable_lora=True, **slots)
    requests = {name: LoRARequest(name, i + 1, f"{wanted['files']}/{name}") for i, name in enumerate(adapters)}
    for request in requests.values():
        engine.llm_engine.add_lora(request)
    return Server(load, _generator(engine, load, requests.__getitem__))


def main() -> None:
    """Reads what is wanted, and prints the rows."""
    from shiradelta.serving import plugin

    plugin.register()  # as the entry point does where the package is installed
    wanted = json.load(sys.stdin)
    load = Load(**wanted["load"])
    rows: list[dict[str, object]] = []
    for way, make in {"vLLM: HotSwap, grouped": _hotswap, "vLLM: multi-LoRA, mixed": _loras}.items():
        server = make(wanted, load)
        changes, repeats = wanted["changes"], wanted["repeats"]
        rows += measure({way: server}, Path(wanted["model"]), wanted["adapters"], changes, repeats)
        del server
        gc.collect()
    print("\n" + json.dumps(rows))


if __name__ == "__main__":
    main()
