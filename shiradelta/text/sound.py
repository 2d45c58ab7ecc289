"""Sound: samples of WAV files and of arrays, at the rate that a model hears."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shiradelta.errors import SourceError
from shiradelta.format.arithmetic import Float32
from shiradelta.text.files import file_digest, path_from, unreadable

#: What scipy says of a file that is cut; but not where its header leaves the length open, as ffmpeg's does in a pipe.
_CUT = rf"Reached EOF prematurely(?!.* expected {0xFFFFFFFF + 8} )"


@dataclass(frozen=True, eq=False)
class Sound:
    """Samples of one channel.

    Attributes:
        samples: float32 [n], from -1 to 1.
        rate: samples a second.
    """

    samples: Float32
    rate: int

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the samples."""
        return hashlib.sha256(self.samples.tobytes()).hexdigest()

    def __repr__(self) -> str:
        return f"Sound({len(self.samples)} samples at {self.rate} Hz, {self.digest})"

    def at_rate(self, rate: int) -> Float32:
        """The samples at another rate, float32 [n]."""
        if rate == self.rate:
            return self.samples
        from scipy.signal import resample_poly

        common = math.gcd(rate, self.rate)
        found: Float32 = resample_poly(self.samples, rate // common, self.rate // common).astype(np.float32)
        return found


def check(value: Any, where: str) -> None:
    """Raises SourceError for a value that is neither a path nor samples with their rate."""
    if isinstance(value, Sound) or (isinstance(value, str) and value.strip()):
        return
    if not isinstance(value, Mapping) or not ({"array", "sampling_rate"} <= value.keys() or value.get("bytes")):
        raise SourceError(
            f"{where}: its audio is no sound; give the path of a WAV file, or"
            ' {"array": samples, "sampling_rate": ...}'
        )


def placed(value: Any, folder: Path | None, where: str) -> str | Sound:
    """A path from a folder on, or samples.

    Args:
        value: as `check` takes it.
        folder: the folder that paths start from; None leaves them as they are.
        where: the example, for messages.

    Raises:
        SourceError: the path is a web address, or the array or the bytes are no sound.
    """
    if isinstance(value, str):
        return path_from(value, folder, where)
    if isinstance(value, Sound):
        return value
    if "array" in value:
        return _of_array(value["array"], value["sampling_rate"], where)
    return _of_wav(io.BytesIO(value["bytes"]), f"{where}: its audio")


def digest_of(value: str | Sound) -> str:
    """SHA-256 of a file, or of samples.

    Raises:
        SourceError: the file cannot be read.
    """
    return value.digest if isinstance(value, Sound) else file_digest(value)


def open_sound(value: str | Sound) -> Sound:
    """The samples of a WAV file, channels averaged; or those given.

    Raises:
        SourceError: the file is missing, is no WAV file, is cut, or has samples that are no numbers.
    """
    return value if isinstance(value, Sound) else _of_wav(value, value)


def _of_array(array: Any, rate: Any, where: str) -> Sound:
    samples = np.asarray(array)
    if samples.ndim != 1 or not len(samples) or not np.issubdtype(samples.dtype, np.number):
        raise SourceError(
            f"{where}: its audio is an array of {samples.dtype} {list(samples.shape)}; give samples of one channel [n]"
        )
    if not isinstance(rate, int | np.integer) or rate < 1:
        raise SourceError(f"{where}: its audio has a sampling rate of {rate!r}; give samples a second, such as 16000")
    return Sound(_finite(_scaled(samples), f"{where}: its audio"), int(rate))


def _of_wav(file: str | io.BytesIO, where: str) -> Sound:
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks that hold no samples
            warnings.filterwarnings("error", _CUT, wavfile.WavFileWarning)
            rate, samples = wavfile.read(file)
    except OSError as error:
        raise unreadable(where, error) from None
    except wavfile.WavFileWarning:
        raise SourceError(
            f"{where}: ends before its last sample; copy the file again, or leave the example out"
        ) from None
    except (ValueError, EOFError, IndexError, KeyError, ZeroDivisionError, struct.error) as error:
        raise SourceError(
            f"{where}: is no WAV file that can be read ({error}); convert it, as ffmpeg -i FILE FILE.wav does"
        ) from None
    if not len(samples):
        raise SourceError(f"{where}: has no samples; leave the example out")
    if rate < 1:
        raise SourceError(f"{where}: says that it has {rate} samples a second; convert it again")
    scaled = _scaled(samples)
    return Sound(_finite(scaled if scaled.ndim == 1 else scaled.mean(1), where), int(rate))


def _finite(samples: Float32, where: str) -> Float32:
    if not np.isfinite(samples).all():
        raise SourceError(f"{where}: has samples that are NaN or infinite; leave the example out")
    return samples


def _scaled(samples: Any) -> Float32:
    """Samples from -1 to 1; whole numbers are scaled by the range of their type."""
    found: Float32
    if samples.dtype == np.uint8:  # as WAV has 8 bits: the middle is 128
        found = (samples.astype(np.float32) - 128) / 128
    elif np.issubdtype(samples.dtype, np.signedinteger):
        found = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    else:
        found = samples.astype(np.float32)
    return found
