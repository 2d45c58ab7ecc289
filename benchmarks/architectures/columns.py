"""The columns of the matrix: what is tried with each architecture.

A column is a function that returns if the result is right.  It raises `WrongError` if it is not, and
`NotApplicableError` if there is nothing to try; an error of shiradelta's own is a refusal.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import shiradelta as sd
from benchmarks.architectures import judge, zoo
from benchmarks.architectures.judge import WrongError
from shiradelta.fit import Fit
from shiradelta.train import attach

#: Standard deviation of what a fine-tune adds; weights are drawn with about twice as much.
NOISE = 0.01
#: Density of fits and of trained deltas, and the tensors that are large enough to have a nonzero then.
FIT_DENSITY, TRAIN_DENSITY, LEAST = 0.1, 0.02, 100
STEPS, EXAMPLES = 3, 64
#: Relative learning rate of fits: in so few steps, the default throws vectors of a dozen nonzeros anywhere.
RATE = 0.1


class NotApplicableError(Exception):
    """A column that means nothing for an architecture, or that a library other than shiradelta refuses."""


class Case:
    """An architecture with its folders: the base, a fine-tune of all weights, and room for results.

    Args:
        architecture: what is tried.
        folder: an empty folder.
    """

    def __init__(self, architecture: zoo.Architecture, folder: Path) -> None:
        self.architecture = architecture
        self.folder = folder
        torch.manual_seed(0)
        self._like = architecture.build()

    @cached_property
    def base(self) -> Path:
        """The base's folder; its weights are numbers that bfloat16 has."""
        with torch.no_grad():
            for weight in _floats(self._like):
                weight.copy_(weight.bfloat16())
        return self._save(self._like, "base")

    @cached_property
    def tuned(self) -> Path:
        """The fine-tune's folder.  Its change of each weight is exact in float32, so a lossless file gives its bits."""
        model = self.load(self.base)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in _trained(model):
                noise = torch.randn(weight.shape, generator=generator) * NOISE
                moved = (weight.float() + noise).bfloat16().to(weight.dtype)
                exact = weight.float() + (moved.float() - weight.float()) == moved.float()
                weight.copy_(torch.where(exact, moved, weight))
        return self._save(model, "tuned")

    @cached_property
    def full_delta(self) -> Path:
        """The lossless delta of the fine-tune."""
        return self.convert(self.tuned, "full")

    def load(self, folder: Path) -> Any:
        """The model of a folder."""
        return self.architecture.load(folder, self._like)

    def convert(self, source: Path, name: str, sparsity: float = 1.0, fit: Fit | None = None) -> Path:
        """A `.shd` file in float32."""
        out = self.folder / f"{name}.shd"
        sd.convert(source, out, sparsity=sparsity, base=self.base, values="f32", fit=fit)
        return out

    def apply(self, delta: Path) -> Path:
        """A new folder with the delta in it."""
        out = self.folder / f"{delta.stem}-applied"
        sd.apply(self.base, delta, out=out)
        return out

    def batch(self, count: int = 2) -> zoo.Inputs:
        """The same random examples each time."""
        torch.manual_seed(2)
        return zoo.batch([self.architecture.inputs() for _ in range(count)])

    def _save(self, model: Any, name: str) -> Path:
        folder = self.folder / name
        self.architecture.save(model, folder)
        if "input_ids" in self.architecture.inputs():
            zoo.write_tokenizer(folder)
        return folder


def full(case: Case) -> None:
    """A fine-tune of all weights becomes a file, and the file a new folder."""
    judge.check_equal(judge.read(case.apply(case.full_delta)), judge.read(case.tuned), "the fine-tune's")


def in_place(case: Case) -> None:
    """The file goes into a folder and out again."""
    folder = case.folder / "in-place"
    shutil.copytree(case.base, folder)
    sd.apply(folder, case.full_delta)
    judge.check_equal(judge.read(folder), judge.read(case.tuned), "the fine-tune's")
    sd.revert(folder)
    judge.check_files(folder, case.base)


def live(case: Case) -> None:
    """The file goes into a loaded model and out again."""
    model = case.load(case.base)
    base = judge.state(model)
    swap = sd.HotSwap(model)
    swap.load("full", case.full_delta)
    swap.switch("full")
    judge.check_equal(judge.state(model), judge.state(case.load(case.tuned)), "the fine-tune's", base)
    swap.revert()
    judge.check_equal(judge.state(model), base, "the base's after revert")


def lora_usual(case: Case) -> None:
    """A LoRA on the layers that it usually is on."""
    _lora(case, "lora-usual", target_modules=list(case.architecture.usual))


def lora_linear(case: Case) -> None:
    """A LoRA on every linear layer, the output's included."""
    part = case.architecture.wrapped(case.load(case.base))
    conv1d = import_module("transformers.pytorch_utils").Conv1D
    layers = [name for name, module in part.named_modules() if isinstance(module, nn.Linear | conv1d)]
    kept = [name for name in layers if name.rpartition(".")[2] not in case.architecture.unwrapped]
    _lora(case, "lora-linear", target_modules=kept)


def lora_experts(case: Case) -> None:
    """A LoRA on the stacked weights of experts."""
    if not case.architecture.experts:
        raise NotApplicableError("no experts")
    _lora(case, "lora-experts", target_modules=[], target_parameters=list(case.architecture.experts))


def fit(case: Case) -> None:
    """The fine-tune's file is fitted by training, which does not go far in a few steps."""
    out = _fit(case, "train")
    judge.check_direction(judge.read(out), judge.read(case.tuned), judge.read(case.base), LEAST)


def refit(case: Case) -> None:
    """The fine-tune's file is fitted in closed form, which may change weights in a way of its own."""
    out = _fit(case, "refit")
    judge.check_moved(judge.read(out), judge.read(case.tuned), judge.read(case.base), LEAST)
    with torch.no_grad():
        inputs = case.batch(EXAMPLES)
        judge.check_closer(*(zoo.forward(case.load(folder), inputs) for folder in (out, case.tuned, case.base)))


def train(case: Case) -> None:
    """A delta is trained on the live model's matrices, saved, and applied to the folder."""
    model = case.load(case.base)
    live = model.state_dict()
    base = judge.state(model)
    matrices = [name for name, weight in model.named_parameters() if weight.dim() > 1 and weight.numel() >= LEAST]
    tuner = attach(model, sparsity=TRAIN_DENSITY, mask="rand", targets=matrices)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=NOISE)
    batch = case.batch()
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.autograd.backward([output.square().mean() for output in zoo.forward(model, batch)])
        optimizer.step()
    delta = case.folder / "trained.shd"
    tuner.save(delta, values="f32")
    trained = {name: weight.detach().clone() for name, weight in live.items()}
    tuner.detach()
    judge.check_equal(judge.state(model), base, "the base's after detach")
    if all(torch.equal(trained[name], base[name]) for name in base):
        raise WrongError("nothing was trained")
    judge.check_equal(judge.state(case.load(case.apply(delta))), trained, "the trained ones", base)


#: Name -> column, in the order of the table.
COLUMNS: dict[str, Callable[[Case], None]] = {
    "full": full,
    "in-place": in_place,
    "live": live,
    "lora": lora_usual,
    "lora-linear": lora_linear,
    "lora-experts": lora_experts,
    "fit": fit,
    "refit": refit,
    "train": train,
}


def _lora(case: Case, name: str, **targets: Any) -> None:
    """Compares an adapter of PEFT with PEFT's own merge."""
    model = case.load(case.base)
    base = judge.state(model)
    adapter = case.folder / name
    try:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **targets)
        torch.manual_seed(3)
        wrapped: Any = get_peft_model(case.architecture.wrapped(model), config)
        wrapped.save_pretrained(adapter)
        wrapped.merge_and_unload()
    except Exception as error:  # whatever PEFT cannot do is nothing to compare with
        raise NotApplicableError(f"PEFT: {error}") from error
    found = judge.state(case.load(case.apply(case.convert(adapter, name))))
    judge.check_close(found, judge.state(model), "PEFT's merge", base)


def _fit(case: Case, method: str) -> Path:
    """Fits on texts from the folder, or on examples with the loaded model, and applies the result."""
    torch.manual_seed(4)
    given: dict[str, Any] = {"texts": (zoo.answers if case.architecture.answers else zoo.texts)(EXAMPLES)}
    if not case.architecture.texts:
        with suppress(sd.ShiraDeltaError):  # a model that texts are not enough for is refused by name
            case.convert(
                case.tuned, f"{method}-on-texts", FIT_DENSITY, Fit(**given, method=method, steps=STEPS, device="cpu")
            )
        given["texts"] = [case.architecture.inputs() for _ in range(EXAMPLES)]
        given["model"] = case.load(case.base)
        given["forward"] = _outputs
    if method == "train":  # least squares, by which it starts otherwise, may change weights in a way of their own
        given["mask"] = "magnitude"
    given |= {"steps": STEPS, "relative_lr": RATE, "batch": 4, "held_out": 4, "tokens": zoo.LENGTH}
    settings = Fit(method=method, device="cpu", **given)
    return case.apply(case.convert(case.tuned, method, FIT_DENSITY, settings))


def _outputs(model: Any, examples: Sequence[zoo.Inputs]) -> list[Tensor]:
    return zoo.forward(model, zoo.batch(list(examples)))


def _floats(model: Any) -> list[Tensor]:
    """The stored floating-point tensors of a model."""
    return _once(tensor for tensor in model.state_dict().values() if tensor.is_floating_point())


def _trained(model: Any) -> list[Tensor]:
    """What training changes: parameters, and the running statistics of batch norms."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    statistics = [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]
    return _once([*model.parameters(), *statistics])


def _once(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tied tensors once."""
    return list({tensor.data_ptr(): tensor for tensor in tensors}.values())
