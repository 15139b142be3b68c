"""Files, arrays and dataset rows become clips: mono float32 at a rate that is known.

A clip enters by one door, `as_clip`, whatever it was before. It keeps its own rate there; `Clip.at_rate` resamples it
for a model, and `Clip.within` is the only place where seconds can be lost, and only when asked.

Two rules that may surprise: an array without a rate is refused (a wrong rate is the most common silent fault of audio
pipelines), and a clip longer than a model's window is refused, too (most pipelines cut it without a word).
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from jaxtyping import Float32

MAX_CHANNELS = 32


class AudioError(ValueError):
    """A clip that cannot be used; the message names the clip, what is wrong and what to do."""


@dataclass(frozen=True, eq=False, repr=False)
class Clip:
    """A mono waveform. Clips are equal where name, rate, transcript and every sample are.

    Attributes:
        waveform: amplitude, full scale at ±1.
        rate: samples per second (Hz).
        name: where it came from, for messages and tables.
        transcript: the words that go with it, for models that read a transcription; None where none was given.
    """

    waveform: Float32[np.ndarray, " samples"]
    rate: int
    name: str = "clip"
    transcript: str | None = None

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise AudioError(f"{self.name}: the rate must be a positive number of Hz, not {self.rate}.")
        if self.waveform.size == 0:
            raise AudioError(f"{self.name}: the clip is empty (0 samples).")
        if not np.isfinite(self.waveform).all():
            first = int(np.flatnonzero(~np.isfinite(self.waveform))[0])
            raise AudioError(
                f"{self.name}: the waveform is not finite; the first NaN or infinity is sample {first} "
                f"({first / self.rate:.3f} s). Repair the clip or leave it out."
            )

    def __repr__(self) -> str:
        return f"Clip({self.name!r}, {self.seconds:.2f} s, {self.rate} Hz)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Clip) and (self.name, self.digest) == (other.name, other.digest)

    def __hash__(self) -> int:
        return hash((self.name, self.digest))

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return len(self.waveform) / self.rate

    @property
    def digest(self) -> str:
        """A content hash: equal audio and transcript, equal digest, whatever the file's name."""
        words = "" if self.transcript is None else f"\n{self.transcript}"
        return hashlib.sha256(self.waveform.tobytes() + f"{self.rate}{words}".encode()).hexdigest()[:16]

    def at_rate(self, rate: int) -> Clip:
        """The same clip resampled to ``rate`` Hz (soxr, high quality)."""
        if rate == self.rate:
            return self
        return replace(self, waveform=soxr.resample(self.waveform, self.rate, rate).astype(np.float32), rate=rate)

    def within(self, shortest: float, longest: float, truncate: bool = False) -> Clip:
        """The clip, if its duration lies between ``shortest`` and ``longest`` seconds.

        Args:
            truncate: cut a longer clip to ``longest`` seconds and warn with the seconds lost.

        Raises:
            AudioError: too short, or too long without ``truncate``.
        """
        if self.seconds < shortest:
            raise AudioError(
                f"{self.name}: {self.seconds:.3f} s is too short; this model needs at least {shortest:.3f} s of audio."
            )
        if self.seconds <= longest:
            return self
        lost = self.seconds - longest
        if not truncate:
            raise AudioError(
                f"{self.name}: {self.seconds:.2f} s is longer than the model's window of {longest:g} s; "
                f"{lost:.2f} s would be lost. Split the clip, or pass truncate=True to drop its end."
            )
        warnings.warn(
            f"{self.name}: the last {lost:.2f} s of {self.seconds:.2f} s were dropped (truncate=True, "
            f"window {longest:g} s).",
            stacklevel=2,
        )
        return replace(self, waveform=self.waveform[: int(longest * self.rate)])

    def silenced(self) -> Clip:
        """Silence of the same length, nothing said in it: the control that tells whether the audio decided anything."""
        silence = np.zeros_like(self.waveform)
        return replace(self, waveform=silence, name=f"silence like {self.name}", transcript=None)


def as_clip(source: Any, rate: int | None = None) -> Clip:
    """Turn anything that holds one recording into a `Clip`.

    Args:
        source: a `Clip`; a path or a binary file object in any format libsndfile reads (WAV, FLAC, OGG, MP3, ...);
            an array or tensor, ``[samples]`` or with a channel axis, float or integer, together with ``rate``;
            or a row of a Hugging Face audio column (``{"array", "sampling_rate"}``, ``{"bytes"}`` or ``{"path"}``,
            or the decoder object that newer ``datasets`` give).
        rate: Hz, for arrays only.

    Raises:
        AudioError: missing file, not audio, empty, not finite, an array without a rate.
    """
    if isinstance(source, Clip):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _from_file(os.fspath(source), name=os.path.basename(os.fspath(source)))
    if hasattr(source, "read"):
        return _from_file(source, name=str(getattr(source, "name", "file object")))
    if isinstance(source, Mapping):
        return _from_mapping(source)
    if hasattr(source, "get_all_samples"):  # torchcodec's decoder, as `datasets` returns it
        return _from_mapping({"array": source["array"], "sampling_rate": source["sampling_rate"]})
    return _from_array(source, rate)


def seconds_of(source: Any, rate: int | None = None) -> float:
    """Duration of a recording in seconds; of a file, its header is read and nothing is decoded.

    Args:
        source: what `as_clip` takes; file objects are read through.
        rate: Hz, for arrays only.

    Raises:
        AudioError: as `as_clip` does, for what can be known without decoding.
    """
    encoded = _encoded(source)
    if encoded is None:
        return as_clip(source, rate).seconds
    file, name = encoded
    header = _read_file(soundfile.info, file, name)
    if header.frames == 0:
        raise AudioError(f"{name}: the clip is empty (0 samples).")
    return header.frames / header.samplerate


def digest_of(source: Any) -> str:
    """A content hash of what a recording is stored as: the bytes of a file, the samples of an array.

    Args:
        source: what `as_clip` takes without a rate.

    Raises:
        AudioError: a missing file, or what `as_clip` refuses.
    """
    encoded = _encoded(source)
    if encoded is None:
        return as_clip(source).digest
    file, _ = encoded
    content = file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def _encoded(source: Any) -> tuple[str | io.BytesIO, str] | None:
    """The file that a source is, and its name; None where the source holds samples, or can be read but once."""
    if isinstance(source, (str, os.PathLike)):
        return _existing(os.fspath(source)), os.path.basename(os.fspath(source))
    if isinstance(source, Mapping) and source.get("array") is None:
        if source.get("bytes") is not None:
            return io.BytesIO(source["bytes"]), _row_name(source)
        if source.get("path") is not None:
            return _encoded(source["path"])
    return None


def _row_name(row: Mapping[str, Any]) -> str:
    return os.path.basename(str(row.get("path") or "dataset row"))


def _from_mapping(row: Mapping[str, Any]) -> Clip:
    name = _row_name(row)
    if row.get("array") is not None:
        return replace(_from_array(row["array"], row.get("sampling_rate"), name), name=name)
    if row.get("bytes") is not None:
        return _from_file(io.BytesIO(row["bytes"]), name=name)
    if row.get("path") is not None:
        return as_clip(row["path"])
    raise AudioError(
        f"a dictionary with the keys {sorted(row)} is no audio: it needs 'array' and 'sampling_rate', or 'bytes', "
        "or 'path'."
    )


def _from_file(file: Any, name: str) -> Clip:
    samples, rate = _read_file(_decoded, _existing(file) if isinstance(file, str) else file, name)
    return Clip(samples.mean(axis=1, dtype=np.float32), rate, name)


def _existing(path: str) -> str:
    if not os.path.isfile(path):
        raise AudioError(f"{path}: there is no such file.")
    return path


def _decoded(file: Any) -> tuple[np.ndarray, int]:
    return soundfile.read(file, dtype="float32", always_2d=True)


def _read_file(read: Callable[[Any], Any], file: Any, name: str) -> Any:
    try:
        return read(file)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless audio, which says no rate
        raise AudioError(f"{name}: cannot be read as audio ({error}).") from error


def _from_array(array: Any, rate: int | None, name: str = "array") -> Clip:
    samples = _as_numpy(array)
    if not np.issubdtype(samples.dtype, np.number) or np.iscomplexobj(samples):
        raise AudioError(f"{name}: a {type(array).__name__} of dtype {samples.dtype} is no audio.")
    if rate is None:
        raise AudioError(f"{name}: an array of shape {samples.shape} needs its rate: pass rate= in Hz.")
    if np.issubdtype(samples.dtype, np.integer):
        samples = _centred(samples)
    return Clip(np.ascontiguousarray(_mono(samples, name), dtype=np.float32), int(rate), name)


def _as_numpy(array: Any) -> np.ndarray:
    if hasattr(array, "detach"):  # a torch tensor; numpy knows no bfloat16
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    return np.asarray(array)


def _centred(samples: np.ndarray) -> np.ndarray:
    """Integer PCM as floats in [-1, 1]; unsigned PCM is silent at the middle of its range."""
    limits = np.iinfo(samples.dtype)
    middle = 0.0 if limits.min < 0 else (limits.max + 1) / 2
    full_scale = float(limits.max + 1) - middle
    return (samples.astype(np.float64) - middle) / full_scale


def _mono(samples: np.ndarray, name: str) -> np.ndarray:
    """Mix channels; the shorter of two axes holds them."""
    if samples.ndim == 1 or samples.size == 0:
        return samples.ravel()
    if samples.ndim == 2 and 0 < min(samples.shape) <= MAX_CHANNELS:
        return samples.mean(axis=int(np.argmin(samples.shape)))
    raise AudioError(
        f"{name}: an array of shape {samples.shape} is no recording; expected [samples], [channels, samples] or "
        f"[samples, channels] with at most {MAX_CHANNELS} channels."
    )
