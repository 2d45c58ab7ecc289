"""The kinds of examples that a fit and a training run take, one row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiradelta.errors import ArgumentError, SourceError
from shiradelta.text import pictures, sound
from shiradelta.util.registry import Registry

#: Who says what the model is to say, in a conversation.
ASSISTANT = "assistant"


@dataclass(frozen=True)
class ExampleKind:
    """A kind of example: the keys of its JSON object, and what each has.

    Attributes:
        name: what it is called in messages.
        keys: the keys of its object.
        predicts: whether a model has to predict tokens of it.
        sample: a value of a key, in messages.
        check: (value, where, key) -> None; it raises SourceError for a value that cannot be used.
        is_blank: whether a value holds nothing to read.
        media: what it has beside texts: "sound" or "picture"; empty for nothing.
        placed: (value, folder that paths of files start from or None, where, key) -> the value to use.
        known: (value, key) -> what tells the value from others, in types that JSON can hold.
    """

    name: str
    keys: tuple[str, ...]
    predicts: bool
    check: Callable[[Any, str, str], None]
    is_blank: Callable[[Any], bool]
    sample: str = '"..."'
    media: str = ""
    placed: Callable[[Any, Path | None, str, str], Any] = lambda value, folder, where, key: value
    known: Callable[[Any, str], Any] = lambda value, key: value

    @property
    def has_prompts(self) -> bool:
        """Whether some of what a model reads is given, so that it need not predict it."""
        return "prompt" in self.keys or self.check is _check_messages

    @property
    def is_text(self) -> bool:
        """Whether an example is one text and nothing else."""
        return len(self.keys) == 1 and self.check is _check_text

    @property
    def shape(self) -> str:
        """An example of the object, for messages."""
        return "{" + ", ".join(f'"{key}": {self.sample}' for key in self.keys) + "}"

    def row(self, found: Mapping[str, Any], where: str, folder: Path | None = None) -> list[Any]:
        """The values of an example, one for each key.

        Args:
            found: the example.
            where: the same, for messages.
            folder: the folder that paths of files start from; None leaves them as they are.

        Raises:
            SourceError: a key is missing, or a value cannot be used.
        """
        for key in self.keys:
            if key not in found:
                raise SourceError(f"{where}: lacks the key {key!r}; every example needs the form {self.shape}")
            self.check(found[key], where, key)
        return [self.placed(found[key], folder, where, key) for key in self.keys]


def check_prompt_share(share: float) -> None:
    """Raises ArgumentError for a weight of prompts' tokens that is not from 0 to 1."""
    if not 0 <= share <= 1:
        raise ArgumentError(f"a prompt share of {share} is out of range; give a number from 0 to 1")


def _check_text(value: Any, where: str, key: str) -> None:
    if not isinstance(value, str):
        raise SourceError(f"{where}: the value of {key!r} is not a text; write it in quotes")
    if any("\ud800" <= character <= "\udfff" for character in value):  # no tokenizer takes half a character
        raise SourceError(f"{where}: the text of {key!r} has a lone surrogate, which is no character; take it out")


def _check_messages(value: Any, where: str, key: str) -> None:
    if not isinstance(value, list) or not value:
        raise SourceError(f"{where}: the value of {key!r} is not a list of messages; write {MESSAGES.shape}")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise SourceError(f"{where}: message {number} of {key!r} is not an object; write {MESSAGES.shape}")
        for part in ("role", "content"):
            _check_text(message.get(part), where, f"{part} of message {number}")
    said = [message["content"] for message in value if message["role"] == ASSISTANT]
    if not said or not all(map(str.strip, said)):
        raise SourceError(f"{where}: the {ASSISTANT} says nothing in {key!r}; leave the example out")


def _is_blank_text(text: Any) -> bool:
    return not text.strip()


#: A text by itself: all of it counts.
TEXT = ExampleKind("text", ("text",), True, _check_text, _is_blank_text)
#: A conversation, which the tokenizer's chat template turns into a text; what the assistant says counts.
MESSAGES = ExampleKind(
    "messages",
    ("messages",),
    True,
    _check_messages,
    lambda messages: False,  # an assistant that says nothing is refused
    '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
)
#: A prompt and what the model is to say next, which counts.
COMPLETION = ExampleKind("completion", ("prompt", "completion"), True, _check_text, _is_blank_text)
#: Two texts whose embeddings match.
PAIRS = ExampleKind("pairs", ("anchor", "positive"), False, _check_text, _is_blank_text)


def _with_media(media: str, module: Any, name: str, keys: tuple[str, ...], predicts: bool) -> ExampleKind:
    """A kind whose first key has a sound or a picture, of which a module knows; its other keys have texts."""
    first = keys[0]
    return ExampleKind(
        name,
        keys,
        predicts,
        lambda value, where, key: module.check(value, where) if key == first else _check_text(value, where, key),
        lambda value: isinstance(value, str) and _is_blank_text(value),
        media=media,
        placed=lambda value, folder, where, key: module.placed(value, folder, where) if key == first else value,
        known=lambda value, key: module.digest_of(value) if key == first else value,
    )


#: A sound, and what is said in it, which counts.
SPEECH = _with_media("sound", sound, "speech", ("audio", "text"), True)
#: A picture with a prompt, and what the model is to say next, which counts.
ANSWER = _with_media("picture", pictures, "answer", ("image", "prompt", "completion"), True)
#: A picture and a text whose embeddings match.
CAPTION = _with_media("picture", pictures, "caption", ("image", "text"), False)

KINDS: Registry[ExampleKind] = Registry("kind of example", [TEXT, COMPLETION, MESSAGES, PAIRS, SPEECH, ANSWER, CAPTION])
