"""Bits of a position in the masks of real fine-tunes, against the entropy by rows and columns.

    python -m benchmarks.masks [--width 2048] [--layers 2] [--steps 1000] [--csv FILE]

It trains a language model of bytes on the standard library's docstrings, tunes it to its source, and takes the masks of
two fine-tunes and of the paper at 1 % of each matrix.  The entropy by rows and columns is that of independent positions
whose odds are a factor for the row times one for the column, fitted to the mask.  What the factors would cost is not
counted in it, while everything is counted in the files.  What an index takes beyond it has three parts: the classes of
rows and columns, which stand for the factors; that the entropy given these classes is another, smaller where rows of a
class have their nonzeros in the same columns; and the code.
"""

from __future__ import annotations

import csv
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

import shiradelta
from benchmarks.quality import corpus
from benchmarks.table import print_table
from shiradelta.format.arithmetic import Positions
from shiradelta.format.codecs.rice import Rice
from shiradelta.format.codecs.tiled_classes import choose
from shiradelta.format.entropy import entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DENSITY = 0.01
TOKENS, BATCH, CALIBRATION = 256, 32, 16
RANK = 16
Masks = dict[str, tuple[Positions, tuple[int, int]]]


class LowRank(nn.Module):
    """A linear layer and a product of two small matrices beside it, whose first factor starts from zero."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(RANK, layer.in_features, device=DEVICE) / layer.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(layer.out_features, RANK, device=DEVICE))

    def forward(self, x: Tensor) -> Tensor:
        """As the layer does, with the difference added."""
        result: Tensor = self.layer(x) + (x @ self.a.T.to(x.dtype)) @ self.b.T.to(x.dtype)
        return result


class Trainer:
    """A language model of bytes, trained step by step on random cuts of a text."""

    def __init__(self, width: int, layers: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 256,
            max_position_embeddings=TOKENS,
        )
        self.model = LlamaForCausalLM(config).to(DEVICE)
        self.random = torch.Generator().manual_seed(0)

    def linears(self) -> dict[str, nn.Linear]:
        """The layers that are converted, by name."""
        named = self.model.model.named_modules()
        return {name.removesuffix(".layer"): layer for name, layer in named if isinstance(layer, nn.Linear)}

    def weights(self) -> dict[str, Tensor]:
        """Copies of their weights."""
        return {name: layer.weight.detach().clone() for name, layer in self.linears().items()}

    def loss(self, text: Tensor) -> Tensor:
        """Of a batch of cuts."""
        starts = torch.randint(len(text) - TOKENS, (BATCH,), generator=self.random)
        tokens = text[starts[:, None] + torch.arange(TOKENS)].long().to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            result: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return result

    def train(self, text: Tensor, parameters: Iterable[Tensor], steps: int, lr: float) -> float:
        """AdamW, warmed up and down; the mean loss of the last tenth."""
        optimiser = torch.optim.AdamW(list(parameters), lr, weight_decay=0.0)
        losses = []
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 50, (steps - step) / (0.3 * steps))
            loss = self.loss(text)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        return float(torch.stack(losses[-max(steps // 10, 1) :]).mean())

    def gradients(self, text: Tensor) -> dict[str, Tensor]:
        """Summed magnitudes over the calibration batches."""
        sums = {name: torch.zeros_like(layer.weight) for name, layer in self.linears().items()}
        for _ in range(CALIBRATION):
            self.loss(text).backward()  # type: ignore[no-untyped-call]
            for name, layer in self.linears().items():
                assert layer.weight.grad is not None
                sums[name] += layer.weight.grad.abs()
            self.model.zero_grad()
        return sums


def texts() -> tuple[Tensor, Tensor]:
    """The docstrings and the source of the standard library, as bytes."""
    files = corpus.library_files()
    prose = "\n".join(corpus.docstrings(path) for path in files)
    source = "\n".join(corpus.code(path) for path in files)
    return bytes_of(prose), bytes_of(source)


def bytes_of(text: str) -> Tensor:
    """uint8."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def masks_of(scores: dict[str, Tensor]) -> Masks:
    """The positions of the largest 1 % of each matrix."""
    result = {}
    for name, score in scores.items():
        chosen = score.flatten().topk(int(score.numel() * DENSITY)).indices
        result[name] = chosen.sort().values.cpu().numpy(), (score.shape[0], score.shape[1])
    return result


def make_masks(width: int, layers: int, steps: int, progress: Callable[[str], None]) -> dict[str, Masks]:
    """Trains and tunes; the masks by where they come from."""
    prose, source = texts()
    trainer = Trainer(width, layers)
    loss = trainer.train(prose, trainer.model.parameters(), 2 * steps, 4e-4)
    progress(f"trained on prose: {loss:.3f} nats a byte")
    base = trainer.weights()
    gradients = trainer.gradients(source)
    result = {
        "|W|": masks_of({name: weight.abs() for name, weight in base.items()}),
        "gradient": masks_of(gradients),
        "snip": masks_of({name: (base[name] * gradient).abs() for name, gradient in gradients.items()}),
    }
    linears = trainer.linears()
    loss = trainer.train(source, [layer.weight for layer in linears.values()], steps, 5e-5)
    progress(f"tuned all weights to source: {loss:.3f}")
    result["full"] = masks_of({name: (weight - base[name]).abs() for name, weight in trainer.weights().items()})
    with torch.no_grad():
        for name, layer in linears.items():
            layer.weight.copy_(base[name])
    lowered = {name: LowRank(layer) for name, layer in linears.items()}
    for name, module in lowered.items():
        trainer.model.model.set_submodule(name, module)
    factors = [parameter for module in lowered.values() for parameter in (module.a, module.b)]
    progress(f"tuned a LoRA to source: {trainer.train(source, factors, steps, 1e-3):.3f}")
    result["LoRA"] = masks_of({name: (module.b @ module.a).detach().abs() for name, module in lowered.items()})
    return result


def entropy_by_lines(positions: Positions, shape: tuple[int, int]) -> float:
    """Bits of independent positions with odds row factor x column factor, fitted by iterative scaling."""
    mask = torch.zeros(shape, device=DEVICE).flatten()
    mask[torch.from_numpy(positions).to(DEVICE)] = 1
    mask = mask.reshape(shape)
    rows, columns = mask.sum(1).double(), mask.sum(0).double()
    of_row, of_column = rows / rows.sum().sqrt(), columns / rows.sum().sqrt()

    def shares() -> Tensor:
        odds = torch.outer(of_row, of_column)
        return odds / (1 + odds)

    for _ in range(40):
        of_row = of_row * torch.nan_to_num(rows / shares().sum(1), nan=0.0, posinf=0.0)
        of_column = of_column * torch.nan_to_num(columns / shares().sum(0), nan=0.0, posinf=0.0)
    share = shares().clamp(1e-12, 1 - 1e-12)
    return float(-(share * share.log2() + (1 - share) * (1 - share).log2()).sum())


def by_classes(positions: Positions, shape: tuple[int, int]) -> tuple[float, float]:
    """(bits of TILED's classes of rows and columns, entropy given them); one class for all where TILED does not pay."""
    chosen = choose(positions, shape)
    if chosen is None or not chosen[1]:
        return 0.0, entropy(positions.size, shape[0] * shape[1]) * positions.size
    grid = chosen[0]
    row, column = np.divmod(positions, grid.columns)
    cells = 1 << grid.row_bits, 1 << grid.column_bits
    found = np.bincount(
        np.ravel_multi_index((grid.row_class[row], grid.column_class[column]), cells), minlength=cells[0] * cells[1]
    )
    of_rows, of_columns = (
        np.bincount(own, minlength=n) for own, n in zip((grid.row_class, grid.column_class), cells, strict=True)
    )
    sizes = np.outer(of_rows, of_columns).flatten()
    bits = sum(entropy(int(n), int(size)) * n for n, size in zip(found, sizes, strict=True))
    return grid.rows * grid.row_bits + grid.columns * grid.column_bits, float(bits)


def measure(name: str, masks: Masks) -> list[str]:
    """A row of the table."""
    values = np.random.default_rng(0)
    deltas = {
        matrix: shiradelta.TensorDelta(
            shape, positions, values.standard_normal(positions.size).astype(np.float32), "bfloat16"
        )
        for matrix, (positions, shape) in masks.items()
    }
    count = sum(positions.size for positions, _ in masks.values())
    rice_bytes = sum(Rice().size(positions, shape) or 0 for positions, shape in masks.values())
    by_lines = sum(entropy_by_lines(*mask) for mask in masks.values()) / count
    classes, given = np.sum([by_classes(*mask) for mask in masks.values()], axis=0) / count
    independent = sum(entropy(p.size, r * c) * p.size for p, (r, c) in masks.values()) / count
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta.shd"
        start = time.perf_counter()
        shiradelta.save_delta(path, deltas, values="int4")
        saving = time.perf_counter() - start
        with shiradelta.open_delta(path) as delta:
            index = delta.sizes["index"] * 8 / count
            whole = delta.sizes["file"] * 8 / count
            codecs = sorted({delta[matrix].record.index_codec_name for matrix in masks})
            start = time.perf_counter()
            for matrix in masks:
                delta[matrix].positions()
            loading = time.perf_counter() - start
    return [
        name,
        f"{count:,}",
        f"{independent:.2f}",
        f"{rice_bytes * 8 / count:.2f}",
        f"{by_lines:.2f}",
        f"{classes:.2f}",
        f"{given:.2f}",
        f"{index:.2f}",
        f"{index / by_lines:.3f}",
        f"{whole:.2f}",
        "+".join(codecs),
        f"{saving * 1e9 / count:.0f}",
        f"{loading * 1e9 / count:.0f}",
    ]


@click.command(help=__doc__)
@click.option("--width", default=2048, show_default=True, help="Hidden size of the model.")
@click.option("--layers", default=2, show_default=True)
@click.option("--steps", default=1000, show_default=True, help="Steps of a fine-tune; the base takes twice as many.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Also write the rows here.")
def main(**options: Any) -> None:
    """Prints the table."""
    csv_path = options.pop("csv_path")
    head = ["mask", "nonzeros", "iid", "RICE", "rows x columns", "classes", "given them", "index", "x", "file, int4"]
    rows = [[*head, "codec", "write", "read"]]
    rows += [measure(name, masks) for name, masks in make_masks(**options, progress=click.echo).items()]
    print_table(f"Bits per nonzero at {DENSITY:.0%}, width {options['width']} (write, read: ns per nonzero)", rows)
    if csv_path:
        with csv_path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
