"""Adapters of LyCORIS, against what its layers compute.

Its own merge of LoHa and LoKr multiplies by alpha / rank twice, its forward pass once, so the forward pass is compared.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .case import Case, Made

#: The rows: name -> what `create_lycoris` takes.
ROWS: dict[str, dict[str, Any]] = {
    "LoCon": {"algo": "locon"},
    "LoCon, Tucker": {"algo": "locon", "use_tucker": True},
    "LoCon, rs_lora": {"algo": "locon", "rs_lora": True},
    "LoCon, use_scalar": {"algo": "locon", "use_scalar": True},
    "LoCon, DoRA": {"algo": "locon", "dora_wd": True},
    "LoCon, DoRA on inputs": {"algo": "locon", "dora_wd": True, "wd_on_output": False},
    "LoCon, Tucker and DoRA": {"algo": "locon", "use_tucker": True, "dora_wd": True},
    "LoCon and norms": {"algo": "locon", "train_norm": True},
    "LoHa": {"algo": "loha"},
    "LoHa, Tucker": {"algo": "loha", "use_tucker": True},
    "LoHa, DoRA": {"algo": "loha", "dora_wd": True},
    "LoKr": {"algo": "lokr", "factor": 4, "linear_dim": 1, "conv_dim": 1},
    "LoKr, whole second factor": {"algo": "lokr", "factor": 4, "linear_dim": 64, "conv_dim": 64},
    "LoKr, both decomposed": {"algo": "lokr", "decompose_both": True, "factor": 8, "linear_dim": 1, "conv_dim": 1},
    "LoKr, Tucker": {"algo": "lokr", "use_tucker": True, "factor": 2, "linear_dim": 1, "conv_dim": 1},
    "LoKr, full_matrix": {"algo": "lokr", "full_matrix": True},
    "LoKr, unbalanced": {"algo": "lokr", "unbalanced_factorization": True, "factor": 2, "linear_dim": 1, "conv_dim": 1},
    "LoKr, DoRA": {"algo": "lokr", "factor": 4, "linear_dim": 1, "conv_dim": 1, "dora_wd": True},
    "GLoRA": {"algo": "glora"},
    "Diag-OFT": {"algo": "diag-oft"},
    "Diag-OFT, constraint": {"algo": "diag-oft", "constraint": 0.001},
    "Diag-OFT, rescaled": {"algo": "diag-oft", "rescaled": True},
    "BOFT": {"algo": "boft"},
    "BOFT, constraint and rescaled": {"algo": "boft", "constraint": 0.001, "rescaled": True},
    "(IA)^3": {"algo": "ia3"},
    "(IA)^3, on inputs": {"algo": "ia3", "on_input": True},
    "full": {"algo": "full"},
    "DyLoRA": {"algo": "dylora", "block_size": 2, "layers": ("up",)},
    "T-LoRA": {"algo": "tlora", "layers": ("up", "point")},
}


class SmallNet(nn.Module):
    """A layer of each kind that LyCORIS adapts."""

    def __init__(self, layers: Sequence[str] = ("up", "norm", "point", "conv", "wave")) -> None:
        super().__init__()
        made = {
            "up": nn.Linear(24, 16),
            "norm": nn.LayerNorm(16),
            "point": nn.Conv2d(8, 16, 1),
            "conv": nn.Conv2d(8, 16, 3),
            "wave": nn.Conv1d(8, 16, 5),
        }
        for name in layers:
            self.add_module(name, made[name])


def make(folder: Path, prefix: str = "lycoris", where: str = "", **options: Any) -> Made:
    """A network of an algorithm with random weights, and what its layers compute."""
    from lycoris import LycorisNetwork, create_lycoris
    from lycoris.logging import logger
    from lycoris.modules import ia3

    logger.setLevel(logging.ERROR)
    torch.manual_seed(0)
    plain = SmallNet(**({"layers": options.pop("layers")} if "layers" in options else {}))
    on_input = options.pop("on_input", False)
    base = folder / "base"
    (base / where).mkdir(parents=True)
    save_file(plain.state_dict(), base / where / "model.safetensors")
    if where:
        (base / "model_index.json").write_text(json.dumps({where: ["diffusers", "UNet2DConditionModel"]}))
    LycorisNetwork.LORA_PREFIX = prefix
    sizes = {"linear_dim": 4, "linear_alpha": 2.5, "conv_dim": 4, "conv_alpha": 1.5}
    changed = copy.deepcopy(plain)
    if on_input:
        layers = {name: layer for name, layer in changed.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
        loras = [ia3.IA3Module(f"{prefix}_{name}", layer, train_on_input=True) for name, layer in layers.items()]
        network = nn.ModuleDict({lora.lora_name: lora for lora in loras})
        for lora in loras:
            lora.apply_to()
    else:
        network = create_lycoris(changed, 1.0, **{**sizes, **options})
        loras = network.loras
        network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    held = {key: tensor.detach().clone().contiguous() for key, tensor in network.state_dict().items()}
    save_file(held, folder / "x.safetensors")
    if options["algo"] == "dylora":  # its layers take a random part of the factors; it loads the file as a LoCon
        from lycoris.wrapper import create_lycoris_from_weights

        changed = copy.deepcopy(plain)
        network, _ = create_lycoris_from_weights(1.0, "x.safetensors", changed, weights_sd=held)
        network.apply_to()
        loras = network.loras
    wanted = {}
    prefixed = f"{where}/" if where else ""
    changed.eval()
    network.eval()
    with torch.no_grad():
        for name, layer in plain.named_children():
            adapted = getattr(changed, name)
            if isinstance(layer, nn.LayerNorm):
                lora = next((lora for lora in loras if lora.lora_name == f"{prefix}_{name}"), None)
                if lora is not None:
                    wanted[f"{prefixed}{name}.weight"], wanted[f"{prefixed}{name}.bias"] = lora.get_merged_weight()
                continue
            weight, bias = effective(adapted, plain.get_parameter(f"{name}.weight").shape)
            wanted[f"{prefixed}{name}.weight"] = weight
            if options["algo"] == "full":
                wanted[f"{prefixed}{name}.bias"] = bias
    return Made(folder / "x.safetensors", base, wanted)


def effective(layer: Any, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a layer, from its outputs: one input for each element, in which only that is 1."""
    inputs = torch.eye(shape[1:].numel(), dtype=torch.float32).reshape(-1, *shape[1:])
    bias = layer(torch.zeros(1, *shape[1:])).reshape(-1)
    return (layer(inputs).reshape(len(inputs), -1) - bias).T.reshape(shape), bias


def cases() -> Iterator[Case]:
    """A row an algorithm and option, and rows of other prefixes."""
    by = f"lycoris-lora {version('lycoris-lora')}"
    for name, options in ROWS.items():
        yield Case("LyCORIS", name, by, partial(make, **options))
    for algorithm in ("locon", "loha", "lokr", "full"):
        options = {"prefix": "lora_unet", "where": "unet", "algo": algorithm}
        yield Case("LyCORIS", f"{algorithm}, prefix lora_unet", by, partial(make, **options))
