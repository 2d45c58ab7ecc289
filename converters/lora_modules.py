"""What a LoRA's file holds: its modules with the shapes and factors of their changes, and whatever is beside them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from shiradelta.models.checkpoint import Checkpoint
from shiradelta.util.text import count

from . import lora_on_base
from .differences import dense_names
from .item import Skipped, SkipReason, Source
from .lora_converted import Change
from .lora_keys import TRAINING, Module, find_attention, find_halves, sort_keys
from .lora_parameters import find_parameters
from .lora_products import alpha_in, factor_of, product_of, rank_of, shape_of
from .lora_scale import Scale
from .peft_config import check_parts

HALF = Skipped(
    SkipReason.PARTS, "is half of the change of an nn.MultiheadAttention, of which PEFT saves in_proj and out_proj"
)


@dataclass(frozen=True)
class LoraModules:
    """What a LoRA's file holds.

    Attributes:
        source: its tensors.
        scale: what the configuration says.
        modules: name -> its keys; those that change a weight by a product of factors, or a bias.
        shapes: name -> the shape of its change; the others of `modules` cannot be read.
        factors: name -> the factor on its product.
        tensors: name -> the tensor that it changes, in the source's names.
        on_base: name -> its keys; those whose change depends on the base's weights.
        alphas: name -> its alpha in the file.
        alpha_keys: name -> the key of its alpha.
        others: any other key -> the tensor that it may be.
        differences: those of `others` that hold a difference.
        training: the keys that only training uses.
    """

    source: Checkpoint
    scale: Scale
    modules: Mapping[str, Module]
    shapes: Mapping[str, tuple[int, ...]]
    factors: Mapping[str, float]
    tensors: Mapping[str, str]
    on_base: Mapping[str, Module]
    alphas: Mapping[str, float]
    alpha_keys: Mapping[str, str]
    others: Mapping[str, str]
    differences: Collection[str]
    training: Collection[str]

    def change(self, module: str, swap: bool = False, shape: tuple[int, ...] | None = None) -> Change:
        """A module's change by itself, in the factors' own order of dimensions, or transposed; or in another shape."""
        parts, own = self.modules[module], self.shapes[module]
        return product_of(self.source, parts, shape or own, self.factors[module], swap and shape is None)

    @property
    def called(self) -> dict[str, list[str]]:
        """A tensor that the file changes -> what that is called in the file."""
        names = {tensor: [module, *self.modules[module].all_keys] for module, tensor in self.tensors.items()}
        names |= {f"{module}.weight": [module, *parts.all_keys] for module, parts in self.on_base.items()}
        for key, name in self.others.items():
            names.setdefault(name, []).append(key)
        return names

    @property
    def wanted(self) -> dict[str, tuple[int, ...] | None]:
        """A tensor that the file changes -> its shape, with dimensions in any order; None where it is unknown."""
        shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(self.called)
        shapes |= {name: self.source[key].shape for key, name in self.others.items()}
        return shapes | {self.tensors[module]: shape for module, shape in self.shapes.items()}


def read_modules(source: Checkpoint, scale: Scale, base: Checkpoint | None, result: Source) -> LoraModules:
    """Sorts a LoRA's keys, and checks that they are what its configuration says.

    Args:
        source: the LoRA's tensors.
        scale: what the configuration says.
        base: the base, if there is one.
        result: where modules go that cannot be read, and warnings.

    Raises:
        SourceError: the keys are those of another method or adapter.
    """
    modules, alpha_keys, others = sort_keys(source)
    for module, parts in modules.items():
        if parts.bias_of is None:
            check_parts(scale.config(module), parts.keys, next(iter(parts.keys.values())), scale.where)
            scale.check_magnitudes(module, parts.magnitudes is not None)
            scale.check_bias(module, f"{module}.bias" in modules and modules[f"{module}.bias"].bias_of == module)
    training = [key for key in others if TRAINING.search(key)]
    others = {key: name for key, name in others.items() if key not in training}
    differences = dense_names(others)
    on_base = {module: parts for module, parts in modules.items() if lora_on_base.method_of(parts.keys) is not None}
    modules = {module: parts for module, parts in modules.items() if module not in on_base}
    modules = find_parameters(modules, scale, source, base)
    alphas = {module: alpha_in(source, key) for module, key in alpha_keys.items()}
    shapes = _shapes(source, modules, scale, base, result)
    attention = find_attention(modules)
    _warn(source, modules, shapes, alphas, attention, scale, result)
    return LoraModules(
        source=source,
        scale=scale,
        modules=modules,
        shapes=shapes,
        factors=_factors(source, modules, shapes, alphas, attention, scale),
        tensors={module: _tensor(module, modules[module], module in attention) for module in shapes},
        on_base=on_base,
        alphas=alphas,
        alpha_keys=alpha_keys,
        others=others | differences,
        differences=differences.keys(),
        training=training,
    )


def _shapes(
    source: Checkpoint, modules: Mapping[str, Module], scale: Scale, base: Checkpoint | None, result: Source
) -> dict[str, tuple[int, ...]]:
    """The shapes of modules' changes; modules without one are skipped."""
    shapes: dict[str, tuple[int, ...]] = {}
    halves = find_halves(modules, base or ())
    for module, parts in modules.items():
        found = HALF if module in halves else shape_of(source, parts, scale.of_peft(module))
        if isinstance(found, Skipped):
            result.skipped[module] = found
        else:
            shapes[module] = found
    return shapes


def _warn(
    source: Checkpoint,
    modules: Mapping[str, Module],
    shapes: Collection[str],
    alphas: Mapping[str, float],
    attention: Collection[str],
    scale: Scale,
    result: Source,
) -> None:
    """Warns of what is taken for given."""
    no_alpha = [
        module
        for module in shapes
        if modules[module].bias_of is None
        and rank_of(source, module, modules[module], scale)
        and scale.alpha_of(module, alphas.get(module)) is None
    ]
    if no_alpha:
        result.warnings.append(
            f"no alpha for {len(no_alpha)} of {count(shapes, 'module')}; the rank is taken for it, so the scale is 1;"
            " --alpha sets another"
        )
    products = [module for module in shapes if modules[module].bias_of is None]
    plain = [module for module in products if modules[module].magnitudes is None]
    if 0 < len(plain) < len(products):
        result.warnings.append(
            f"{len(plain)} of {count(products, 'module')} ({plain[0]}, ...) have no lengths of a DoRA, as the others"
            " have; they are taken for a plain LoRA's"
        )
    if attention:
        result.warnings.append(
            f"{min(attention)}.out_proj changes by twice its factors' product, as PEFT 0.21 runs and merges it"
        )


def _factors(
    source: Checkpoint,
    modules: Mapping[str, Module],
    shapes: Collection[str],
    alphas: Mapping[str, float],
    attention: Mapping[str, str],
    scale: Scale,
) -> dict[str, float]:
    """The factors on modules' products; that of a bias is its module's."""
    factors = {
        module: factor_of(source, module, modules[module], scale, alphas.get(module))
        for module in shapes
        if modules[module].bias_of is None
    }
    factors |= {module: factors.get(of, 0.0) for module in shapes if (of := modules[module].bias_of) is not None}
    return factors | {module: 2 * factors[module] for module in attention.values() if module in factors}


def _tensor(module: str, parts: Module, attention: bool) -> str:
    """The name of the tensor that a module changes."""
    if parts.stack is not None or parts.bias_of is not None:
        return module
    return f"{module}.{'in_proj_' if attention else ''}weight"
