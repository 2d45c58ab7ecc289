"""Examples for models that hear: sound for the encoder, and a text that the decoder predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.text.inputs import ModelInputs, hears
from shiradelta.text.labels import Labels
from shiradelta.text.read import ExampleSet
from shiradelta.text.rows import TokenRows, WindowRows
from shiradelta.text.sound import Sound, open_sound
from shiradelta.text.tokens import check_vocabulary, side_limits

#: Features that are kept in memory, in bytes; those of further examples are computed again in each pass.
KEPT = 2 << 30


class SpeechExamples(ModelInputs):
    """Sounds as features, which the folder's own feature extractor makes, and texts as labels.

    The encoder hears a window of fixed length, which silence fills up.

    Args:
        examples: sounds with their texts.
        processor: has the model's `tokenizer` and its `feature_extractor`.
        model: Whisper, or a model that hears as it does.
        tokens: longer texts are cut.
        prompt_share: has to be 0: there are no prompts.

    Raises:
        SourceError: the model does not hear, a sound cannot be read or is longer than the window, `prompt_share` is not
            0, the tokenizer does not belong to the model, or a text has no tokens.
    """

    def __init__(
        self, examples: ExampleSet, processor: Any, model: nn.Module, tokens: int, prompt_share: float = 0.0
    ) -> None:
        name, config = type(model).__name__, getattr(model, "config", None)
        extractor = getattr(processor, "feature_extractor", None)
        frames = getattr(config, "max_source_positions", None)
        if not hears(model) or frames is None or not hasattr(extractor, "n_samples"):
            raise SourceError(
                f"{name} hears nothing as Whisper does, so audio is no example for it; FILE:text takes the texts alone"
            )
        if prompt_share:
            raise SourceError(f"{name} gets no prompts; leave the prompt share out")
        self._extractor: Any = extractor
        self._sounds: list[str | Sound] = [sound for sound, _ in examples.rows]
        filled = [self._frames(number, frames) for number in range(1, len(self._sounds) + 1)]
        self.limit = side_limits(tokens, processor.tokenizer, model)[1]
        said = self._said = Labels(processor.tokenizer, model, self.limit)
        labels = said.of_texts([text for _, text in examples.rows])
        said.lay_out(labels)
        check_vocabulary(int(said.table.ids.max()), model)
        self.pad, self.rows = said.pad, said.rows
        self._window = WindowRows(filled, frames)
        self.lengths = [frames + length for length in said.table.lengths]
        self._kept: dict[int, Tensor] = {}

    def _samples(self, number: int) -> Any:
        """The samples of an example at the model's rate.

        Raises:
            SourceError: the sound cannot be read, or is longer than the window.
        """
        given, extractor = self._sounds[number - 1], self._extractor
        found = open_sound(given).at_rate(extractor.sampling_rate)
        if len(found) > extractor.n_samples:
            seconds, window = (n / extractor.sampling_rate for n in (len(found), extractor.n_samples))
            where = f"{given}: has" if isinstance(given, str) else f"example {number} has"
            raise SourceError(f"{where} {seconds:.6g} seconds of sound, of which the model hears {window:g}; cut it")
        return found

    def _frames(self, number: int, frames: int) -> int:
        """Rows of the encoder that hear an example's sound, at least one."""
        window: int = self._extractor.n_samples
        return max(1, -(-len(self._samples(number)) * frames // window))

    def _features(self, index: int) -> Tensor:
        """What the encoder gets of an example, float32."""
        if index in self._kept:
            return self._kept[index]
        samples, rate = self._samples(index + 1), self._extractor.sampling_rate
        found: Tensor = self._extractor(samples, sampling_rate=rate, return_tensors="pt")["input_features"][0]
        if (len(self._kept) + 1) * found.nbytes <= KEPT:
            self._kept[index] = found
        return found

    def arguments(self, indices: Sequence[int]) -> dict[str, Any]:
        features = torch.stack([self._features(index) for index in indices])
        return {"input_features": features, "decoder_input_ids": self._said.given(indices), "use_cache": False}

    def hidden_states(self, result: Any) -> list[tuple[Tensor, TokenRows]]:
        encoder = [(hidden, self._window) for hidden in result.encoder_hidden_states[1:]]
        return [*encoder, *((hidden, self.rows) for hidden in result.decoder_hidden_states[1:])]

    @property
    def layer_rows(self) -> Sequence[TokenRows]:
        return [self.rows, self._window]
