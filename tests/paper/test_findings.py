"""Verdicts by tables that were made for them."""

from __future__ import annotations

import pandas as pd
import pytest

from audio_lens_plugin.paper.findings import judge, pearson, published

FORMS = {"A": "open", "B": "open"}


def changes(outcome: str, values: list[float], wide: float, p: float) -> pd.DataFrame:
    """By how much layers 1, 2, ... lie above the last one."""
    line = {"form": "open", "outcome": outcome, "samples": 20, "p": p, "p_of_all": p}
    table = pd.DataFrame({"layer": range(1, len(values) + 1), "change": values})
    return table.assign(low=table["change"] - wide, high=table["change"] + wide, **line)


def tables(
    success: tuple[float, ...] = (-0.8, -0.2),
    failure: tuple[float, ...] = (0.1, 0.5),
    rises: float = 0.01,
    falls: float = 0.01,
    r: tuple[float, float] = (-0.6, 0.01),
    share: tuple[float, float, float] = (0.1, 0.0, 0.2),
    loss: tuple[float, float] = (-0.3, 0.01),
    gain: tuple[float, float, float, float] = (0.1, 0.05, 0.15, 0.01),
    layers: tuple[float, float] = (1, 4),
) -> dict[str, pd.DataFrame]:
    both = [changes("success", list(success), 0.05, rises), changes("failure", list(failure), 0.05, falls)]
    shares = {"form": "open", "span": "attribute", **dict(zip(("share", "low", "high"), share, strict=True))}
    window = {"queries": "last", "keys": "audio", "cut": "keys", "layer": 2}
    names = ("gain", "gain_low", "gain_high", "p_of_all", "source", "target")
    of_track = {
        "changes": pd.concat(both),
        "attribute_share": pd.DataFrame([shares]),
        "knockout": pd.DataFrame([{**window, "probability": loss[0], "p_of_all": loss[1]}]),
        "enhancement": pd.DataFrame([dict(zip(names, (*gain, *layers), strict=True))]),
    }
    found = {name: pd.concat([table.assign(track=track) for track in FORMS]) for name, table in of_track.items()}
    correlation = {"of": "track x form", "measure": "pearson", "value": r[0], "p": r[1], "points": 24}
    return found | {"correlation": pd.DataFrame([correlation])}


def verdicts(**numbers: tuple[float, ...] | float) -> list[str]:
    return [one.verdict for one in judge(tables(**numbers), FORMS)]  # type: ignore[arg-type]


def test_a_model_of_which_everything_holds() -> None:
    assert verdicts() == ["held"] * 6


@pytest.mark.parametrize(
    ("place", "numbers", "verdict"),
    [
        (0, {"success": (0.2, -0.8)}, "did not hold"),
        (0, {"success": (-0.02, -0.8)}, "cannot be told"),
        (0, {"success": (-0.8, -0.2), "rises": 0.2}, "cannot be told"),
        (1, {"failure": (-0.3, -0.1)}, "did not hold"),
        (1, {"failure": (0.1, 0.5), "falls": 0.2}, "cannot be told"),
        (2, {"r": (0.6, 0.01)}, "did not hold"),
        (2, {"r": (-0.6, 0.2)}, "cannot be told"),
        (3, {"share": (0.8, 0.7, 0.9)}, "did not hold"),
        (3, {"share": (0.4, 0.1, 0.7)}, "cannot be told"),
        (4, {"loss": (-0.3, 0.2)}, "cannot be told"),
        (4, {"loss": (0.3, 0.01)}, "cannot be told"),
        (5, {"gain": (-0.1, -0.2, -0.05, 0.01)}, "did not hold"),
        (5, {"gain": (0.0, 0.0, 0.0, 1.0)}, "cannot be told"),
        (5, {"gain": (0.1, 0.05, 0.15, 0.2)}, "cannot be told"),
        (5, {"layers": (4, 1)}, "cannot be told"),
    ],
)
def test_what_changes_a_verdict(place: int, numbers: dict[str, tuple[float, ...] | float], verdict: str) -> None:
    found = verdicts(**numbers)
    assert found[place] == verdict
    assert [one for at, one in enumerate(found) if at != place] == ["held"] * 5


def test_without_wrong_answers_it_cannot_be_told_whether_they_fall() -> None:
    right = tables()
    right["changes"] = right["changes"].query("outcome == 'success'")
    found = judge(right, FORMS)
    assert [one.verdict for one in found] == ["held", "cannot be told", *["held"] * 4]
    assert found[1].tracks["clips"].tolist() == [0, 0]


def test_tracks_that_disagree_leave_it_open() -> None:
    mixed = tables()
    mixed["attribute_share"].loc[mixed["attribute_share"]["track"] == "B", ["share", "low", "high"]] = (0.8, 0.7, 0.9)
    assert judge(mixed, FORMS)[3].verdict == "cannot be told"


def test_a_judgement_tells_its_numbers_track_by_track() -> None:
    judgements = judge(tables(), FORMS)
    rises, falls, correlates, little, reads, enhances = judgements
    assert rises.here == "held for 2 of 2 tracks"
    assert rises.tracks.to_dict("records")[1] == {
        "track": "B",
        "here": "held",
        "clips": 20,
        "p(true label) at the end minus after block 1": "+0.80 (+0.75 to +0.85)",
        "p": "0.01",
    }
    assert falls.tracks.loc[0].tolist() == ["A", "held", 20, "+0.50 (+0.45 to +0.55)", "2", "0.01"]
    assert correlates.here == "Pearson's r of critical layer and accuracy is -0.60 (p = 0.01, 24 points)"
    assert correlates.tracks.empty
    assert little.tracks["share of the information at the last position"].tolist() == ["0.10 (0.00 to 0.20)"] * 2
    assert reads.tracks.loc[
        0, ["largest change of p(truth)", "without", "around layer", "p of all windows"]
    ].tolist() == [*("-0.30", "last → audio", "2", "0.01")]
    assert enhances.tracks["gain in accuracy on held-out clips"].tolist() == ["+0.10 (+0.05 to +0.15)"] * 2


def test_tracks_are_counted_by_what_became_of_them() -> None:
    mixed = tables()
    mixed["attribute_share"].loc[mixed["attribute_share"]["track"] == "B", ["share", "low", "high"]] = (0.8, 0.7, 0.9)
    assert judge(mixed, FORMS)[3].here == "held for 1 of 2 tracks, did not hold for 1"
    assert judge(tables(), {"A": "open"})[3].here == "held for 1 of 1 track"
    assert judge(tables(), {"A": "reversed"} | FORMS)[3].verdict == "held"
    mixed["attribute_share"] = mixed["attribute_share"].iloc[:0]
    without = judge(mixed, FORMS)[3]
    assert (without.verdict, without.here) == ("cannot be told", "no track has these numbers")


def test_a_window_that_surely_costs_goes_before_one_that_costs_more() -> None:
    found = tables()
    unsure = found["knockout"].assign(layer=5, probability=-0.4, p_of_all=0.3)
    found["knockout"] = pd.concat([found["knockout"], unsure])
    reads = judge(found, FORMS)[4]
    assert reads.verdict == "held"
    assert reads.tracks["largest change of p(truth)"].tolist() == ["-0.30", "-0.30"]


def test_a_correlation_that_does_not_exist_is_said() -> None:
    line = pd.Series({"value": float("nan"), "p": float("nan"), "points": 2})
    assert pearson(line) == "no correlation of critical layer and accuracy can be computed from 2 points"


def test_known_cautions_stand_by_their_findings() -> None:
    _, _, correlates, _, reads, _ = judge(tables(), FORMS)
    assert 'Forms without "is" read the labels a word too early' not in correlates.rule, "there are no others"
    assert 'Forms without "is" read the labels a word too early' in judge(tables(), {"A": "open+is"})[2].rule
    assert "it may cost more than the cut" in reads.rule


def test_published_numbers_are_found_by_the_models_name() -> None:
    assert published("Qwen/Qwen2-Audio-7B-Instruct")["Animal"] == 0.888
    assert published("DeSTA-ntu/DeSTA2-8B-beta")["Gender"] == 0.884
    assert published("mistralai/Voxtral-Mini-3B-2507") == {}
    assert published("toy/qwen2-audio") == {}, "a toy is not the model"
