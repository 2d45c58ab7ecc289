"""Every error that this package raises on purpose.  Each is one plain line: what, where, what to do.

ShiraDeltaError
 |- FormatError                         a `.shd` file is refused; has a reason code
 |- DeltaError (ValueError)             a tensor delta is impossible
 |   `- ArgumentError                   an argument is wrong
 |- SourceError                         something cannot be converted
 |   `- UnreachableError                the Hub is not asked, or does not answer
 |- BaseMismatchError                   a delta was made for another base
 |- ChainError                          a step or a chain is refused; has a reason code
 |- TargetError                         a folder or file cannot be written
 |   `- NoAnswerError                   a serving engine does not answer
 |- LimitError                          a file takes more memory than its reader allows
 |- SignatureError                      a file is not signed by a key that is trusted
 |- DivergedError                       training gave NaN
 `- MissingDependencyError (ImportError)  an optional package is not installed, or cannot be loaded
"""

from __future__ import annotations

#: Reason code of a refused file -> what it means (spec/REGISTRY.md, "reason codes").
REASONS: dict[str, str] = {
    "bad_magic": "it is not a shiradelta file",
    "truncated": "it is shorter than it says",
    "unsupported_version": "its major version is not 1",
    "header_checksum": "the header's checksum is wrong",
    "unknown_feature": "it needs a feature that the reader does not know",
    "reserved_not_zero": "a field that must be zero is not",
    "trailing_data": "it is longer than it says",
    "limit_exceeded": "a count or size is over its limit",
    "section_layout": "a section is not where it must be",
    "section_checksum": "a section's checksum is wrong",
    "padding_not_zero": "padding, slack or unused bits are not zero",
    "bad_metadata": "the metadata are not ordered pairs of UTF-8 strings",
    "name_layout": "the names do not fill their section",
    "bad_name": "a name is empty, too long, not UTF-8 or has control characters",
    "duplicate_name": "two tensors have the same name",
    "name_order": "names are not in byte order",
    "unknown_dtype": "a dtype id is unknown",
    "unknown_op": "an operation id is unknown",
    "unknown_index_codec": "an index codec id is unknown",
    "unknown_value_codec": "a value codec id is unknown",
    "bad_shape": "a shape is out of range",
    "bad_count": "more nonzeros than elements",
    "bad_combination": "operation, dtype, codecs, flags or count do not go together",
    "zstd_ratio": "a zstd section decodes to too much",
    "bad_size": "a section's size does not fit its codec",
    "zstd_unavailable": "a section is zstd and the reader has none",
    "bad_zstd": "a zstd section does not decode to its size",
    "bad_index": "an index section contradicts itself or the count",
    "position_order": "positions are not strictly increasing",
    "position_range": "a position is outside the tensor",
    "bad_directory": "a directory entry is wrong",
    "bad_value": "a value or its parameters are not finite or not allowed",
    "base_needed": "the base tells where it changes, and none is given",
    "wrong_base": "it was made for another base",
    "digest_mismatch": "the contents are not those that the header names",
}

#: Reason code -> what to do, where it is not to get the file again.
REMEDIES: dict[str, str] = {
    "bad_magic": "give a .shd file; `shiradelta convert` makes one",
    "truncated": "fetch or copy it again",
    "unsupported_version": "upgrade shiradelta",
    "unknown_feature": "upgrade shiradelta",
    "unknown_dtype": "upgrade shiradelta",
    "unknown_op": "upgrade shiradelta",
    "unknown_index_codec": "upgrade shiradelta",
    "unknown_value_codec": "upgrade shiradelta",
    "zstd_unavailable": "install zstandard",
    "base_needed": "make it plain first: `shiradelta recode FILE OUT --base MODEL`",
    "wrong_base": "give the model that it was made for",
}


#: Reason code of a refused step or chain -> (what it means, what to do) (spec/CHAIN.md, "reason codes").
CHAIN_REASONS: dict[str, tuple[str, str]] = {
    "no_chain": ("no chain is there", "check the path; `shiradelta chain init` begins one"),
    "bad_manifest": ("the manifest is damaged, or was not made to the format", "get it again from the publisher"),
    "unknown_version": ("the manifest is of a format that this release does not know", "upgrade shiradelta"),
    "exists": ("a chain is there already", "publish to it, or begin the new one elsewhere"),
    "busy": ("another process is changing the chain", "try again when it is done"),
    "gap": ("a version before this one is missing", "publish that one first"),
    "duplicate": ("this step is published already", "go on with the next one"),
    "taken": ("this version is published already, with another step", "publish under the next number"),
    "no_fingerprint": ("a step has to say what it was made for", "make it with its base, so that it has fingerprints"),
    "wrong_base": ("it was made for another state", "make it against the version before it"),
    "other_model": ("the model is not that version of the chain", "give the one that is"),
    "not_published": ("the chain has no such version", "take one that `shiradelta chain list` shows"),
    "not_on_chain": ("the model is no version of the chain", "revert what is on it, or follow into a new folder"),
    "not_kept": ("that version is not kept", "follow into a new folder, or keep more steps"),
    "other_chain": ("another chain is there now", "open that one, in a new folder"),
    "pruned": ("no steps that are left lead there", "begin anew from an anchor, in a new folder"),
    "unreachable": ("no anchor would lead there any more", "publish an anchor first"),
    "store_failed": ("the store cannot be used", "try again when it can be reached"),
    "missing_file": ("a file that the manifest lists is missing", "put it back, or publish a new anchor"),
    "wrong_bytes": ("a file is not the one that was published", "put it back, or publish a new anchor"),
    "needs_base": (
        "these steps cannot be folded exactly by themselves",
        "give the model at the first version (--base)",
    ),
}

#: Characters of a message that are shown, from its beginning and from its end.
_SHOWN = 600, 350


def printable(text: str) -> str:
    """Escapes everything in a text that a terminal would act on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(message: str) -> str:
    """A message whose names and numbers may come from a stranger's file: escaped, and without the middle if long."""
    first, last = _SHOWN
    if len(message) > first + last:
        left_out = len(message) - first - last
        message = f"{message[:first]} [... {left_out:,} characters ...] {message[-last:]}"
    return printable(message)


class ShiraDeltaError(Exception):
    """Base of all errors of this package.  `str` gives one line of at most some 1,000 characters."""

    def __str__(self) -> str:
        return one_line(self._whole())

    def _whole(self) -> str:
        """The message, whatever is in it."""
        return super().__str__()


class FormatError(ShiraDeltaError):
    """A `.shd` file that is refused.

    Attributes:
        reason: stable code, a key of `REASONS`.
        detail: what exactly was found.
        offset: bytes from the start of the file, where known.
        tensor: the tensor concerned, where there is one.
        file: the file's name, where it has one.
        remedy: what to do, where more is known than the reason.
    """

    def __init__(
        self,
        reason: str,
        detail: str = "",
        *,
        offset: int | None = None,
        tensor: str | None = None,
        file: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
        self.offset = offset
        self.tensor = tensor
        self.file = file
        self.remedy: str | None = None

    def _whole(self) -> str:
        where = self.file or "delta"
        if self.tensor is not None:
            where += f", tensor {self.tensor!r}"
        if self.offset is not None:
            where += f", byte {self.offset}"
        what = REASONS[self.reason] + (f" ({self.detail})" if self.detail else "")
        remedy = self.remedy or REMEDIES.get(
            self.reason, "the file is damaged or was not made to the format; get it again"
        )
        return f"{where}: refused, {what} [{self.reason}]; {remedy}"


class DeltaError(ShiraDeltaError, ValueError):
    """An impossible tensor delta: positions out of order or out of range, values that are not finite."""


class ArgumentError(DeltaError):
    """A wrong argument: an unknown name, a number out of range, or two arguments that exclude each other.

    It is a DeltaError for code that was written before this class existed.

    Attributes:
        argument: the argument that the message is about and begins with; None for other messages.  The command line
            puts the option in its place.
    """

    def __init__(self, message: str = "", *, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument

    def _whole(self) -> str:
        message = super()._whole()
        return message if self.argument is None else f"{self.argument} {message}"


class MissingDependencyError(ShiraDeltaError, ImportError):
    """An optional package that is not installed, or cannot be loaded; the message says what to do."""


class SourceError(ShiraDeltaError):
    """A model, an adapter or a text file that cannot be read or converted."""


class UnreachableError(SourceError):
    """A file on the Hub that is not in its cache, while the Hub does not answer or HF_HUB_OFFLINE is set."""


class BaseMismatchError(ShiraDeltaError):
    """A model that the delta was not made for: names, shape, dtype or fingerprint differ."""


class ChainError(ShiraDeltaError):
    """A step or a chain that is refused, or a version that cannot be reached.

    Attributes:
        reason: stable code, a key of `CHAIN_REASONS`.
        where: the chain, the step or the file.
        detail: what exactly was found.
    """

    def __init__(self, reason: str, where: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.where = where
        self.detail = detail

    def _whole(self) -> str:
        what, remedy = CHAIN_REASONS[self.reason]
        return f"{self.where}: {what}{f' ({self.detail})' if self.detail else ''} [{self.reason}]; {remedy}"


class DivergedError(ShiraDeltaError):
    """Fitting or training that gave NaN, or a model worse than its base; the message says what to change."""


class LimitError(ShiraDeltaError):
    """A `.shd` file of which a tensor takes more memory, when it is decoded, than the reader's `limit` allows."""


class TargetError(ShiraDeltaError):
    """A model's folder or an output file that cannot be written: a lock, a link, a full disk, an unknown state.

    Attributes:
        ending: what is so after it, such as "nothing was changed"; empty where the problem says all.
    """

    def __init__(self, problem: str = "", *, ending: str = "") -> None:
        super().__init__(problem)
        self.ending = ending

    @property
    def problem(self) -> str:
        """What is wrong."""
        return str(self.args[0])

    def _whole(self) -> str:
        return f"{self.problem}; {self.ending}" if self.ending else self.problem


class NoAnswerError(TargetError):
    """A serving engine that does not answer: whether it has done what it was asked for is not known."""


class SignatureError(ShiraDeltaError):
    """A file that is not signed by a given key, a signature that cannot be read, or a key that cannot be used."""
