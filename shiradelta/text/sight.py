"""Pictures with prompts, and what a vision-language model is to answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiradelta.errors import SourceError
from shiradelta.text.inputs import ModelInputs, generates, is_seq2seq, moved
from shiradelta.text.kinds import ASSISTANT
from shiradelta.text.pictures import open_picture
from shiradelta.text.processed import KeptExamples
from shiradelta.text.read import ExampleSet
from shiradelta.text.rows import TokenRows
from shiradelta.text.tokens import TokenTable, check_vocabulary, position_limit
from shiradelta.util.text import brief

#: How far what a token changes before it may be from nothing, by rounding, as a share of what it changes itself.
SEEN = 0.01
#: What processors raise for texts and pictures that they do not take.
_ERRORS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class PictureExamples(ModelInputs):
    """Pictures, prompts and completions, of which the folder's processor makes a model's inputs, batch by batch.

    The picture is where the prompt has the processor's mark of one; without a mark, the chat template places it.

    Args:
        examples: pictures with prompts and completions.
        processor: the model's.
        model: a vision-language model whose decoder reads picture and prompt.
        prompt_share: weight of a prompt's token, where one of the completion has 1; those of a picture have 0.

    Raises:
        SourceError: the model sees nothing or predicts nothing, it reads a completion before it predicts it, a picture
            cannot be read, the processor does not take an example, or an example is longer than the model's positions.
        MissingDependencyError: Pillow is not installed.
    """

    def __init__(self, examples: ExampleSet, processor: Any, model: nn.Module, prompt_share: float = 0.0) -> None:
        name = type(model).__name__
        if not generates(model) or is_seq2seq(model) or not hasattr(processor, "image_processor"):
            raise SourceError(
                f"{name} answers no prompts about pictures in one text, so image, prompt and completion are no examples"
                " for it; from Python, Fit takes model and forward, and attach takes any module"
            )
        self._processor, self._name = processor, name
        processor.tokenizer.padding_side = "right"
        end, self._adds_end = processor.tokenizer.eos_token, _adds_end(processor.tokenizer)
        self._end = "" if end is None or self._adds_end else str(end)
        self._pictures = [picture for picture, _, _ in examples.rows]
        texts = [self._texts(row[1], row[2], f"example {number}") for number, row in enumerate(examples.rows, 1)]
        self._prompts, self._texts_of = [before for before, _ in texts], [whole for _, whole in texts]
        begin = processor.tokenizer.bos_token
        #: Whether the tokenizer writes special tokens, which templates may have written.
        self._marks = begin is None or not all(whole.startswith(begin) for whole in self._texts_of)
        self.pad = int(processor.tokenizer.pad_token_id or 0)
        self._made_of = KeptExamples(self._make, self.pad)
        ids, weights = [], list[float]()
        #: Tokens before the completions, where some of these are tokenised by themselves.
        self._before: list[int] = []
        marks = {
            getattr(processor, "image_token_id", None),
            getattr(getattr(model, "config", None), "image_token_id", None),
        }
        self._check_order(model, marks)
        before, is_apart = list[int](), False
        for index in range(len(texts)):
            own, said, apart = self._tokens(index)
            ids.append(own)
            before.append(said)
            is_apart |= apart
            weights += [0.0 if token in marks else 1.0 if at >= said else prompt_share for at, token in enumerate(own)]
        check_vocabulary(max(map(max, ids)), model)
        self._check_length(ids, model)
        table = TokenTable(ids)
        self.rows, self.lengths = TokenRows.of_next(table, torch.tensor(weights)), table.lengths
        self.limit = max(table.lengths)
        if is_apart:
            self._before, self._made_of = before, KeptExamples(self._make, self.pad)

    def _texts(self, prompt: str, completion: str, where: str) -> tuple[str, str]:
        """(the text up to the completion, the whole text) with the mark of a picture."""
        processor = self._processor
        mark = getattr(processor, "image_token", None)
        if getattr(processor, "chat_template", None) is None or (mark is not None and mark in prompt):
            return prompt, prompt + completion + self._end
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        said = {"role": ASSISTANT, "content": [{"type": "text", "text": completion}]}
        try:
            before = processor.apply_chat_template([asked], add_generation_prompt=True, tokenize=False)
            whole = processor.apply_chat_template([asked, said], tokenize=False)
        except _ERRORS as error:
            raise SourceError(f"{where}: the chat template does not take it ({brief(str(error), 160)})") from None
        if not whole.startswith(before):
            raise SourceError(
                f"{where}: the chat template begins an answer otherwise than it asks for it; write the mark of a"
                " picture into the prompt"
            )
        return before, whole.rstrip()

    def _tokens(self, index: int) -> tuple[list[int], int, bool]:
        """(token ids of an example, how many of these are before the completion, whether that has its own tokens)."""
        before, whole, tokenizer = self._prompts[index], self._texts_of[index], self._processor.tokenizer
        picture = open_picture(self._pictures[index])
        prompt = self._made([before], [picture], f"example {index + 1}")["input_ids"][0].tolist()
        if prompt[-1:] == [tokenizer.eos_token_id]:
            prompt = prompt[:-1]
        every = self._made_of.one(index)["input_ids"][0].tolist()
        if every[: len(prompt)] == prompt and len(every) > len(prompt):
            return every, len(prompt), False
        # Here a model that answers has other tokens before it than the whole text has.
        said = tokenizer(whole.removeprefix(before), add_special_tokens=False)["input_ids"]
        return [*prompt, *said, *([tokenizer.eos_token_id] if self._adds_end else [])], len(prompt), True

    def _make(self, indices: Sequence[int]) -> dict[str, Any]:
        """What the processor makes of examples."""
        where = f"example {indices[0] + 1}" if len(indices) == 1 else "a batch"
        pictures = [open_picture(self._pictures[index]) for index in indices]
        if not self._before:
            return self._made([self._texts_of[index] for index in indices], pictures, where)
        found = self._made([self._prompts[index] for index in indices], pictures, where)
        shape, (ids, there) = found["input_ids"].shape, self.rows.table.padded(indices, self.pad)
        for name, value in found.items():
            if isinstance(value, Tensor) and value.shape == shape:  # such as what is a picture's
                found[name] = value.new_zeros(ids.shape)
                for row, index in enumerate(indices):
                    number = self._before[index]
                    found[name][row, :number] = value[row, :number]
        return {**found, "input_ids": ids, "attention_mask": there.long()}

    def _made(self, texts: Sequence[str], pictures: Sequence[Any], where: str) -> dict[str, Any]:
        """What the processor makes of a batch.

        Raises:
            SourceError: it does not take it.
        """
        try:
            images = [[picture] for picture in pictures]
            options = {"padding": True, "return_tensors": "pt", "add_special_tokens": self._marks}
            return dict(self._processor(text=[*texts], images=images, **options))
        except _ERRORS as error:
            mark = getattr(self._processor, "image_token", None)
            raise SourceError(
                f"{where}: the processor does not take it ({brief(str(error), 160)}); a prompt has one mark of its"
                f" picture{f', {mark}' if mark else ''}, and a completion has none"
            ) from error

    def _check_order(self, model: nn.Module, marks: Collection[int | None]) -> None:
        """Raises SourceError if tokens change what the model makes of those before them, as in PaliGemma's prompts."""
        given = moved(self._made_of.one(0), model)
        last = int(given["input_ids"][0, -1])
        other = next((token for token in given["input_ids"][0].tolist() if token not in {last, *marks}), None)
        changed = given["input_ids"].clone()
        changed[0, -1] = last if other is None else other
        try:
            with torch.no_grad():
                one, two = (model(**{**given, "input_ids": ids}).logits[0] for ids in (given["input_ids"], changed))
        except _ERRORS:
            return  # what runs it next says more
        apart = (one.float() - two.float()).norm(dim=-1)
        if apart[:-1].max() > SEEN * apart[-1]:
            raise SourceError(
                f"{self._name} reads all tokens of a text before it predicts any, completions too, so image, prompt and"
                " completion are no examples for it; from Python, Fit takes model and forward, and attach takes any"
                " module"
            )

    def _check_length(self, ids: Sequence[Sequence[int]], model: nn.Module) -> None:
        longest = max(range(len(ids)), key=lambda index: len(ids[index]))
        limit = position_limit(model)
        if limit and len(ids[longest]) > limit:
            raise SourceError(
                f"example {longest + 1} has {len(ids[longest])} tokens with its picture, more than the {limit}"
                f" positions of {self._name}; leave it out"
            )

    def arguments(self, indices: Sequence[int]) -> dict[str, Any]:
        found = self._made_of.batch(indices)
        ids, there = self.rows.table.padded(indices, self.pad)
        if found["input_ids"].shape != ids.shape or not torch.equal(found["input_ids"][there], ids[there]):
            raise SourceError(f"the processor of {self._name} makes other tokens of a batch than of each example")
        return found

    def hidden_states(self, result: Any) -> list[tuple[Tensor, TokenRows]]:
        return [(hidden, self.rows) for hidden in result.hidden_states[1:]]


def _adds_end(tokenizer: Any) -> bool:
    """Whether the tokenizer itself ends a text."""
    end = tokenizer.eos_token_id
    return end is not None and tokenizer("a")["input_ids"][-1:] == [end]
