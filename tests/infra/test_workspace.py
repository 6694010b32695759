"""The workspace keeps everything below one root, and a step is finished when its result is there."""

from pathlib import Path

import pytest

from infra.workspace import Workspace, WorkspaceError


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


def test_layout(space: Workspace) -> None:
    def place(path: Path) -> str:
        return path.relative_to(space.root).as_posix()

    assert place(space.corpus("sample")) == "corpora/sample"
    assert place(space.shard_list("sample", "bbb")) == "corpora/sample/shards/bbb.csv"
    assert place(space.step("v2_0-tiny/shots/live", "0123abcd")) == "steps/v2_0-tiny/shots/live/0123abcd"
    assert [place(p) for p in (space.data_repo, space.cache, space.site)] == ["data", "cache", "site"]
    assert not space.root.exists()


@pytest.mark.parametrize("name", ["..", "", "a/b", ".hidden", "a b", "/etc"])
def test_no_name_leads_out_of_the_workspace(space: Workspace, name: str) -> None:
    with pytest.raises(WorkspaceError, match="use letters"):
        space.corpus(name)
    with pytest.raises(WorkspaceError, match="use letters"):
        space.shard_list("sample", name)


@pytest.mark.parametrize("step_path", ["../shots", "v2_0-tiny//shots", "/v2_0-tiny", "v2_0-tiny/../.."])
def test_no_step_leads_out_of_the_workspace(space: Workspace, step_path: str) -> None:
    with pytest.raises(WorkspaceError, match="step path"):
        space.step(step_path, "0123abcd")


def test_shards_are_sorted_and_may_be_none(space: Workspace) -> None:
    assert space.shards("sample") == []
    for name in ("second", "first"):
        space.shard_list("sample", name).parent.mkdir(parents=True, exist_ok=True)
        space.shard_list("sample", name).write_text("path,source,licence,text\n")
    assert space.shards("sample") == ["first", "second"]


def test_manifest_paths_survive_a_move(space: Workspace, tmp_path: Path) -> None:
    clip = space.step("r/clips", "k") / "clips" / "a.mp4"
    text = space.relative(clip)
    assert text == "steps/r/clips/k/clips/a.mp4"
    assert Workspace(tmp_path / "elsewhere").resolve(text) == tmp_path / "elsewhere" / text
    assert space.resolve(text) == clip


def test_a_users_own_footage_stays_where_it_is(space: Workspace, tmp_path: Path) -> None:
    video = tmp_path / "footage" / "a.mp4"
    assert space.relative(video) == video.as_posix()
    assert space.resolve(space.relative(video)) == video


def test_a_step_is_finished_when_its_result_is_there(space: Workspace) -> None:
    folder = space.step("r/clips", "k")
    assert space.finished("r/clips", "k") is None
    folder.mkdir(parents=True)
    (folder / "clips.parquet").touch()
    assert space.finished("r/clips", "k") is None
    (folder / "result.json").write_text('{"metrics": {"clips_cut": 3}}')
    assert space.finished("r/clips", "k") == {"metrics": {"clips_cut": 3}}


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_result_says_what_to_do(space: Workspace, text: str) -> None:
    folder = space.step("r/clips", "k")
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(text)
    with pytest.raises(WorkspaceError, match="remove the file"):
        space.finished("r/clips", "k")
