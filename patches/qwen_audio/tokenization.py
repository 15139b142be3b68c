"""Qwen-Audio's tokenizer from its published ranks: byte-level BPE as in Qwen2, with the audio model's special tokens.

A published checkpoint has one file, ``qwen.tiktoken``: a token and its rank per line, and the rank is the id. A
byte-level BPE asks for merges instead. The merge that makes a token is the last one of the token's own encoding with
all earlier ranks, so each is found by encoding the token with what came before it.

The special tokens follow the ranks in a fixed order (151,643 and on). Their names and ids, and the expression that cuts
a text into words (Qwen2's), are those of `tokenization_qwen.py` in QwenLM/Qwen-Audio (0b0e882).
"""

from __future__ import annotations

import base64
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

RANKS = 151_643
END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PLACEHOLDER, CLIP_START, CLIP_END = "[[[AUDIO:modality]]]", "<audio>", "</audio>"

LANGUAGES = ("unknown", "en", "zh", "de", "es", "ko", "fr", "ja", "it", "zh_tr")
TASKS = ("startoftranscript", "startofanalysis", "translate", "transcribe", "caption", "keyword")
OUTPUT_TAGS = (
    "caption_audiocaps",
    "caption_clotho",
    "audioset_ontology",
    "caption_plain",
    "itn",
    "wo_itn",
    "startofentityvalue",
    "endofentityvalue",
    "startofentitytype",
    "endofentitytype",
    "named_entity_recognition",
    "audio_grounding",
    "startofword",
    "endofword",
    "delim",
    "emotion_recognition",
    "music_description",
    "note_analysis",
    "pitch",
    *(f"midi_pitch_{note}" for note in range(128)),
    "velocity",
    *(f"midi_velocity_{force}" for force in range(128)),
    "sonic",
    "instrument",
    "speaker_meta",
    "song_meta",
    "question",
    "answer",
    "choice",
    "scene",
    "event",
    "vocal_classification",
    "speech_understanding",
    "scenario",
    "action",
    "entities",
    "speech_edit",
)


def special_tokens() -> list[str]:
    """Every special token, in the order of the ids from 151,643 on."""
    tags = [
        *TASKS,
        *LANGUAGES,
        "notimestamps",
        "sil",
        "timestamps",
        *(f"{hundredths / 100:.2f}" for hundredths in range(3001)),
        *OUTPUT_TAGS,
    ]
    extras = [f"<|extra_{number}|>" for number in range(205)]
    audio = [PLACEHOLDER, *(f"<|{tag}|>" for tag in tags), CLIP_START, CLIP_END]
    return [END, TURN_START, TURN_END, *extras, *audio]


def tokenizer_from_ranks(path: Path) -> Qwen2Tokenizer:
    """The tokenizer of a published ``qwen.tiktoken``.

    Raises:
        ValueError: a file that is no list of ranks.
    """
    ranks = read_ranks(path)
    letters = bytes_to_unicode()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    special = {token: RANKS + place for place, token in enumerate(special_tokens())}
    vocabulary = {written(token): rank for token, rank in ranks.items()} | special
    merges = [(written(left), written(right)) for left, right in merges_of(ranks)]
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, padding_side="left")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks, lowest first."""
    ranks = {}
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), 1):
        token, _, rank = line.partition(" ")
        if not rank.isdigit():
            raise ValueError(f"{path}, line {number}: {line[:40]!r} is no token with its rank.")
        ranks[base64.b64decode(token)] = int(rank)
    return ranks


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each token of more than one byte, in the order of their ranks."""
    return [_parts(token, rank, ranks) for token, rank in ranks.items() if len(token) > 1]


def _parts(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that the token's own encoding ends in, when only lower ranks may be used."""
    pieces = [token[place : place + 1] for place in range(len(token))]
    while len(pieces) > 2:
        candidates = [(ranks.get(left + right, rank), place) for place, (left, right) in enumerate(pairwise(pieces))]
        lowest, place = min(candidates)
        if lowest >= rank:
            raise ValueError(f"token {token!r} of rank {rank} is not made of two tokens of lower rank.")
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return pieces[0], pieces[1]
