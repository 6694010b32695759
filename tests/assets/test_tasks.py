"""Running steps: reuse by key, a run for every attempt, and a bill for the failed ones too."""

from dataclasses import replace
from pathlib import Path

import pytest

from assets.steps import LOCAL, Entry, Function, Step, StepError, Walk
from assets.tasks import Done, Runner, Watch, commit
from infra.compute.local import LocalLauncher
from infra.compute.task import TaskFailed
from infra.ledger import Ledger, Purpose
from infra.runs import Status, Tag
from infra.settings import Settings
from infra.tracking import Tracker, TrackingError
from infra.workspace import Workspace
from ml.entry import Call
from ml.recipe import Recipe


class Seen(Watch):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def started(self, path: str) -> None:
        self.events.append(("started", path))

    def ended(self, path: str, done: Done, seconds: float) -> None:
        self.events.append(("reused" if done.reused else "made", path))


def write(call: Call) -> None:
    (call.out / "data.txt").write_text(call.recipe.title, encoding="utf-8")
    call.finish({"lines": 1})


def fail(call: Call) -> None:
    raise ValueError("nothing will come of this")


@pytest.fixture
def runner(workspace: Workspace, tracker: Tracker) -> Runner:
    settings = Settings(workspace=workspace.root, tracking_uri=tracker.uri)
    return Runner(Walk({}, workspace), LocalLauncher(), tracker, settings, Seen())


def with_steps(runner: Runner, *steps: Step) -> Runner:
    return replace(runner, walk=Walk({step.key: step for step in steps}, runner.walk.workspace))


def step(recipe: Recipe, name: str, work: Entry | Function, **more: object) -> Step:
    return replace(Step((recipe.name, name), "g", "d", work, "eval", recipe), **more)  # type: ignore[arg-type]


def test_a_step_is_made_once_and_then_reused(runner: Runner, tiny_recipe: Recipe) -> None:
    made = step(tiny_recipe, "one", Function(write), reads=("title",))
    runner = with_steps(runner, made)
    first, second = runner.run(made), runner.run(made)
    assert (first.reused, second.reused) == (False, True)
    assert first.made.folder == second.made.folder
    assert isinstance(runner.watch, Seen)
    assert runner.watch.events == [
        ("started", "v2_0-tiny/one"),
        ("made", "v2_0-tiny/one"),
        ("reused", "v2_0-tiny/one"),
    ]
    other = replace(made, recipe=tiny_recipe.model_copy(update={"title": "Another"}))
    assert not with_steps(runner, other).run(other).reused


def test_every_in_process_attempt_is_a_closed_billed_run(runner: Runner, tiny_recipe: Recipe) -> None:
    good, bad = (step(tiny_recipe, n, Function(f)) for n, f in (("good", write), ("bad", fail)))
    runner = with_steps(runner, good, bad)
    runner.run(good)
    with pytest.raises(ValueError, match="nothing will come"):
        runner.run(bad)
    rows = Ledger(runner.tracker).rows().set_index("step")
    assert list(rows.loc["v2_0-tiny/good", ["status", "purpose"]]) == [Status.FINISHED, Purpose.EVAL]
    assert list(rows.loc["v2_0-tiny/bad", ["status", "purpose"]]) == [Status.FAILED, Purpose.FAILED]
    assert rows.loc["v2_0-tiny/bad", "intended_purpose"] == "eval"
    assert (rows["cost_usd"] > 0).all()


def test_a_step_that_spends_nothing_opens_no_run(runner: Runner, tiny_recipe: Recipe) -> None:
    free = step(tiny_recipe, "free", Function(write, billed=False))
    assert with_steps(runner, free).run(free).cost_usd == 0
    assert Ledger(runner.tracker).rows().empty


def test_a_killed_in_process_attempt_is_closed_when_the_step_runs_again(runner: Runner, tiny_recipe: Recipe) -> None:
    made = step(tiny_recipe, "one", Function(write))
    runner = with_steps(runner, made)
    key = runner.walk.key(made, "", {})
    tags = {
        Tag.STEP: "v2_0-tiny/one",
        Tag.STEP_KEY: key,
        Tag.PURPOSE: "eval",
        Tag.DEVICES: 1,
        Tag.PRICE_ROW: LOCAL.price,
    }
    lost = runner.tracker.open("opensora/v2_0-tiny", "v2_0-tiny/one", tags)
    runner.run(made)
    rows = Ledger(runner.tracker).rows().set_index("run_id")
    assert (rows.loc[lost, "status"], rows.loc[lost, "purpose"]) == (Status.KILLED, Purpose.FAILED)
    assert rows.loc[lost, "cost_usd"] > 0
    assert len(rows) == 2


def test_an_output_that_outlived_its_orchestrator_closes_its_run_as_finished(
    runner: Runner, tiny_recipe: Recipe
) -> None:
    made = step(tiny_recipe, "one", Function(write))
    runner = with_steps(runner, made)
    first = runner.run(made)
    (runner.walk.workspace.root / "steps" / made.path() / "current.json").unlink()
    key, tags = first.made.key, {Tag.PURPOSE: "eval", Tag.DEVICES: 1, Tag.PRICE_ROW: LOCAL.price}
    left = runner.tracker.open("opensora/v2_0-tiny", made.path(), {**tags, Tag.STEP: made.path(), Tag.STEP_KEY: key})
    again = runner.run(made)
    assert again.reused
    assert again.made.run_id == left
    assert set(Ledger(runner.tracker).rows()["status"]) == {Status.FINISHED}


def test_going_back_names_the_run_that_made_it(runner: Runner, tiny_recipe: Recipe) -> None:
    here = step(tiny_recipe, "one", Function(write), reads=("title",))
    there = replace(here, recipe=tiny_recipe.model_copy(update={"title": "Another"}))
    first = with_steps(runner, here).run(here)
    with_steps(runner, there).run(there)
    back = with_steps(runner, here).run(here)
    assert back.reused
    assert back.made.run_id == first.made.run_id


def test_a_failing_task_names_its_reason_and_costs(runner: Runner, tiny_recipe: Recipe) -> None:
    entry = step(tiny_recipe, "shots", Entry("ml.curate", "shots", LOCAL))
    with pytest.raises(TaskFailed, match="needs exactly one --input videos=FOLDER"):
        with_steps(runner, entry).run(entry)
    (row,) = Ledger(runner.tracker).rows().to_dict("records")
    assert (row["purpose"], row["status"]) == (Purpose.FAILED, Status.FAILED)
    assert row["cost_usd"] > 0


def test_no_run_no_spend(runner: Runner, tiny_recipe: Recipe) -> None:
    made = step(tiny_recipe, "one", Function(write))
    deaf = replace(with_steps(runner, made), tracker=Tracker("http://127.0.0.1:1"))
    with pytest.raises(TrackingError):
        deaf.run(made)
    assert not list(runner.walk.workspace.root.rglob("data.txt"))


def test_work_that_leaves_no_result_is_an_error(runner: Runner, tiny_recipe: Recipe) -> None:
    silent = step(tiny_recipe, "silent", Function(lambda call: None, billed=False))
    with pytest.raises(StepError, match=r"without a result\.json"):
        with_steps(runner, silent).run(silent)


def test_the_commit_of_the_code_is_known() -> None:
    assert commit() != "unknown" or not (Path(__file__).parents[2] / ".git").exists()


def test_a_training_starts_its_processes_and_comes_back_as_its_stage_says(runner: Runner, tiny_recipe: Recipe) -> None:
    document = tiny_recipe.model_dump(mode="json")
    document["stages"][0]["compute"].update(processes=2, nodes=3)
    document["stages"][0]["survival"].update(retries=5)
    recipe = Recipe.validate_document(document, "changed")
    for op, module, expected in (("stage", "ml.train", (2, 5)), ("samples", "ml.sample", (1, None))):
        work = Entry(module, op, recipe.stages[0].compute)
        made = step(recipe, "dit_stage1", work, options={"stage": "stage1"})
        (out := runner.walk.workspace.root / op).mkdir()
        task = runner._task(made, work, "", out, {"latents": (out,)})
        assert (task.processes, task.retries) == expected
        assert f"latents={out}" in task.arguments
        assert "stage=stage1" in task.arguments


def test_only_tasks_run_outside_the_walk(runner: Runner, tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(StepError, match="only a task runs outside the walk"):
        runner.once(step(tiny_recipe, "one", Function(write)), tmp_path, {})
