"""The vote file: appended to, read back, refused when it is not one."""

import fcntl
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.votes import Vote, VoteError, append_votes, read_votes, voter_hash, votes_file

VOTE = Vote("p1", "old", "new", "motion", "right", "me", 3.5, 1.0)


def test_votes_come_back_in_order_and_the_file_only_grows(tmp_path):
    path = votes_file(tmp_path, "v2_0-tiny")
    assert read_votes(path) == []
    append_votes(path, [VOTE])
    before = path.read_bytes()
    append_votes(path, [replace(VOTE, choice="tie", seconds=0.25), replace(VOTE, choice="left")])
    assert path.read_bytes().startswith(before)
    assert [vote.choice for vote in read_votes(path)] == ["right", "tie", "left"]
    assert [vote.preferred for vote in read_votes(path)] == ["new", "tie", "old"]


def _append(path: Path) -> None:
    for _ in range(50):
        append_votes(path, [VOTE] * 3)


def test_voters_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "votes.csv"
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(_append, [path, path]))
    assert read_votes(path) == [VOTE] * 300


def test_two_who_begin_the_file_together_write_one_header(tmp_path):
    """The second opens an empty file, waits for the lock, and finds the first one's lines in it."""
    path = tmp_path / "votes.csv"
    append_votes(tmp_path / "first.csv", [VOTE])
    with path.open("a", encoding="utf-8") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second = threading.Thread(target=append_votes, args=(path, [VOTE]))
        second.start()
        second.join(timeout=0.3)
        assert second.is_alive(), "it waits for the lock"
        first.write((tmp_path / "first.csv").read_text(encoding="utf-8"))
        first.flush()
        fcntl.flock(first, fcntl.LOCK_UN)
        second.join()
    assert read_votes(path) == [VOTE, VOTE]


@pytest.mark.parametrize("line", ["p1,old,new,motion,middle,me,3,1", "p1,old,new,motion,left,me,soon,1", "p1,old"])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "votes.csv"
    append_votes(path, [VOTE])
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    with pytest.raises(VoteError, match="line 3"):
        read_votes(path)


def test_a_pseudonym_is_stable_and_tells_nothing():
    assert voter_hash("ann") == voter_hash("ann") != voter_hash("bob")
    assert "ann" not in voter_hash("ann")
