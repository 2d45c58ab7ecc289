"""Why a tensor of a live model cannot be written in place: each kind by name, with a remedy.

Layers may have weights that they do not store: parametrizations compute them, quantised layers pack them.  Those have
their names in checkpoints, so they are looked for here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from shiradelta.errors import TargetError
from shiradelta.models.memory import is_sharded, own_part


class RefusalKind(Enum):
    """Why the elements of a tensor cannot be written in place."""

    READ_ONLY = auto()
    BYTE_ORDER = auto()
    DISTRIBUTED = auto()
    QUANTISED = auto()
    META = auto()
    LAYOUT = auto()
    EXPANDED = auto()
    CONVERTED = auto()
    COMPUTED = auto()
    SHARED = auto()


@dataclass(frozen=True)
class Refusal:
    """Why the elements of a tensor cannot be written in place, and what to do.

    Attributes:
        kind: the reason, for programs.
        what: the reason, to follow the tensor's name in a message.
        remedy: what to do.
    """

    kind: RefusalKind
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


#: What to do with a quantised tensor.
_UNQUANTISED = (
    "apply the delta to the unquantised checkpoint (shiradelta apply) and quantise the result, or load the model"
    " unquantised"
)


#: Classes of tensors whose elements are stored as they are.
PLAIN = ("Tensor", "Parameter", "Buffer")


def refusal_of(tensor: Any) -> Refusal | None:
    """Why a torch tensor's elements cannot be written in place."""
    kind, home = type(tensor).__name__, type(tensor).__module__
    if is_sharded(tensor):
        return refusal_of(own_part(tensor))
    if kind not in PLAIN or not home.startswith("torch"):
        if home.startswith("torch.distributed"):
            return Refusal(
                RefusalKind.DISTRIBUTED,
                f"is a {kind}, of which this process has a part",
                "apply the delta before the model is distributed",
            )
        return Refusal(
            RefusalKind.QUANTISED,
            f"is a {home}.{kind}: quantised or wrapped, so its stored bits are not the weights",
            _UNQUANTISED,
        )
    if tensor.is_meta:
        what = "is on the meta device and has no values yet"
        return Refusal(RefusalKind.META, what, "load the weights first, without offloading")
    if str(tensor.layout) != "torch.strided" or tensor.is_conj() or tensor.is_neg():
        what = f"is stored as {tensor.layout}, not element by element"
        return Refusal(RefusalKind.LAYOUT, what, "make it dense first")
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        what = "is expanded: several elements share one address"
        return Refusal(RefusalKind.EXPANDED, what, "make it contiguous first")
    return None


def check_scripted(model: Any) -> None:
    """Checks that no module is TorchScript, whose parameters Python does not hold.

    Raises:
        TargetError: one is.
    """
    from torch.jit import ScriptModule

    for path, module in model.named_modules():
        if isinstance(module, ScriptModule):
            what = f"module {path!r}" if path else "the model"
            raise TargetError(
                f"{what} is TorchScript, whose parameters cannot be watched; give the Python module it was made from"
            )


#: Why a tensor cannot be written that another process may write.
SHARED = Refusal(
    RefusalKind.SHARED,
    "is in memory that other processes or a file share, and may change at any time",
    "give a copy of its own, or allow_shared=True if nothing else writes it",
)


#: Why a parameter that FSDP2 has gathered cannot be written: `reshard()` frees it, and the shards stay as they are.
GATHERED = Refusal(
    RefusalKind.DISTRIBUTED,
    "is a copy that FSDP2 has gathered, which reshard() throws away",
    "apply the delta before the model is distributed",
)


def gathered_by_fsdp(model: Any) -> Iterator[Any]:
    """The parameters of a torch module that FSDP2 has gathered: inside `unshard()`, and after a forward pass."""
    return (tensor for tensor, is_gathered in _parameters_of_fsdp(model) if is_gathered)


def sharded_by_fsdp(model: Any) -> Iterator[Any]:
    """The parameters of a torch module that FSDP2 has sharded."""
    return (tensor for tensor, is_gathered in _parameters_of_fsdp(model) if not is_gathered)


def _parameters_of_fsdp(model: Any) -> Iterator[tuple[Any, bool]]:
    """The parameters that FSDP2 shards, and whether they are gathered now: over tensor parallelism as DTensors, too."""
    for module in model.modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        try:
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            own = [
                (one._module_info.module._parameters.get(one._module_info.param_name), one)
                for group in groups
                for one in group.fsdp_params
            ]
        except AttributeError:  # another release of torch: without its lists, every parameter may be one
            own = [(tensor, None) for tensor in module.parameters()]
        for tensor, one in own:
            if tensor is not None:
                yield tensor, not is_sharded(tensor) or tensor is getattr(one, "_unsharded_param", None)


#: Why a tensor of the checkpoint cannot be written whose elements the library computes on loading.
CONVERTED = Refusal(
    RefusalKind.CONVERTED,
    "is not stored as in the checkpoint (transformers computes it on loading, not only by moving elements)",
    "apply the delta to the checkpoint (shiradelta apply), or convert it against the model's own state dict",
)


#: Ends of the names of the parameters from which torch's older hooks compute a weight -> the hook, its remedy.
_HOOKS = {
    "_g": ("weight_norm", "call torch.nn.utils.remove_weight_norm first"),
    "_orig": ("spectral_norm or pruning", "call torch.nn.utils.remove_spectral_norm or prune.remove first"),
}


def computed_tensors(model: Any) -> Iterator[tuple[str, Refusal]]:
    """Names of tensors that layers of a torch module compute or unpack, and why they cannot be written."""
    for path, module in model.named_modules():
        prefix = path + "." if path else ""
        for name, refusal in _computed_by(module):
            yield prefix + name, refusal


def _computed_by(module: Any) -> Iterator[tuple[str, Refusal]]:
    from torch.nn.utils import parametrize

    for name in module.parametrizations if parametrize.is_parametrized(module) else ():
        what = "is computed by a parametrization"
        remedy = "call torch.nn.utils.parametrize.remove_parametrizations first"
        yield name, Refusal(RefusalKind.COMPUTED, what, remedy)
    for end, (hook, remedy) in _HOOKS.items():
        for name in module._parameters:
            if name.endswith(end) and name.removesuffix(end) not in module._parameters:
                yield name.removesuffix(end), Refusal(RefusalKind.COMPUTED, f"is computed by {hook}", remedy)
    packed = Refusal(RefusalKind.QUANTISED, f"is packed by the quantised layer {type(module).__name__}", _UNQUANTISED)
    if "qweight" in module._buffers or "qweight" in module._parameters:
        yield "weight", packed
    if ".quantized." in type(module).__module__:
        for name in ("weight", "bias"):
            if callable(getattr(type(module), name, None)):
                yield name, packed
        for get in ("get_weight", "get_bias"):  # recurrent layers
            if hasattr(module, get):
                yield from ((name, packed) for name in getattr(module, get)())
