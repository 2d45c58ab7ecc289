"""Pictures with their captions, for models that give an embedding of either, as CLIP does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.text.inputs import ModelInputs, moved
from shiradelta.text.pictures import open_picture
from shiradelta.text.processed import KeptExamples
from shiradelta.text.read import ExampleSet
from shiradelta.text.rows import TokenRows, WindowRows
from shiradelta.text.tokens import TokenTable, check_vocabulary, position_limit

#: Models that read padding as text, to which captions are padded as far as they were in training.
_READ_PADDING = ("siglip", "siglip2")


class Captions(ModelInputs):
    """Pictures as the folder's image processor makes them, and captions as token ids.

    Args:
        examples: pictures with their captions.
        processor: has the model's `tokenizer` and its `image_processor`.
        model: CLIP, SigLIP, or a model that gives `image_embeds` and `text_embeds` as they do.
        tokens: longer captions are cut.

    Raises:
        SourceError: the model gives no such embeddings, a picture cannot be read, or the tokenizer does not belong to
            the model.
        MissingDependencyError: Pillow is not installed.
    """

    sides, embeds = 2, True

    def __init__(self, examples: ExampleSet, processor: Any, model: nn.Module, tokens: int) -> None:
        encoder: Any = getattr(model, "text_model", None)
        sees = getattr(processor, "image_processor", None)
        if not all(hasattr(model, f"get_{side}_features") for side in ("image", "text")) or None in (encoder, sees):
            raise SourceError(
                f"{type(model).__name__} gives no embeddings of pictures and of texts as CLIP does, so image and text"
                " are no examples for it; a model that answers takes image, prompt and completion, and FILE:text takes"
                " the texts alone"
            )
        self._processor, self._pictures = processor, [picture for picture, _ in examples.rows]
        self._seen_of = KeptExamples(self._pixels)
        tokenizer: Any = processor.tokenizer
        reads_padding = encoder.config.model_type.removesuffix("_text_model") in _READ_PADDING
        limit = min(tokens, int(tokenizer.model_max_length))
        self.limit = position_limit(encoder) or limit if reads_padding else min(limit, position_limit(encoder) or limit)
        padding = "max_length" if reads_padding else False
        texts = [text for _, text in examples.rows]
        ids = tokenizer(texts, truncation=True, max_length=self.limit, padding=padding)["input_ids"]
        if not all(ids):
            raise SourceError("a text has no tokens; leave it out")
        check_vocabulary(max(map(max, ids)), encoder)
        self.pad = int(tokenizer.pad_token_id or 0)
        number = self._patches(model)
        self._seen = WindowRows([number] * len(ids), number)
        # Padded as far as no picture is, so that rows of texts in a layer are told apart by their number.
        self.rows = TokenRows.of_next(TokenTable(ids), unlike=self._seen.table)
        self.lengths = self.rows.table.lengths

    def _patches(self, model: Any) -> int:
        """Rows that the model's encoder has of a picture.

        Raises:
            SourceError: a picture cannot be read.
        """
        for picture in self._pictures[1:]:
            open_picture(picture)
        with torch.no_grad():
            seen = model.vision_model(**moved(self._seen_of.one(0), model)).last_hidden_state
        return int(seen.shape[1])

    def _pixels(self, indices: Sequence[int]) -> dict[str, Any]:
        images = [open_picture(self._pictures[index]) for index in indices]
        return dict(self._processor.image_processor(images, return_tensors="pt"))

    def arguments(self, indices: Sequence[int]) -> dict[str, Any]:
        ids, there = self.rows.table.padded(indices, self.pad, self.rows.width(indices))
        return {"input_ids": ids, "attention_mask": there.long(), **self._seen_of.batch(indices)}

    def hidden_states(self, result: Any) -> list[tuple[Tensor, TokenRows]]:
        seen, read = (result[f"{side}_model_output"].hidden_states[1:] for side in ("vision", "text"))
        return [*((hidden, self._seen) for hidden in seen), *((hidden, self.rows) for hidden in read)]

    def embeddings(self, result: Any) -> Tensor:
        seen: Tensor = result.image_embeds
        return torch.cat([seen, result.text_embeds.to(seen.device)])
