"""The model behind the service: sentence embeddings of transformers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from examples.serve.batches import Vectors
from examples.serve.limits import Limits


class Embedder:
    """Texts -> unit vectors, the mean of the token vectors.

    Args:
        folder: a model's folder, of transformers.
        device: where it computes.
        limits: `tokens` of them.
    """

    def __init__(self, folder: Path, device: str = "cpu", limits: Limits | None = None) -> None:
        # Without trust_remote_code the user would be asked, and a "y" would run the folder's code.
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        self._tokenizer = AutoTokenizer.from_pretrained(str(folder), **local)
        self.model = AutoModel.from_pretrained(str(folder), use_safetensors=True, **local).eval().to(device)
        positions = getattr(self.model.config, "max_position_embeddings", None) or self._tokenizer.model_max_length
        self._most = min((limits or Limits()).tokens, positions, self._tokenizer.model_max_length)
        self._device = device
        self._lock = threading.Lock()  # a fast tokenizer may not be used by two threads at once

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text.  Needs the tokenizer only, so it runs while the model computes.

        Raises:
            ValueError: a text has none.
        """
        with self._lock:
            found: list[list[int]] = self._tokenizer(list(texts), truncation=True, max_length=self._most)["input_ids"]
        if not all(found):
            raise ValueError(f"text {[*map(bool, found)].index(False)} has no tokens")
        return found

    @torch.inference_mode()
    def compute(self, tokens: Sequence[list[int]]) -> Vectors:
        """A vector for each text."""
        batch = self._tokenizer.pad({"input_ids": list(tokens)}, return_tensors="pt").to(self._device)
        hidden: Any = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        vectors: Vectors = torch.nn.functional.normalize(mean.float(), dim=1).tolist()
        return vectors
