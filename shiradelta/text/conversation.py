"""Conversations as texts, by a tokenizer's chat template, and which of their characters the assistant says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.text.kinds import ASSISTANT
from shiradelta.util.optional import importing
from shiradelta.util.text import brief

#: (first character, the one after the last) of what the assistant says.
Span = tuple[int, int]
Message = Mapping[str, str]


def rendered(messages: Sequence[Message], tokenizer: Any, where: str) -> tuple[str, list[Span]]:
    """(the text of a conversation, what the assistant says in it, with the mark that ends each turn).

    Args:
        messages: with `role` and `content`; at least one of the assistant.
        tokenizer: with a chat template.
        where: the conversation, for messages.

    Raises:
        SourceError: the tokenizer has no chat template, or it does not take the conversation.
        MissingDependencyError: jinja2, which templates need, is not installed.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise SourceError(
            "the tokenizer has no chat template, which messages need; give prompt and completion, or the folder's"
            " chat_template.jinja"
        )
    text = _render(messages, tokenizer, where)
    spans: list[Span] = []
    for number, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            before = _render(messages[:number], tokenizer, where, add_generation_prompt=True)
            until = _render(messages[: number + 1], tokenizer, where)
            spans.append(_span(text, before, until, message["content"].strip(), f"{where}, message {number + 1}"))
    return text, spans


def _span(text: str, before: str, until: str, content: str, where: str) -> Span:
    """Where a turn is in the whole text: from where the template lets the model begin to the end of its turn."""
    if not text.startswith(before):
        raise SourceError(f"{where}: the chat template begins this turn otherwise than it asks for it; {_INSTEAD}")
    start, end = len(before), len(until)
    if not text.startswith(until):
        # Some templates leave a turn's reasoning out once other turns follow.
        start, own = text.find(content, start), until.rfind(content)
        if start < 0 or own < 0:
            raise SourceError(f"{where}: the chat template changes this turn once others follow; {_INSTEAD}")
        end = start
        while end < len(text) and own < len(until) and text[end] == until[own]:
            end, own = end + 1, own + 1
    return start, start + len(text[start:end].rstrip())


_INSTEAD = "end the conversation with it, or give prompt and completion"


def _render(messages: Sequence[Message], tokenizer: Any, where: str, **options: Any) -> str:
    with importing("a chat template"):
        from jinja2 import TemplateError
    try:
        found: str = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except (TemplateError, LookupError, TypeError, ValueError) as error:
        raise SourceError(
            f"{where}: the tokenizer's chat template does not take it ({brief(str(error), 160)}); {_INSTEAD}"
        ) from None
    return found
