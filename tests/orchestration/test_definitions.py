"""The definitions: complete, and the same story on every asset's page."""

from datetime import datetime
from pathlib import Path

import dagster as dg
import pytest

from infra.settings import Settings
from infra.workspace import Workspace
from ml.recipe import Recipe
from orchestration.definitions import build_definitions


@pytest.fixture
def definitions(workspace: Workspace, tiny_recipe: Recipe) -> dg.Definitions:
    return build_definitions([tiny_recipe], Settings(workspace=workspace.root))


def test_the_walk_is_one_chain_from_footage_to_bill(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    above = graph.get_ancestor_asset_keys(dg.AssetKey(["v2_0", "cost_report"]), include_self=True)
    names = {key.path[-1] for key in above}
    stages = {"dit_stage1", "dit_stage2", "dit_stage3", "vae_stage1"}
    assert {
        "sample",
        "shots",
        "clips",
        "scores",
        "curated",
        "captions",
        "dataset_version",
        "latents",
        "samples",
    } <= names
    assert stages | {"loss_report", "vbench_report", "preference_report", "reconstruction_report", "release"} <= names


def test_every_asset_tells_its_story(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.description, key
        assert node.group_name != "default", key
        assert node.owners, key
        assert node.kinds, key
        assert node.code_version, key
        assert "dagster/code_references" in node.metadata, key


def test_each_stage_stands_on_the_one_before(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    for before, after in (("dit_stage1", "dit_stage2"), ("dit_stage2", "dit_stage3")):
        assert dg.AssetKey(["v2_0", before]) in graph.get(dg.AssetKey(["v2_0", after])).parent_keys


def test_every_table_is_checked_and_the_check_blocks(definitions: dg.Definitions) -> None:
    checks = {key.asset_key.path[-1]: key for key in definitions.resolve_asset_graph().asset_check_keys}
    tables = {"sample", "shots", "clips", "scores", "curated", "captions", "dataset_version", "latents"}
    assert tables | {"cost_report"} == set(checks)
    graph = definitions.resolve_asset_graph()
    assert all(graph.get_check_spec(checks[name]).blocking for name in tables)


def test_jobs_cover_the_walk_and_nothing_spends_by_itself(definitions: dg.Definitions) -> None:
    repository = definitions.get_repository_def()
    names = {job.name for job in repository.get_all_jobs()}
    assert {f"{name}_v2_0" for name in ("curate", "walk", "train", "judge", "release")} <= names
    assert [schedule.cron_schedule for schedule in repository.schedule_defs] == ["0 3 * * 1"]
    assert all(s.default_status == dg.DefaultScheduleStatus.STOPPED for s in repository.schedule_defs)
    graph = definitions.resolve_asset_graph()
    assert not any(graph.get(key).automation_condition for key in graph.get_all_asset_keys())


def test_the_re_evaluation_asks_for_fresh_samples(definitions: dg.Definitions) -> None:
    schedule = definitions.get_repository_def().schedule_defs[0]
    context = dg.build_schedule_context(scheduled_execution_time=datetime(2026, 11, 23, 3))
    (request,) = schedule.evaluate_tick(context).run_requests or []
    assert request.tags["opensora/fresh"] == "2026-11-23T03:00"


def test_new_footage_becomes_a_partition_and_a_run(definitions: dg.Definitions, workspace: Workspace) -> None:
    repository = definitions.get_repository_def()
    sensor = repository.get_sensor_def("new_shards_v2_0")
    with dg.DagsterInstance.ephemeral() as instance:
        context = dg.build_sensor_context(instance=instance, repository_def=repository)
        nothing = sensor(context)
        assert isinstance(nothing, dg.SkipReason)
        path = workspace.shard_list("sample", "film")
        path.parent.mkdir(parents=True)
        path.write_text("path,source,licence,text\na.mp4,t,CC0-1.0,\n", encoding="utf-8")
        found = sensor(context)
        assert isinstance(found, dg.SensorResult)
        assert [request.partition_key for request in found.run_requests or []] == ["sample.film"]
        (added,) = found.dynamic_partitions_requests or []
        assert list(added.partition_keys) == ["sample.film"]
        (request,) = found.run_requests or []
        assert dg.AssetKey(["corpus", "sample"]) in (request.asset_selection or [])
        instance.add_dynamic_partitions("shards", ["sample.film"])
        again = sensor(context)
        assert isinstance(again, dg.SensorResult), "a partition that another recipe added is still not curated here"
        assert again.run_requests


@pytest.mark.filterwarnings("ignore")  # with warnings as errors Dagster would hide a parser that is broken
def test_a_string_selection_parses_beside_dvc(definitions: dg.Definitions) -> None:
    selection = dg.AssetSelection.from_string("group:v2_0_curation")
    keys = selection.resolve(definitions.resolve_asset_graph())
    assert dg.AssetKey(["v2_0", "shots"]) in keys


def test_two_recipes_stand_side_by_side(tmp_path: Path, workspace: Workspace, tiny_recipe: Recipe) -> None:
    other = tiny_recipe.model_copy(update={"name": "mine"})
    both = build_definitions([tiny_recipe, other], Settings(workspace=workspace.root))
    keys = both.resolve_asset_graph().get_all_asset_keys()
    assert {key.path[0] for key in keys} == {"corpus", "weights", "v2_0", "mine"}
