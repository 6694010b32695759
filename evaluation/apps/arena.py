"""The voting arena: two samples of one prompt side by side, blind, three questions, one vote at a time.

A Gradio page on loopback. Nothing on it says which model stands where; the two videos start together and loop together.
"""

import base64
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Protocol

from evaluation.preference import AXES, Pair, PreferenceError, plan_pairs, sample_sets
from evaluation.votes import Choice, Vote, append_votes, now, read_votes, voter_hash, votes_file
from infra.settings import Settings

ANSWERS: tuple[tuple[str, Choice], ...] = (("Left", "left"), ("About the same", "tie"), ("Right", "right"))
QUESTIONS = {
    "visual_quality": "Which one looks better?",
    "prompt_adherence": "Which one shows what the text says?",
    "motion": "Which one moves better?",
}


class Samples(Protocol):
    """A finished `samples` step, as the caller knows it."""

    @property
    def folder(self) -> Path:
        """Its output folder."""
        ...


@dataclass(frozen=True)
class Session:
    """One person at the page: a pseudonym, and how far they are."""

    voter: str
    position: int
    shown_at: float


def serve(settings: Settings, recipe_id: str, samples: Samples | None) -> None:
    """Serve the arena until it is interrupted: the newest samples against the set before them.

    Raises PreferenceError when there are not two sets of samples to compare.
    """
    pairs = open_pairs(samples.folder if samples else None, seed=len(recipe_id))
    app, styles = build(pairs, votes_file(settings.workspace, recipe_id))
    app.launch(server_name=settings.host, server_port=settings.arena_port, css=styles, show_error=True, footer_links=[])


def open_pairs(current: Path | None, seed: int) -> list[Pair]:
    """Pairs of the current samples and the newest other set of the same recipe; raises PreferenceError without one."""
    sets = sample_sets(current) if current else []
    if len(sets) < 2:
        raise PreferenceError(
            f"the arena compares two sets of samples, there is {len(sets)}: train or sample again, then vote"
        )
    return plan_pairs(sets[0], sets[1], seed)


def build(pairs: Sequence[Pair], votes: Path) -> tuple[Any, str]:
    """The Gradio application that appends to the vote file, and its style sheet."""
    import gradio as gr

    with gr.Blocks(title="Arena", analytics_enabled=False) as app:
        session = gr.State()
        heading = gr.HTML()
        stage = gr.HTML()
        answers = [gr.Radio([text for text, _ in ANSWERS], label=QUESTIONS[axis], elem_classes="ask") for axis in AXES]
        button = gr.Button("Vote and go on", variant="primary", elem_id="vote")
        shown = [session, heading, stage, *answers]
        app.load(_starter(pairs), None, shown)
        button.click(_taker(pairs, votes), [session, *answers], shown)
    return app, _STYLE


def record(pair: Pair, session: Session, answers: Sequence[str]) -> list[Vote]:
    """Votes of one page, one for every axis; raises PreferenceError when a question is open."""
    choices = dict(ANSWERS)
    if any(answer not in choices for answer in answers):
        raise PreferenceError("please answer all three questions")
    seconds = round(time.monotonic() - session.shown_at, 2)
    fixed = {"pair": pair.id, "left_model": pair.left_model, "right_model": pair.right_model, "voter": session.voter}
    return [
        Vote(**fixed, axis=axis, choice=choices[answer], seconds=seconds, at=now())
        for axis, answer in zip(AXES, answers, strict=True)
    ]


def players(pair: Pair) -> str:
    """Two looping, silent videos that start together, inside the page, so that no address gives a model away."""
    return f'<div class="pair">{_player(pair.left, "Left")}{_player(pair.right, "Right")}</div>{_REPLAY}'


def _starter(pairs: Sequence[Pair]) -> Callable[[], list[Any]]:
    def start() -> list[Any]:
        return _show(pairs, Session(voter_hash(uuid.uuid4().hex), 0, time.monotonic()))

    return start


def _taker(pairs: Sequence[Pair], votes: Path) -> Callable[..., list[Any]]:
    def take(session: Session, *answers: str) -> list[Any]:
        import gradio as gr

        if session.position >= len(pairs):
            raise gr.Error("all pairs have your vote: thank you")
        try:
            append_votes(votes, record(pairs[session.position], session, answers))
        except PreferenceError as error:
            raise gr.Error(str(error)) from error
        return _show(pairs, Session(session.voter, session.position + 1, time.monotonic()), len(read_votes(votes)))

    return take


def _show(pairs: Sequence[Pair], session: Session, num_votes: int | None = None) -> list[Any]:
    blank = [None] * len(AXES)
    if session.position >= len(pairs):
        return [session, "<h2>Thank you</h2>", f"<p>Every pair has your vote; {num_votes} in all.</p>", *blank]
    pair = pairs[session.position]
    heading = f"<p class='count'>Pair {session.position + 1} of {len(pairs)}</p><h2>{escape(pair.prompt)}</h2>"
    return [session, heading, players(pair), *blank]


def _player(path: Path, side: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    video = f'<video muted loop autoplay playsinline src="data:video/mp4;base64,{data}"></video>'
    return f"<figure>{video}<figcaption>{side}</figcaption></figure>"


_REPLAY = """<button class="replay" onclick="for (const video of document.querySelectorAll('.pair video'))
  { video.currentTime = 0; video.play(); }">Play both from the start</button>"""

_STYLE = """
.gradio-container { width: 100% !important; max-width: 960px !important; margin: 0 auto !important; }
.count { color: var(--body-text-color-subdued); margin: 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.pair figure { margin: 0; text-align: center; }
.pair video { width: 100%; border-radius: 10px; background: #000; image-rendering: auto; }
.replay { display: block; margin: .75rem auto 0; padding: .35rem 1rem; border-radius: 8px;
  border: 1px solid var(--border-color-primary); cursor: pointer; }
"""
