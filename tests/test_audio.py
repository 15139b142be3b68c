"""One recording, whatever it was before, becomes the same clip; what cannot be used is refused with its reason."""

from __future__ import annotations

import io
import re
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from audio_lens_plugin.audio import AudioError, Clip, as_clip, digest_of, seconds_of

RATE = 16000


def tone(hz: float = 440.0, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


TWO_SECONDS = Clip(tone(seconds=2.0), RATE, "dog.wav")


def loudest_frequency(clip: Clip) -> float:
    spectrum = np.abs(np.fft.rfft(clip.waveform * np.hanning(len(clip.waveform))))
    return float(spectrum.argmax() * clip.rate / len(clip.waveform))


def wav_bytes(pcm: np.ndarray) -> io.BytesIO:
    """Integer samples as a WAV file, written by the standard library: a truth that knows nothing of soundfile."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(pcm.dtype.itemsize)
        writer.setframerate(RATE)
        writer.writeframes(pcm.tobytes())
    file.seek(0)
    return file


@pytest.fixture
def tone_file(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "tone.wav", tone(), RATE, subtype="FLOAT")
    return tmp_path / "tone.wav"


DOORS = {
    "str": str,
    "Path": lambda path: path,
    "BytesIO": lambda path: io.BytesIO(path.read_bytes()),
    "dict of bytes": lambda path: {"bytes": path.read_bytes(), "path": "elsewhere.wav"},
    "dict of a path": lambda path: {"bytes": None, "array": None, "path": str(path)},
    "dict of an array": lambda path: {"array": tone(), "sampling_rate": RATE, "path": "elsewhere.wav"},
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_every_door_gives_the_same_clip(tone_file: Path, door: Callable) -> None:
    assert as_clip(door(tone_file)).digest == as_clip(tone(), rate=RATE).digest


def test_an_open_file_is_read(tone_file: Path) -> None:
    with tone_file.open("rb") as file:
        assert as_clip(file).digest == as_clip(tone(), rate=RATE).digest


def test_a_decoder_object_gives_its_array_and_rate() -> None:
    class Decoder:
        def get_all_samples(self):
            raise AssertionError("the row's items are enough")

        def __getitem__(self, key):
            return {"array": tone(), "sampling_rate": RATE}[key]

    assert as_clip(Decoder()).digest == as_clip(tone(), rate=RATE).digest


def test_a_clip_passes_unchanged() -> None:
    clip = Clip(tone(), RATE, "mine")
    assert as_clip(clip) is clip


@pytest.mark.parametrize("source", [str, lambda path: {"path": str(path)}], ids=["path", "dict"])
def test_a_clip_is_named_after_its_file(tone_file: Path, source: Callable) -> None:
    assert as_clip(source(tone_file)).name == "tone.wav"


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_file_of_every_format_keeps_its_sound(tmp_path: Path, kind: str) -> None:
    if kind not in soundfile.available_formats():
        pytest.skip(f"this libsndfile has no {kind}")
    soundfile.write(tmp_path / "tone", tone(seconds=2.0), RATE, format=kind)
    assert loudest_frequency(as_clip(tmp_path / "tone")) == pytest.approx(440, abs=1)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint8])
@settings(deadline=None)
@given(data=st.data())
def test_integer_samples_sound_like_the_wav_file_of_them(dtype: type, data: st.DataObject) -> None:
    pcm = data.draw(arrays(dtype, st.integers(1, 50)))
    np.testing.assert_allclose(as_clip(pcm, rate=RATE).waveform, as_clip(wav_bytes(pcm)).waveform, rtol=0, atol=1e-7)


TYPES = {
    "float64": tone().astype(np.float64),
    "tensor": torch.from_numpy(tone()),
    "tensor with a gradient": torch.from_numpy(tone()).requires_grad_(),
    "bfloat16 tensor": torch.from_numpy(tone()).bfloat16(),
    "list": tone().tolist(),
}


@pytest.mark.parametrize("samples", TYPES.values(), ids=TYPES)
def test_other_number_types_keep_the_waveform(samples: Any) -> None:
    np.testing.assert_allclose(as_clip(samples, rate=RATE).waveform, tone(), atol=2e-3)


@pytest.mark.parametrize("axis", [0, 1], ids=["channels first", "channels last"])
def test_channels_are_mixed(axis: int) -> None:
    stereo = np.stack([tone(), np.zeros_like(tone())], axis=axis)
    np.testing.assert_allclose(as_clip(stereo, rate=RATE).waveform, tone() / 2, atol=1e-7)


def test_channels_of_a_file_are_mixed(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "stereo.wav", np.stack([tone(), -tone()], axis=1), RATE)
    np.testing.assert_allclose(as_clip(tmp_path / "stereo.wav").waveform, 0, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_resampling_keeps_a_tones_frequency(rate: int) -> None:
    assert loudest_frequency(Clip(tone(seconds=2.0), RATE).at_rate(rate)) == pytest.approx(440, abs=1)


def test_resampling_folds_no_high_tone_down() -> None:
    low = Clip(tone(hz=7000, seconds=2.0), RATE).at_rate(8000)
    assert np.abs(low.waveform[800:-800]).max() < 0.005


@settings(deadline=None)
@given(st.integers(400, 4000), st.sampled_from([8000, 16000, 22050, 44100]), st.sampled_from([8000, 16000, 24000]))
def test_resampling_keeps_the_duration_within_a_sample(samples: Any, rate: int, target: int) -> None:
    clip = Clip(np.zeros(samples, dtype=np.float32), rate)
    assert clip.at_rate(target).seconds == pytest.approx(clip.seconds, abs=1 / target)


WITH_NAN = np.where(np.arange(8000) == 4000, np.nan, 0.0)
REFUSED = {
    "no rate": (lambda: as_clip(np.zeros((2, 7))), r"array: .*shape \(2, 7\) needs its rate: pass rate="),
    "rate zero": (lambda: as_clip(np.zeros(7), rate=0), r"positive number of Hz, not 0"),
    "negative rate": (lambda: as_clip(np.zeros(7), rate=-8000), r"positive number of Hz, not -8000"),
    "no samples": (lambda: as_clip(np.zeros(0), rate=RATE), r"array: the clip is empty \(0 samples\)"),
    "a channel of no samples": (lambda: as_clip(torch.zeros(1, 0), rate=RATE), r"empty \(0 samples\)"),
    "NaN": (lambda: as_clip(WITH_NAN, rate=8000), r"not finite; .* is sample 4000 \(0\.500 s\)\. Repair"),
    "infinity": (lambda: as_clip(np.array([0.0, np.inf]), rate=1), r"not finite; .* is sample 1 \(1\.000 s\)"),
    "too many channels": (lambda: as_clip(np.zeros((40, 50)), rate=1), r"\(40, 50\) is no recording; expected \[sam"),
    "three axes": (lambda: as_clip(np.zeros((1, 1, 9)), rate=1), r"\(1, 1, 9\) is no recording"),
    "None": (lambda: as_clip(None), r"a NoneType of dtype object is no audio"),
    "truth values": (lambda: as_clip(np.zeros(9, dtype=bool), rate=1), r"dtype bool is no audio"),
    "complex numbers": (lambda: as_clip(np.zeros(9, dtype=complex), rate=1), r"dtype complex128 is no audio"),
    "a dict without audio": (lambda: as_clip({"text": "hi", "id": 3}), r"\['id', 'text'\].*'array' and 'sampling_r"),
    "a dict without a rate": (lambda: as_clip({"array": [0.0], "path": "a/b.wav"}), r"^b\.wav: .*needs its rate"),
    "too short": (lambda: TWO_SECONDS.within(2.5, 30.0), r"dog\.wav: 2\.000 s is too short.* at least 2\.500 s"),
    "too long": (
        lambda: TWO_SECONDS.within(0.1, 0.75),
        r"dog\.wav: 2\.00 s is longer.*window of 0\.75 s; 1\.25 s would be lost.*truncate=True",
    ),
    "bytes of no audio": (lambda: as_clip(io.BytesIO(b"hello")), r"file object: cannot be read as audio \(.*\w"),
}


@pytest.mark.parametrize(("attempt", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_clip_is_refused_with_its_reason(attempt: Callable, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        attempt()


def test_a_missing_file_is_named_with_its_folder(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=re.escape(f"{tmp_path / 'gone.wav'}: there is no such file")):
        as_clip(tmp_path / "gone.wav")


@pytest.mark.parametrize("suffix", [".txt", ".wav", ".raw"])
def test_a_text_file_is_no_audio_whatever_its_suffix(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"notes{suffix}").write_text("a transcript, not the recording")
    with pytest.raises(AudioError, match=rf"notes{suffix}: cannot be read as audio"):
        as_clip(tmp_path / f"notes{suffix}")


def test_a_file_without_samples_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), RATE)
    with pytest.raises(AudioError, match=r"nothing\.wav: the clip is empty"):
        as_clip(tmp_path / "nothing.wav")


def test_a_clip_of_exactly_the_window_passes() -> None:
    assert TWO_SECONDS.within(2.0, 2.0) is TWO_SECONDS


def test_truncation_warns_with_the_seconds_lost() -> None:
    with pytest.warns(UserWarning, match=r"dog\.wav: the last 1\.25 s of 2\.00 s were dropped"):
        TWO_SECONDS.within(0.1, 0.75, truncate=True)


@pytest.mark.filterwarnings("ignore:dog.wav")
def test_truncation_keeps_the_start() -> None:
    kept = TWO_SECONDS.within(0.1, 0.75, truncate=True)
    np.testing.assert_array_equal(kept.waveform, TWO_SECONDS.waveform[:12000])


def test_equal_audio_has_an_equal_digest_whatever_its_name() -> None:
    assert Clip(tone(), RATE, "a").digest == Clip(tone(), RATE, "b").digest


@settings(deadline=None)
@given(st.integers(0, 99))
def test_one_changed_sample_changes_the_digest(place: int) -> None:
    changed = tone()[:100].copy()
    changed[place] = np.nextafter(changed[place], np.float32(1))
    assert Clip(changed, RATE).digest != Clip(tone()[:100], RATE).digest


def test_another_rate_changes_the_digest() -> None:
    assert Clip(tone(), RATE).digest != Clip(tone(), 8000).digest


def test_clips_can_be_compared() -> None:
    assert (Clip(tone(), RATE) == Clip(tone(440.5), RATE)) is False


def test_a_silenced_clip_keeps_its_length() -> None:
    assert TWO_SECONDS.silenced().seconds == 2


def test_a_silenced_clip_is_silent() -> None:
    assert not TWO_SECONDS.silenced().waveform.any()


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_the_duration_is_the_same_through_every_door(tone_file: Path, door: Callable) -> None:
    assert seconds_of(door(tone_file)) == 0.5


def test_the_duration_of_samples_needs_their_rate() -> None:
    assert seconds_of(np.zeros((2, 4000)), rate=8000) == seconds_of(Clip(tone(), RATE)) == 0.5
    with pytest.raises(AudioError, match="needs its rate"):
        seconds_of(np.zeros(4000))


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_the_duration_that_a_header_tells_is_that_of_the_decoded_clip(tmp_path: Path, kind: str) -> None:
    if kind not in soundfile.available_formats():
        pytest.skip(f"this libsndfile has no {kind}")
    soundfile.write(tmp_path / "tone", tone(seconds=1.234), RATE, format=kind)
    assert seconds_of(tmp_path / "tone") == as_clip(tmp_path / "tone").seconds


def test_the_duration_of_a_file_is_told_without_decoding_it(tone_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundfile, "read", lambda *_, **__: pytest.fail("the file was decoded"))
    assert seconds_of(tone_file) == seconds_of({"bytes": tone_file.read_bytes()}) == 0.5


def test_a_file_that_is_no_audio_has_no_duration(tmp_path: Path) -> None:
    (tmp_path / "notes.wav").write_text("a transcript, not the recording")
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), RATE)
    for name, message in (("notes", "cannot be read as audio"), ("nothing", "is empty"), ("gone", "no such file")):
        with pytest.raises(AudioError, match=rf"{name}\.wav: .*{message}"):
            seconds_of(tmp_path / f"{name}.wav")


def test_a_file_and_its_bytes_have_one_digest(tone_file: Path) -> None:
    assert digest_of(tone_file) == digest_of(str(tone_file)) == digest_of({"bytes": tone_file.read_bytes()})


def test_other_samples_have_another_digest() -> None:
    rows = [{"array": tone(hz), "sampling_rate": RATE} for hz in (440.0, 441.0)]
    assert digest_of(rows[0]) != digest_of(rows[1])
