"""Run by the interpreter of vLLM's environment: adapters through vLLM's own calls, judged by digests of all tensors."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any


class Digests:
    """An extension of the worker: the outside judge."""

    def digests(self) -> dict[str, str]:
        import torch

        return {
            name: hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
            for name, tensor in self.get_model().state_dict().items()  # type: ignore[attr-defined]
        }


def _digests_of(engine: Any) -> dict[str, str]:
    return dict(engine.collective_rpc("digests")[0])


def main(folder: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.config import WeightTransferConfig

    from shiradelta.serving import plugin

    plugin.register()  # as the entry point does where the package is installed
    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "gpu_memory_utilization": 0.5,
        "max_model_len": 64,
        "max_num_seqs": 4,
        "skip_tokenizer_init": True,
        "worker_extension_cls": "tests.serving.in_vllm.Digests",
    }
    fresh = _digests_of(LLM(f"{folder}/tuned", **options))
    engine = LLM(f"{folder}/base", weight_transfer_config=WeightTransferConfig(backend="shd"), **options)

    def digests() -> dict[str, str]:
        return _digests_of(engine)

    def update(**request: Any) -> str:
        engine.start_weight_update()
        try:
            engine.update_weights({"update_info": request})
        except Exception as error:
            return str(error)
        engine.finish_weight_update()
        return ""

    def text() -> list[int]:
        engine.reset_prefix_cache()
        how = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
        return list(engine.generate([{"prompt_token_ids": [1, 5, 9, 17]}], how)[0].outputs[0].token_ids)

    found: dict[str, Any] = {"fresh": fresh, "base": digests(), "text": text()}
    engine.init_weight_transfer_engine({"init_info": {}})
    found["followed"] = digests()
    assert update(load={"a": f"{folder}/a.shd"}, active={"a": 1.0}) == ""
    found["tuned"], found["tuned text"] = digests(), text()
    found["refused"] = update(active={"b": 1.0})
    found["after refusal"] = digests()
    for _ in range(50):
        assert update(active={}) == update(active={"a": 1.0}) == ""
    found["after switches"] = digests()
    assert update(active={}, unload=["a"]) == ""
    found["reverted"], found["reverted text"] = digests(), text()
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
