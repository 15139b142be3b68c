"""Synthetic clips that carry the four SAKURA attributes, for the toys to learn from.

A clip is either speech or an animal. Speech is a string of numbers read by espeak-ng: the *language* is the language
espeak-ng reads in, the *gender* one of its male or female voices, the *emotion* a range of speeds and pitches. An
animal is a sketch in numpy: a call of a few sines and some noise, repeated with pauses. White noise lies over both.

A clip's length is drawn before its content and independently of it, so that the length tells nothing of the labels.
Every clip has a random generator of its own, made of the seed and the clip's number: the same seed gives the same
clips, however many are made at a time.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import soxr

SAMPLE_RATE = 16_000
ESPEAK_RATE = 22_050
WAV_HEADER_BYTES = 44

ANIMAL_SHARE = 0.3

VOICE_LANGUAGES = {
    "English": "en",
    "German": "de",
    "Spanish": "es",
    "French": "fr",
    "Italian": "it",
    "Chinese": "cmn",
    "Japanese": "ja",
    "Korean": "ko",
}
VOICE_VARIANTS = {
    "male": ("m1", "m2", "m3", "m4", "m5", "m6", "m7"),
    "female": ("f1", "f2", "f3", "f4", "f5"),
}


@dataclass(frozen=True)
class LabelledSound:
    """One sound: mono float32 at 16 kHz, its labels by track name, its signal-to-noise ratio in dB."""

    waveform: np.ndarray
    labels: dict[str, str]
    snr: float


@dataclass(frozen=True)
class Manner:
    """How an emotion is spoken: ranges of espeak-ng's words per minute and pitch (0 to 99), and its loudness."""

    speed: tuple[int, int]
    pitch: tuple[int, int]
    loudness: int


MANNERS = {
    "angry": Manner(speed=(190, 230), pitch=(45, 60), loudness=200),
    "disgust": Manner(speed=(100, 125), pitch=(20, 32), loudness=90),
    "fear": Manner(speed=(215, 260), pitch=(70, 90), loudness=60),
    "happy": Manner(speed=(170, 200), pitch=(62, 80), loudness=120),
    "sad": Manner(speed=(85, 105), pitch=(30, 42), loudness=40),
}


@dataclass(frozen=True)
class Noise:
    """How loud the noise is: ranges in dB of the signal-to-noise ratio, and the share of clips in the harder range."""

    drowned_share: float
    drowned: tuple[float, float]
    noisy: tuple[float, float] = (3.0, 30.0)

    def draw(self, rng: np.random.Generator) -> float:
        """A signal-to-noise ratio in dB."""
        return rng.uniform(*(self.drowned if rng.random() < self.drowned_share else self.noisy))


LEARNING = Noise(drowned_share=0.2, drowned=(-6.0, 6.0))
NOISY = Noise(drowned_share=0.0, drowned=(-12.0, 0.0))
DROWNED = Noise(drowned_share=1.0, drowned=(-12.0, 0.0))
MIXED = Noise(drowned_share=0.5, drowned=(-12.0, 0.0))


def make_clips(
    count: int, seed: int, *, seconds: tuple[float, float] = (0.5, 3.0), noise: Noise = LEARNING
) -> list[LabelledSound]:
    """Make `count` clips, the same ones for the same seed.

    Args:
        seconds: shortest and longest clip.
        noise: how hard the clips are to hear.

    Raises:
        RuntimeError: if espeak-ng is not installed.
    """
    if shutil.which("espeak-ng") is None:
        raise RuntimeError("espeak-ng, which reads the toy's speech, is not installed (Debian: apt install espeak-ng)")
    generators = [np.random.default_rng([seed, number]) for number in range(count)]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(make_clip, generators, repeat(seconds), repeat(noise)))


def make_clip(rng: np.random.Generator, seconds: tuple[float, float], noise: Noise) -> LabelledSound:
    """Draw one clip: its length, its noise, then what sounds in it."""
    shortest, longest = seconds
    length = int(SAMPLE_RATE * (shortest + (longest - shortest) * math.sqrt(rng.random())))
    snr = noise.draw(rng)
    sound, labels = (animal if rng.random() < ANIMAL_SHARE else speech)(rng, length)
    return LabelledSound(add_noise(sound, snr, rng), labels, snr)


def add_noise(sound: np.ndarray, snr: float, rng: np.random.Generator) -> np.ndarray:
    """Lay white noise over a sound, `snr` dB below it; the sum stays within -1 and 1."""
    power = np.mean(sound**2) / 10 ** (snr / 10)
    noisy = sound + rng.standard_normal(len(sound)) * math.sqrt(power)
    return (noisy / max(1.0, np.abs(noisy).max())).astype(np.float32)


def speech(rng: np.random.Generator, length: int) -> tuple[np.ndarray, dict[str, str]]:
    """Numbers read in a random language, voice and manner, `length` samples of them."""
    labels = {
        "Language": str(rng.choice(list(VOICE_LANGUAGES))),
        "Gender": str(rng.choice(list(VOICE_VARIANTS))),
        "Emotion": str(rng.choice(list(MANNERS))),
    }
    enough = 2 + math.ceil(1.5 * length / SAMPLE_RATE)
    text = " ".join(str(number) for number in rng.integers(100, 1000, enough))
    voice = f"{VOICE_LANGUAGES[labels['Language']]}+{rng.choice(VOICE_VARIANTS[labels['Gender']])}"
    return espeak(text, voice, MANNERS[labels["Emotion"]], rng)[:length], labels


def espeak(text: str, voice: str, manner: Manner, rng: np.random.Generator) -> np.ndarray:
    """Let espeak-ng read `text`; the waveform at 16 kHz."""
    settings = {
        "-v": voice,
        "-a": manner.loudness,
        "-s": rng.integers(*manner.speed),
        "-p": rng.integers(*manner.pitch),
    }
    arguments = [str(part) for setting in settings.items() for part in setting]
    wav = subprocess.run(["espeak-ng", "--stdout", *arguments, text], capture_output=True, check=True).stdout
    samples = np.frombuffer(wav[WAV_HEADER_BYTES:], dtype=np.int16).astype(np.float32) / 32768
    return soxr.resample(samples, ESPEAK_RATE, SAMPLE_RATE)


def animal(rng: np.random.Generator, length: int) -> tuple[np.ndarray, dict[str, str]]:
    """The call of a random animal, repeated with pauses, `length` samples of it."""
    name = str(rng.choice(list(ANIMALS)))
    kind, parts, made = ANIMALS[name], [], 0
    while made < length:
        pause = np.zeros(int(SAMPLE_RATE * rng.uniform(*kind.pause)))
        parts += [kind.call(rng), pause]
        made += len(parts[-2]) + len(pause)
    sound = np.concatenate(parts)[:length]
    return 0.5 * sound / np.abs(sound).max(), {"Animal": name}


# The animals. Frequencies are in Hz, times in seconds; `vary` makes no two calls alike.


@dataclass(frozen=True)
class Animal:
    """A call and the range of pauses after it, in seconds."""

    call: Callable[[np.random.Generator], np.ndarray]
    pause: tuple[float, float]


def vary(rng: np.random.Generator, value: float, by: float = 0.1) -> float:
    """`value`, up to the share `by` higher or lower."""
    return value * rng.uniform(1 - by, 1 + by)


def glide(rng: np.random.Generator, seconds: float, *frequencies: float) -> np.ndarray:
    """A pitch that moves in straight lines through the given frequencies, one value per sample."""
    samples = int(SAMPLE_RATE * vary(rng, seconds))
    corners = np.linspace(0, samples, len(frequencies))
    return vary(rng, 1.0) * np.interp(np.arange(samples), corners, frequencies)


def sing(pitch: np.ndarray, harmonics: int) -> np.ndarray:
    """A harmonic tone that follows the pitch; the k-th harmonic is k times weaker than the first."""
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    return np.sum([np.sin(k * phase) / k for k in range(1, harmonics + 1)], axis=0)


def swell(sound: np.ndarray, sharpness: float = 1.0) -> np.ndarray:
    """Fade a sound in and out."""
    return sound * np.hanning(len(sound)) ** sharpness


def breath(rng: np.random.Generator, sound: np.ndarray, amount: float) -> np.ndarray:
    """Add hoarseness to a sound."""
    return sound + amount * rng.standard_normal(len(sound))


def tremble(seconds: np.ndarray, rate: float) -> np.ndarray:
    """A slow sine between -1 and 1."""
    return np.sin(2 * np.pi * rate * seconds)


def bark(rng: np.random.Generator) -> np.ndarray:
    return swell(breath(rng, sing(glide(rng, 0.12, 500, 250), 5), 0.5))


def meow(rng: np.random.Generator) -> np.ndarray:
    return swell(sing(glide(rng, 0.7, 450, 800, 400), 8))


def grunt(rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(int(SAMPLE_RATE * vary(rng, 0.16)))
    rattle = 1 + np.sign(tremble(np.arange(len(noise)) / SAMPLE_RATE, rate=vary(rng, 35)))
    return swell(noise * rattle)


def moo(rng: np.random.Generator) -> np.ndarray:
    return swell(sing(glide(rng, 1.3, 130, 180), 13), 0.3)


def croak(rng: np.random.Generator) -> np.ndarray:
    return swell(sing(glide(rng, 0.06, 900, 900), 2))


def cluck(rng: np.random.Generator) -> np.ndarray:
    return swell(sing(glide(rng, 0.075, 700, 1000), 4))


def crow_at_dawn(rng: np.random.Generator) -> np.ndarray:
    return swell(sing(glide(rng, 0.95, 600, 1100, 1300, 700), 7), 0.2)


def bleat(rng: np.random.Generator) -> np.ndarray:
    pitch = glide(rng, 0.9, 320, 320)
    wave = tremble(np.arange(len(pitch)) / SAMPLE_RATE, rate=vary(rng, 8))
    return swell(sing(pitch + 25 * wave, 9) * (1 + 0.6 * wave), 0.2)


def caw(rng: np.random.Generator) -> np.ndarray:
    return swell(breath(rng, sing(glide(rng, 0.22, 1500, 1200), 3), 1.2))


ANIMALS = {
    "dog": Animal(bark, pause=(0.1, 0.25)),
    "cat": Animal(meow, pause=(0.1, 0.4)),
    "pig": Animal(grunt, pause=(0.08, 0.2)),
    "cow": Animal(moo, pause=(0.1, 0.5)),
    "frog": Animal(croak, pause=(0.02, 0.06)),
    "hen": Animal(cluck, pause=(0.15, 0.3)),
    "rooster": Animal(crow_at_dawn, pause=(0.1, 0.5)),
    "sheep": Animal(bleat, pause=(0.1, 0.5)),
    "crow": Animal(caw, pause=(0.12, 0.3)),
}
