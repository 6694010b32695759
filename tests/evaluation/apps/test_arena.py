"""The arena: two sets are needed, the page is blind, three answers make three votes, a click is written down."""

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from evaluation.apps.arena import Session, build, open_pairs, players, record, serve
from evaluation.preference import AXES, Pair, PreferenceError
from evaluation.votes import read_votes
from infra.settings import Settings


def _samples(folder: Path) -> Path:
    (folder / "videos").mkdir(parents=True)
    (folder / "videos" / "0-0.mp4").write_bytes(folder.name.encode())
    row = {"prompt": "a <dog>", "prompt_index": 0, "seed": 0, "path": "videos/0-0.mp4"}
    pd.DataFrame([row]).to_parquet(folder / "samples.parquet")
    (folder / "result.json").touch()
    return folder


@pytest.fixture
def pair(tmp_path) -> Pair:
    (made,) = open_pairs(_samples(_samples(tmp_path / "secret_old").parent / "secret_new"), seed=1)
    return made


def test_one_set_of_samples_is_not_enough(tmp_path):
    @dataclass(frozen=True)
    class Made:
        folder: Path

    with pytest.raises(PreferenceError, match="there is 0"):
        open_pairs(None, 0)
    with pytest.raises(PreferenceError, match="there is 1"):
        serve(Settings(workspace=tmp_path), "v2_0-tiny", Made(_samples(tmp_path / "only")))


def test_the_page_holds_both_videos_and_names_no_model(pair):
    page = players(pair)
    assert len(re.findall(r'src="data:video/mp4;base64,', page)) == 2
    assert "secret" not in page
    assert str(pair.left) not in page


def test_three_answers_are_three_votes_and_an_open_question_is_none(pair):
    votes = record(pair, Session("me", 0, 0.0), ["Left", "About the same", "Right"])
    assert [(vote.axis, vote.choice) for vote in votes] == list(zip(AXES, ("left", "tie", "right"), strict=True))
    assert {(vote.left_model, vote.right_model) for vote in votes} == {(pair.left_model, pair.right_model)}
    with pytest.raises(PreferenceError, match="all three"):
        record(pair, Session("me", 0, 0.0), ["Left", None, "Right"])


@pytest.mark.slow
def test_a_click_on_the_running_page_is_written_down(pair, tmp_path):
    """Slow: starts Gradio and speaks to it as a browser would."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import gradio_client

        app, _ = build([pair], tmp_path / "votes.csv")
        _, url, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
        try:
            client = gradio_client.Client(url, verbose=False, analytics_enabled=False)
            shown = client.predict(api_name="/start")
            assert "a &lt;dog&gt;" in shown[0]
            client.predict("Left", "Right", "About the same", api_name="/take")
        finally:
            app.close()
    assert [vote.choice for vote in read_votes(tmp_path / "votes.csv")] == ["left", "right", "tie"]
