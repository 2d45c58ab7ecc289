"""The node: reads a `.shd` file and adds its deltas to ComfyUI's patches, sparse as they are.

ComfyUI computes patches in float32, rounds once, and keeps a backup of each weight, so the weights are those that
`shiradelta apply` gives, and the base comes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import comfy.lora
import folder_paths
import numpy as np
import torch
from comfy.weight_adapter import WeightAdapterBase

import shiradelta as sd
from shiradelta.errors import BaseMismatchError
from shiradelta.format.arithmetic import fingerprint
from shiradelta.io.reader import StoredTensor

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class SparsePatch(WeightAdapterBase):  # type: ignore[misc]
    """A delta of one weight, in the form that ComfyUI's patches have.

    Attributes:
        positions: flat positions, int64.
        values: what is added there at strength 1, float32.
        shape: of the weight.
    """

    name = "shiradelta"

    def __init__(self, positions: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]) -> None:
        self.positions, self.values, self.shape = positions, values, shape
        self.weights = [positions, values]  # what ComfyUI counts as memory
        self.loaded_keys: set[str] = set()

    def calculate_weight(
        self,
        weight: torch.Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> torch.Tensor:
        """The weight with the delta added; ComfyUI calls it with a copy in `intermediate_dtype`.

        Raises:
            BaseMismatchError: the weight has another shape than the delta's.
        """
        if offset is not None or tuple(weight.shape) != self.shape:
            raise BaseMismatchError(
                f"{key}: has shape {list(weight.shape)}, not {list(self.shape)}; load the delta's base"
            )
        weight = weight.contiguous()
        flat, at = weight.view(-1), self.positions.to(weight.device)
        added = self.values.to(weight.device) * torch.tensor(strength, dtype=torch.float32, device=weight.device)
        flat[at] = (flat[at].float() + added).to(weight.dtype)
        return weight


class LoadDelta:
    """Loads a `.shd` file into a model, and into its text encoders if they are connected."""

    CATEGORY = "loaders"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CLIP")
    DESCRIPTION = "Adds a sparse weight delta (.shd) to the model's weights, at a strength of its own for the CLIP."
    _STRENGTH: ClassVar[tuple[str, dict[str, float]]] = (
        "FLOAT",
        {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.01},
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """What ComfyUI asks a node for: files in `models/loras` whose names end in .shd."""
        files = [name for name in folder_paths.get_filename_list("loras") if name.endswith(".shd")]
        required = {"model": ("MODEL",), "delta": (files,), "strength_model": cls._STRENGTH}
        return {"required": required, "optional": {"clip": ("CLIP",), "strength_clip": cls._STRENGTH}}

    def load(
        self, model: Any, delta: str, strength_model: float, clip: Any = None, strength_clip: float = 1.0
    ) -> tuple[Any, Any]:
        """Copies of the patchers with the delta's patches.

        Raises:
            FormatError: the file is refused.
            BaseMismatchError: a tensor of the delta is in neither model, is not of its base, or is not added.
        """
        patchers = [model] if clip is None else [model, clip.patcher]
        finders = [_Finder(model.model, comfy.lora.model_lora_keys_unet, model)]
        if clip is not None:
            finders.append(_Finder(clip.cond_stage_model, comfy.lora.model_lora_keys_clip, clip.patcher))
        patches: list[dict[str, SparsePatch]] = [{} for _ in patchers]
        with sd.open_delta(folder_paths.get_full_path_or_raise("loras", delta)) as opened:
            for name, tensor in opened.items():
                found = [(number, key) for number, each in enumerate(finders) if (key := each.find(name)) is not None]
                if len(found) != 1:
                    where = "in both the model and the CLIP" if found else "not in the model"
                    hint = "" if found or clip is not None else "; connect the CLIP if it is the text encoder's"
                    raise BaseMismatchError(
                        f"{delta}: tensor {name!r} is {where}{hint or '; load the base of the delta'}"
                    )
                number, key = found[0]
                finders[number].check(delta, name, tensor, key)
                positions, values = torch.from_numpy(tensor.positions()), torch.from_numpy(tensor.values())
                patches[number][key] = SparsePatch(positions, values, tensor.shape)
        model = model.clone()
        model.add_patches(patches[0], strength_model)
        if clip is not None:
            clip = clip.clone()
            clip.add_patches(patches[1], strength_clip)
        return model, clip


class _Finder:
    """Finds a delta's tensors in a model of ComfyUI, by its own names or by those that ComfyUI knows for LoRAs."""

    def __init__(self, model: Any, lora_keys: Any, patcher: Any) -> None:
        self._weights: Mapping[str, torch.Tensor] = model.state_dict()
        self._keys: Mapping[str, Any] = lora_keys(model, {})
        self._backup: Mapping[str, Any] = getattr(patcher, "backup", {})

    def find(self, name: str) -> str | None:
        """The model's key of a tensor: its name, as in a checkpoint in one file, or as diffusers calls it."""
        for key in (name, name.removeprefix("model.")):
            if key in self._weights:
                return key
        known = self._keys.get(name.replace("/", ".").removesuffix(".weight"))
        return known if isinstance(known, str) and known in self._weights else None

    def check(self, label: str, name: str, tensor: StoredTensor, key: str) -> None:
        """Checks that a weight is the delta's base.

        Raises:
            BaseMismatchError: it is not, or the delta does something else than add.
        """
        weight = self._backup[key].weight if key in self._backup else self._weights[key]  # before ComfyUI's patches
        if not tensor.operation.adds:
            raise BaseMismatchError(f"{label}: tensor {name!r} is {tensor.op}, not added; `shiradelta apply` does that")
        if tuple(weight.shape) != tensor.shape:
            raise BaseMismatchError(
                f"{label}: tensor {name!r} has shape {list(tensor.shape)}, the model's {list(weight.shape)};"
                " load its base"
            )
        if tensor.base_fingerprint is None or _DTYPES.get(weight.dtype) != tensor.dtype:
            return  # it cannot be told: ComfyUI may have cast the model
        kind = np.uint32 if weight.dtype is torch.float32 else np.uint16
        positions = tensor.positions()
        raw = weight.detach().reshape(-1)[torch.from_numpy(positions).to(weight.device)].cpu()
        bits = raw.view(torch.int32 if kind is np.uint32 else torch.int16).numpy().view(kind)
        if fingerprint(positions, bits) != tensor.base_fingerprint:
            raise BaseMismatchError(f"{label}: tensor {name!r} was made for another base; load that checkpoint")


NODE_CLASS_MAPPINGS = {"ShiradeltaLoad": LoadDelta}
NODE_DISPLAY_NAME_MAPPINGS = {"ShiradeltaLoad": "Load delta (.shd)"}
