"""A table of clips says at once what is wrong with it, and reads a clip only when it is asked about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile

from audio_lens_plugin.audio import AudioError
from audio_lens_plugin.datasets import (
    ClipSet,
    DatasetError,
    sakura,
    sakura_tracks,
    speaker_of,
    table,
    toy_clips,
    toy_tracks,
)
from audio_lens_plugin.loading import toys
from audio_lens_plugin.tracks import TRACKS, PromptForm, Track

GENDER = TRACKS["Gender"]


def write_clips(folder: Path, *names: str) -> list[str]:
    """Clips that differ: the first is at level 0.25, the second at 0.5, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(names, start=1):
        soundfile.write(folder / name, np.full(4000, place / 4), 8000, format="WAV", subtype="FLOAT")
    return [str(folder / name) for name in names]


def write_sakura(folder: Path, text: str) -> Path:
    write_clips(folder / "audio", "a.wav", "b.wav")
    (folder / "metadata.csv").write_text(text)
    return folder


def levels(clips: ClipSet) -> list[float]:
    return [float(sample.prompt.clips[0].waveform[0]) for sample in clips.samples()]


def refusal(attempt: Callable, *arguments: Any) -> str:
    with pytest.raises(DatasetError) as refused:
        attempt(*arguments)
    return str(refused.value)


@pytest.fixture
def frame(tmp_path: Path) -> pd.DataFrame:
    return pd.DataFrame({"file": write_clips(tmp_path, "a.wav", "b.wav"), "who": ["male", "female"]})


@pytest.mark.parametrize("column", ["file", "file_name"])
def test_both_spellings_of_the_published_metadata_are_read(tmp_path: Path, column: str) -> None:
    folder = write_sakura(tmp_path / "Gender", f"{column},attribute_label\nb.wav,male\na.wav,female\n")
    assert levels(sakura(folder)) == [0.5, 0.25]


def test_labels_are_written_as_the_track_writes_them(tmp_path: Path) -> None:
    folder = write_sakura(tmp_path / "Language", "file,attribute_label\na.wav, ENGLISH\nb.wav,german \n")
    assert sakura(folder).labels == ("English", "German")


def test_a_clip_is_named_as_in_the_metadata(tmp_path: Path) -> None:
    folder = write_sakura(tmp_path / "Gender", "file,attribute_label\n b.wav,male\n")
    assert sakura(folder).names == ("b.wav",)


def test_a_missing_file_is_told_with_its_row_before_anything_is_read(tmp_path: Path) -> None:
    folder = write_sakura(tmp_path / "Gender", "file,attribute_label\na.wav,male\ngone.wav,male\n")
    (folder / "audio" / "a.wav").write_text("reading this would be an error of its own")
    assert f"1 of 2 clips are not in {folder / 'audio'}:\n  row 2: gone.wav" in refusal(sakura, folder)


def test_of_many_missing_files_ten_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    frame = pd.DataFrame({"file": [str(tmp_path / f"{row}.wav") for row in range(12)], "who": "male"})
    assert refusal(table, frame, "who", "Gender").endswith("9.wav\n  ... and 2 more")


def test_an_unknown_label_is_told_with_its_row_and_those_there_are(tmp_path: Path) -> None:
    folder = write_sakura(tmp_path / "Gender", "file,attribute_label\na.wav,male\nb.wav,robot\n")
    assert "1 labels are none of male, female: row 2: 'robot'" in refusal(sakura, folder)


def test_a_folder_that_is_no_track_is_refused_with_the_tracks(tmp_path: Path) -> None:
    folder = write_sakura(tmp_path / "Gendre", "file,attribute_label\na.wav,male\n")
    assert f"{folder} is no SAKURA track: its name must be one of Animal, Emotion, Gender" in refusal(sakura, folder)


def test_a_track_without_metadata_is_refused(tmp_path: Path) -> None:
    assert refusal(sakura, tmp_path / "Gender") == f"{tmp_path / 'Gender' / 'metadata.csv'}: there is no such file."


WRITERS = {
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "json": lambda frame, path: frame.to_json(path, orient="records"),
    "tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "parquet": lambda frame, path: frame.to_parquet(path),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("place", ["", "audio"], ids=["beside the table", "in audio/"])
def test_a_table_finds_its_clips_from_its_own_folder(tmp_path: Path, kind: str, place: str) -> None:
    write_clips(tmp_path / place, "a.wav", "b.wav")
    WRITERS[kind](pd.DataFrame({"path": ["b.wav", "a.wav"], "who": ["male", "female"]}), tmp_path / f"clips.{kind}")
    assert levels(table(tmp_path / f"clips.{kind}", "who", "Gender")) == [0.5, 0.25]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_numbers_stay_words_as_they_are_written(tmp_path: Path, kind: str) -> None:
    write_clips(tmp_path, "007")
    WRITERS[kind](pd.DataFrame({"file": ["007"], "who": ["01"]}), tmp_path / f"clips.{kind}")
    digits = Track("Digit", "digit", ("01", "1"), "Which digit?", "The digit", "The digit said")
    assert table(tmp_path / f"clips.{kind}", "who", digits).labels == ("01",)


def test_a_label_that_pandas_takes_for_nothing_is_a_label(tmp_path: Path) -> None:
    write_clips(tmp_path, "a.wav", "b.wav")
    (tmp_path / "clips.csv").write_text("file,accent\na.wav,None\nb.wav,NA\n")
    accents = Track("Accent", "accent", ("None", "NA"), "Which accent?", "The accent", "The accent heard")
    assert table(tmp_path / "clips.csv", "accent", accents).labels == ("None", "NA")


def test_a_track_of_ones_own_asks_its_own_question(frame: pd.DataFrame) -> None:
    track = Track("Voice", "voice", ("male", "female"), "Whose voice?", "The voice", "The voice heard")
    assert table(frame, "who", track).samples("open+is+question")[0].prompt.question == "Whose voice?"


@pytest.mark.parametrize("index", [[7, 3], ["x", "y"]], ids=["numbers", "words"])
def test_the_index_of_a_data_frame_does_not_matter(frame: pd.DataFrame, index: list) -> None:
    assert table(frame.set_axis(index), "who", "Gender").labels == ("male", "female")


REFUSED = {
    "no paths": (lambda f: table(f[["who"]], "who", "Gender"), "no column of paths; one of file, file_name, path, aud"),
    "no labels": (lambda f: table(f, "whom", "Gender"), "data frame: no column 'whom'; there are file, who."),
    "no rows": (lambda f: table(f[:0], "who", "Gender"), "data frame: there are no clips in it."),
    "no track": (lambda f: table(f, "who", "Sex"), "'Sex' is no known track (Animal, Emotion, Gender, Language); desc"),
}


@pytest.mark.parametrize(("attempt", "message"), REFUSED.values(), ids=REFUSED)
def test_a_table_that_lacks_something_is_refused_with_what_there_is(
    frame: pd.DataFrame, attempt: Callable, message: str
) -> None:
    assert message in refusal(attempt, frame)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("clips.xlsx", "", "a table of clips is one of .csv, .tsv, .json, .jsonl, .parquet"),
        ("clips.csv", "", "cannot be read as csv: "),
        ("clips.jsonl", "{", "cannot be read as jsonl: "),
        ("clips.parquet", "not parquet", "cannot be read as parquet: "),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    assert f"{tmp_path / name}: {message}" in refusal(table, tmp_path / name, "who", "Gender")


@pytest.mark.parametrize("form", PromptForm.all(), ids=str)
def test_a_sample_asks_in_its_form(frame: pd.DataFrame, form: PromptForm) -> None:
    prompt = table(frame, "who", "Gender").samples(str(form))[1].prompt
    said = (prompt.question, prompt.options, prompt.answer, len(prompt.clips))
    assert said == (form.question(GENDER), form.options(GENDER), form.answer(GENDER), int(form.audio))


def test_a_sample_declares_the_attribute(frame: pd.DataFrame) -> None:
    assert table(frame, "who", "Gender").samples()[0].prompt.attribute == "gender"


def test_a_sample_knows_its_name_and_label(frame: pd.DataFrame) -> None:
    sample = table(frame, "who", "Gender").samples()[1]
    assert (sample.name, sample.label) == (frame["file"][1], "female")


def test_a_clip_is_read_only_when_its_sample_is_taken(frame: pd.DataFrame) -> None:
    samples = table(frame, "who", "Gender").samples()
    Path(frame["file"][1]).unlink()
    assert samples[0].label == "male"
    with pytest.raises(AudioError, match=r"b\.wav: there is no such file"):
        samples[1]


def test_the_control_without_audio_reads_no_clip(frame: pd.DataFrame) -> None:
    samples = table(frame, "who", "Gender").samples("open+is+no-audio")
    Path(frame["file"][0]).unlink()
    assert samples[0].prompt.clips == ()


@pytest.mark.parametrize("part", [slice(1, None), slice(None, None, -1), slice(5, 9), slice(-1, None)], ids=str)
def test_samples_are_sliced_like_a_list(frame: pd.DataFrame, part: slice) -> None:
    samples = table(frame, "who", "Gender").samples()
    assert [sample.name for sample in samples[part]] == list(frame["file"])[part]


@pytest.mark.parametrize(("track", "count"), [("Animal", 18), ("Emotion", 10), ("Gender", 8), ("Language", 16)])
def test_the_published_sample_is_read(sakura_sample: Path, track: str, count: int) -> None:
    assert [len(sample.prompt.clips) for sample in sakura(sakura_sample / track).samples()] == [1] * count


@pytest.fixture
def toy_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A shelf of one toy that has two clips."""
    write_clips(tmp_path / "clips" / "audio", "a.wav", "b.wav")
    (tmp_path / "clips" / "metadata.csv").write_text("file,animal,gender\na.wav,dog,\nb.wav,,male\n")
    monkeypatch.setattr("audio_lens_plugin.datasets.toys", lambda: {"toy/mine": tmp_path})
    return "toy/mine"


@pytest.mark.parametrize(("track", "level"), [("Animal", 0.25), ("Gender", 0.5)])
def test_a_toys_clips_are_those_with_a_label_of_the_track(toy_name: str, track: str, level: float) -> None:
    assert levels(toy_clips(toy_name, track)) == [level]


@pytest.mark.parametrize(("toy", "track"), [("toy/mine", "Animals"), ("toy/yours", "Animal")])
@pytest.mark.usefixtures("toy_name")
def test_clips_of_an_unknown_toy_or_track_are_refused_with_those_there_are(toy: str, track: str) -> None:
    message = f"no clips of '{toy}' for '{track}'; toys: toy/mine; tracks: Animal, Emotion, Gender, Language."
    assert refusal(toy_clips, toy, track) == message


@pytest.mark.parametrize("track", TRACKS)
@pytest.mark.parametrize("toy", toys())
def test_every_toy_ships_clips_of_every_track(toy: str, track: str) -> None:
    assert len(set(toy_clips(toy, track).labels)) > 1


@pytest.fixture
def hugging_face(frame: pd.DataFrame) -> Callable:
    """Makes a dataset of two clips; WAV bytes in memory are cast, since encoding them would need torchcodec."""
    datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    clips = [{"bytes": Path(file).read_bytes(), "path": Path(file).name} for file in frame["file"]]

    def make(labels: list, audio: str = "audio", clips: list = clips, names: list[str] | None = None) -> Any:
        dataset = datasets.Dataset.from_dict({audio: clips, "who": labels}).cast_column(audio, datasets.Audio())
        return dataset if names is None else dataset.cast_column("who", datasets.ClassLabel(names=names))

    return make


def test_a_hugging_face_dataset_is_a_table(hugging_face: Callable) -> None:
    assert levels(table(hugging_face(["male", "female"]), "who", "Gender")) == [0.25, 0.5]


def test_class_labels_of_a_dataset_are_words(hugging_face: Callable) -> None:
    assert table(hugging_face([1, 0], names=["Female", "male "]), "who", "Gender").labels == ("male", "female")


def test_a_row_of_a_dataset_is_named_after_its_file(hugging_face: Callable) -> None:
    assert table(hugging_face(["male", "female"]), "who", "Gender").names == ("a.wav", "b.wav")


def test_an_unknown_label_of_a_dataset_is_told_with_its_row(hugging_face: Callable) -> None:
    assert "row 2: 'robot'" in refusal(table, hugging_face(["male", "robot"]), "who", "Gender")


@pytest.mark.parametrize("label", [-1, None], ids=["-1", "None"])
def test_a_missing_class_label_of_a_dataset_is_told_with_its_row(hugging_face: Callable, label: int | None) -> None:
    dataset = hugging_face([0, label], names=["male", "female"])
    assert "row 2" in refusal(table, dataset, "who", "Gender")


@pytest.mark.parametrize("clip", [{"bytes": None, "path": "gone.wav"}, None], ids=["missing file", "no audio"])
def test_a_clip_that_a_dataset_lacks_is_told_with_its_row(
    hugging_face: Callable, frame: pd.DataFrame, clip: dict | None
) -> None:
    here = {"bytes": Path(frame["file"][0]).read_bytes(), "path": None}
    assert "row 2" in refusal(table, hugging_face(["male", "male"], clips=[here, clip]), "who", "Gender")


def test_a_dataset_without_an_audio_column_is_refused_with_its_columns(hugging_face: Callable) -> None:
    dataset = hugging_face(["male", "female"], audio="speech")
    assert "no column 'audio'; there are speech, who" in refusal(table, dataset, "who", "Gender")


def test_the_duration_of_every_clip_is_told(frame: pd.DataFrame) -> None:
    soundfile.write(frame["file"][1], np.zeros(3000), 16000)
    assert table(frame, "who", "Gender").seconds() == (4000 / 8000, 3000 / 16000)


SPEAKERS = {
    "1019_TSI_SAD_XX.wav": "speaker 1019",
    "audio/1019_IEO_HAP_HI.flac": "speaker 1019",
    "dia113_utt8.wav": "dialogue 113",
    "en_test_0_common_voice_en_18303530.wav": None,
    "cat48.wav": None,
    "1019.wav": None,
}


@pytest.mark.parametrize("name", SPEAKERS)
def test_a_speaker_is_known_where_the_file_name_tells(name: str) -> None:
    assert speaker_of(name) == SPEAKERS[name]


def test_clips_are_grouped_by_speaker_and_else_stand_alone(tmp_path: Path) -> None:
    files = ("1019_TSI_SAD_XX.wav", "1019_DFA_HAP_LO.wav", "dia1_utt1.wav", "dia1_utt2.wav", "dia10_utt1.wav", "x.wav")
    write_clips(tmp_path, *files)
    rows = "".join(f"{file},male\n" for file in files)
    (tmp_path / "clips.csv").write_text(f"file,who\n{rows}")
    speaker, dialogue = ["speaker 1019"] * 2, ["dialogue 1"] * 2
    groups = table(tmp_path / "clips.csv", "who", "Gender").groups()
    assert list(groups) == [*speaker, *dialogue, "dialogue 10", "x.wav"]


def test_a_copy_elsewhere_has_the_same_digest(tmp_path: Path) -> None:
    text = "file,attribute_label\na.wav,male\nb.wav,female\n"
    here, there = (write_sakura(tmp_path / place / "Gender", text) for place in ("here", "there"))
    assert sakura(here).digest() == sakura(there).digest()


@pytest.mark.parametrize(
    "text",
    ["a.wav,male\nb.wav,male\n", "b.wav,female\na.wav,male\n", "a.wav,male\n"],
    ids=["another label", "another order", "a clip less"],
)
def test_other_rows_have_another_digest(tmp_path: Path, text: str) -> None:
    first = write_sakura(tmp_path / "1" / "Gender", "file,attribute_label\na.wav,male\nb.wav,female\n")
    other = write_sakura(tmp_path / "2" / "Gender", f"file,attribute_label\n{text}")
    assert sakura(first).digest() != sakura(other).digest()


def test_another_recording_of_the_same_name_has_another_digest(frame: pd.DataFrame) -> None:
    clips = table(frame, "who", "Gender")
    before = clips.digest()
    soundfile.write(frame["file"][1], np.full(4000, 0.7), 8000, subtype="FLOAT")
    assert clips.digest() != before


def test_the_forms_of_clips_are_the_papers(frame: pd.DataFrame) -> None:
    assert table(frame, "who", "Gender").forms == tuple(str(form) for form in PromptForm.all())


def test_a_toys_tracks_are_all_four() -> None:
    sizes = {track: len(clips) for track, clips in toy_tracks("toy/qwen2-audio").items()}
    assert sizes == {track: len(toy_clips("toy/qwen2-audio", track)) for track in TRACKS}


@pytest.mark.parametrize("place", ["", "data"], ids=["the folder of the tracks", "SAKURA"])
def test_the_tracks_that_are_there_are_read(tmp_path: Path, place: str) -> None:
    write_sakura(tmp_path / place / "Gender", "file,attribute_label\na.wav,male\n")
    assert {track: len(clips) for track, clips in sakura_tracks(tmp_path).items()} == {"Gender": 1}


def test_a_folder_without_any_track_is_refused_with_those_that_are_looked_for(tmp_path: Path) -> None:
    message = f"{tmp_path}: no SAKURA track is in it or in its data/; there is none of Animal, Emotion, Gender, Lang"
    assert message in refusal(sakura_tracks, tmp_path)
