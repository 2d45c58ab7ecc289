"""What a training command works on: a model from a folder, and examples from a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.io.download import local_model
from shiradelta.models import loading
from shiradelta.models.candidates import refuse_several
from shiradelta.models.checkpoint import Checkpoint, open_checkpoint
from shiradelta.models.dtypes import TORCH_DTYPES
from shiradelta.models.library import match_names
from shiradelta.models.placement import main_device, pick_devices
from shiradelta.models.processors import load_processor
from shiradelta.models.sentence import modules_not_run
from shiradelta.select.shares import parse_sparsity
from shiradelta.text.batches import by_length, mean_over, split
from shiradelta.text.examples import training_examples
from shiradelta.text.pooling import find_pooling
from shiradelta.text.read import read_file
from shiradelta.train.recipe import HELD_OUT
from shiradelta.train.settings import TrainSettings
from shiradelta.train.tuner import Tuner

#: Bytes that a nonzero takes: 4 each of its value, its gradient and two moments, 8 of its position, 4 of its base, and
#: what a step makes in between.
BYTES = 40


class TrainingSubject:
    """A model in the dtype in which it is stored, and examples, part of them held out.

    Args:
        model_folder: a folder that transformers loads, or a name on the Hub.
        examples_file: JSON Lines, or a data set of Hugging Face (`shiradelta.text.read`).
        settings: of the run.
        device: "cpu", "cuda", "cuda:0,cuda:1", ..., as `pick_devices` takes it.

    Attributes:
        folder: the model's.
        checkpoint: its weights on disk.
        devices: where the model is.
        model: in evaluation mode.
        tokenizer: the model's; or its processor, where examples have more than texts.
        given: the examples.
        examples: the same, tokenised.
        train, held_out: indices of the examples to train on, and to measure on.

    Raises:
        SourceError: the model or the examples cannot be used.
    """

    def __init__(self, model_folder: Path, examples_file: Path, settings: TrainSettings, device: str | None) -> None:
        self.settings = settings
        self.folder = folder = local_model(model_folder)
        refuse_several(folder)
        self.checkpoint = open_checkpoint(folder)
        self.given = read_file(examples_file)
        kind = self.given.kind
        loader, _ = loading.model_class(folder, folder)
        self.tokenizer: Any = load_processor(kind.media, folder)
        if kind.predicts and not loader.can_generate():
            raise SourceError(
                f"{folder}: {loader.__name__} does not predict the next token, which {' and '.join(kind.keys)}"
                " train; for an encoder, give pairs: anchor and positive"
            )
        if not kind.predicts and (left_out := modules_not_run(folder)):
            raise SourceError(
                f"{folder}: {' and '.join(kind.keys)} train the embedding, and its {', '.join(left_out)} would not be"
                " run; train the SentenceTransformer in a loop of your own (shiradelta.train.attach)"
            )
        dtype = stored_dtype(self.checkpoint)
        self.devices = pick_devices(device, lambda where: self._need(dtype))
        # Activations in float16 may overflow, so products are made in bfloat16; the weights stay float16.
        mixed = dtype == torch.float16
        main = main_device(self.devices)
        self.casting: Any = torch.autocast(main.type, torch.bfloat16) if mixed else nullcontext()
        self.model: nn.Module = loading.load_model(folder, folder, self.devices, dtype).eval()
        self.examples = training_examples(
            self.given, self.tokenizer, self.model, settings.tokens, find_pooling(folder), settings.prompt_share
        )
        self.train, self.held_out = split(len(self.given.rows), HELD_OUT, settings.seed)

    def _need(self, dtype: torch.dtype) -> float:
        """Bytes that training takes beside activations and gradients: the weights and the nonzeros."""
        numel = sum(slot.numel for slot in self.checkpoint.values())
        share, _ = parse_sparsity(self.settings.sparsity)
        return numel * (dtype.itemsize + share * self.settings.pruning[1] * BYTES)

    @property
    def identity(self) -> list[Any]:
        """What the result of a run depends on, in types that JSON can hold."""
        return [str(self.folder.resolve()), self.given.identity, self.settings.as_of_0_1()]

    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        """Mean loss over some examples."""
        with self.casting:
            return self.examples.loss(model, indices)

    def measure(self, indices: Sequence[int]) -> float:
        """Mean loss over some examples, without gradients."""
        parts = by_length(indices, self.examples.lengths, self.settings.batch)
        return mean_over(parts, lambda part: {"loss": self.loss(self.model, part).item()})["loss"]

    def check_stored(self, tuner: Tuner) -> None:
        """Checks that the folder stores the weights with the bits that are trained, since the file is made for them."""
        shapes = {view.name: view.shape for views in tuner.views.values() for view in views}
        found = match_names(shapes, self.checkpoint).names
        for name, weight in tuner.weights.items():
            own = str(weight.dtype).removeprefix("torch.")
            for view in tuner.views[name]:
                slot = self.checkpoint[found[view.name]] if view.name in found else None
                if slot is None or slot.dtype.name != own or slot.shape != view.shape:
                    where = "not in the folder"
                    if slot is not None and slot.dtype.name != own:
                        where = f"stored as {slot.dtype.name}, but trained as {own}"
                    elif slot is not None:
                        where = f"stored as {list(slot.shape)}, and saved as {list(view.shape)}"
                    raise SourceError(f"{self.checkpoint.root}: {view.name!r} is {where}; leave it out of --targets")


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most weights of a checkpoint.

    Raises:
        SourceError: weights of that dtype, such as quantised ones, cannot be trained.
    """
    sizes: Counter[str] = Counter()
    for slot in checkpoint.values():
        sizes[slot.dtype.name] += slot.numel
    name = sizes.most_common(1)[0][0]
    if name not in TORCH_DTYPES:
        raise SourceError(
            f"{checkpoint.root}: its weights are stored as {name}: quantised, or more precise than float32; train on"
            " the model in bfloat16, float16 or float32"
        )
    return TORCH_DTYPES[name]
