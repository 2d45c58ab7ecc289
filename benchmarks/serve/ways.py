"""Ways to serve with transformers in this process: fused weights that `HotSwap` switches, and PEFT's unfused LoRAs."""

# mypy: disable-error-code="no-untyped-call, unused-ignore"

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import shiradelta as sd
from benchmarks.serve.workload import Load, Request, Server


class _Generator:
    """Answers by `generate`, in batches of prompts of one length."""

    def __init__(self, model: Any, load: Load, mixed: bool = False) -> None:
        self._model, self._load, self._mixed = model, load, mixed

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> list[float]:
        moments: list[float] = []
        for first in range(0, len(requests), self._load.batch):
            batch = requests[first : first + self._load.batch]
            prompts = torch.tensor([one.prompt for one in batch], device=self._model.device)
            more = {"adapter_names": [one.adapter for one in batch]} if self._mixed else {}
            tokens = self._load.answer
            answers = self._model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                **more,
            )
            assert answers.shape[1] == self._load.prompt + tokens
            answers.cpu()  # waits for the device
            moments += [self._load.now()] * len(batch)
        return moments


def _model(folder: Path, device: str, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return found.eval().requires_grad_(False).to(device)


def _base(folder: Path, files: Path, adapters: Sequence[str], load: Load, device: str, dtype: str) -> Server:
    return Server(load, _Generator(_model(folder, device, dtype), load))


def _hotswap(folder: Path, files: Path, adapters: Sequence[str], load: Load, device: str, dtype: str) -> Server:
    model = _model(folder, device, dtype)
    swap = sd.HotSwap(model)
    for name in adapters:
        swap.load(name, files / f"{name}.shd")
    return Server(load, _Generator(model, load), swap.switch)


def _peft(folder: Path, files: Path, adapters: Sequence[str], device: str, dtype: str) -> Any:
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(_model(folder, device, dtype), files / adapters[0], adapters[0])
    for name in adapters[1:]:
        model.load_adapter(files / name, name)
    return model.eval()


def _mixed(folder: Path, files: Path, adapters: Sequence[str], load: Load, device: str, dtype: str) -> Server:
    return Server(load, _Generator(_peft(folder, files, adapters, device, dtype), load, mixed=True))


def _set_adapter(folder: Path, files: Path, adapters: Sequence[str], load: Load, device: str, dtype: str) -> Server:
    model = _peft(folder, files, adapters, device, dtype)
    return Server(load, _Generator(model, load), model.set_adapter)


#: What it is called -> (the model's folder, the adapters' folder, their names, the load, the device, the dtype) -> it.
WAYS: dict[str, Callable[[Path, Path, Sequence[str], Load, str, str], Server]] = {
    "HotSwap, grouped": _hotswap,
    "PEFT LoRA, mixed": _mixed,
    "PEFT LoRA, grouped": _set_adapter,
    "no adapter": _base,
}
