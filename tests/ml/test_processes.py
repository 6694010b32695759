"""Sections of objectives and sampling: the released values hold, nonsense is refused with what to do."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from ml import processes
from ml.processes import KINDS, SAMPLED_KINDS, Objective, Sampling, ScoreText
from ml.recipe import Recipe, RecipeError

FLOW = {"kind": "rectified_flow", "law": "v2_0", "sigma_min": 1e-5, "shift": {"kind": "linear"}, "drop_context": 0.3}
AREA = {"kind": "area", "law": "v1_3"}
SAMPLING = {"steps": 50, "guidance_text": 7.5, "resolution": "256px", "aspect": "16:9", "frames": 17, "fps": 24}


def objective(**changes: Any) -> Any:
    """An objective section as a recipe would give it."""
    return TypeAdapter(Objective).validate_python({**FLOW, **changes})


def test_the_kind_chooses_the_class_and_released_values_are_the_defaults() -> None:
    iddpm = TypeAdapter(Objective).validate_python({"kind": "iddpm"})
    assert isinstance(iddpm, processes.IDDPM)
    assert (iddpm.num_timesteps, iddpm.beta_start, iddpm.beta_end, iddpm.learn_sigma) == (1000, 1e-4, 0.02, True)
    shift = objective().shift
    assert (shift.min_tokens, shift.max_tokens, shift.min_alpha, shift.max_alpha) == (256, 4096, 1.0, 3.0)
    flow = objective(law="v1_3", sigma_min=0, shift=AREA, drop_given={}, augmentation={})
    dropped = flow.drop_given
    assert (dropped.nothing, dropped.text, dropped.given, dropped.both) == (0.85, 0.05, 0.05, 0.05)
    assert flow.augmentation.spatial_factors.count(8) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"law": "v1_2"}, "shift of kind 'area'"),
        ({"shift": AREA}, "shift of kind 'linear'"),
        ({"law": "v1_3", "shift": AREA}, "sigma_min is of law v2_0"),
        ({"drop_given": {}}, "drop_given: only law v1_3"),
        ({"condition_noise": [0.3, 0.1]}, "runs from low to high"),
    ],
)
def test_generations_are_not_mixed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        objective(**changes)
    with pytest.raises(ValidationError, match="sum to 1"):
        processes.DropGiven(nothing=0.9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "dpm_solver", "guided_channels": 3}, "guides all channels"),
        ({"solver": "dpm_solver", "steps": 1}, "needs 2 steps"),
        ({"solver": "dpm_solver", "condition": "mask"}, "takes no given frames"),
        ({"solver": "ddpm", "flaw_fix": True, "ramp": True}, "flaw_fix, ramp: of rectified flow"),
        ({"condition": "i2v"}, "condition"),
        ({"score": {"aesthetic": 6.5}}, "style is none"),
        ({"score": {"style": "v2_0", "camera": "pan left"}}, "leave aesthetic and camera out"),
        ({"score": {"style": "v1_2", "motion": "fair"}}, "must be a number"),
    ],
)
def test_sampling_refuses_what_contradicts_itself(changes: dict[str, Any], message: str) -> None:
    assert Sampling(**SAMPLING).condition == "t2v"
    with pytest.raises(ValidationError, match=message):
        Sampling(**{**SAMPLING, **changes})


def test_a_solver_belongs_to_its_process() -> None:
    ddpm, euler = Sampling(**{**SAMPLING, "solver": "ddpm"}), Sampling(**SAMPLING)
    processes.check_solver(processes.IDDPM(), ddpm)
    processes.check_solver(objective(), euler)
    with pytest.raises(ValueError, match="use ddpm or dpm_solver"):
        processes.check_solver(processes.IDDPM(), euler)
    with pytest.raises(ValueError, match="use euler"):
        processes.check_solver(objective(), ddpm)


def test_kinds_of_every_conditioning() -> None:
    assert set(KINDS) == set(SAMPLED_KINDS) == {"none", "mask", "embed", "channels"}
    assert all(kinds[0] == "t2v" for kinds in KINDS.values())
    assert len(KINDS["mask"]) == 11
    assert {"v2v_head_noisy", "other"} <= set(KINDS["embed"]) - set(KINDS["channels"])
    assert {"v2v_head_easy", "v2v_tail_easy"} <= set(KINDS["channels"])
    assert ScoreText().style == "none"


# --- with the rest of a recipe ------------------------------------------------------------------------------------


def small(name: str) -> dict[str, Any]:
    """The document of a packaged recipe in its smallest profile."""
    return Recipe.load(name, "tiny").model_dump(mode="json")


def refusal(document: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.validate_document(document, "mine.yaml")
    return str(caught.value)


def overlaid(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    return {**base, **{k: overlaid(base[k], v) if isinstance(v, dict) and base.get(k) else v for k, v in over.items()}}


FLOW_1_3 = {"kind": "rectified_flow", "law": "v1_3", "shift": {"kind": "area", "law": "v1_3"}, "drop_context": 0.1}
NOISE = {"kind": "iddpm"}


@pytest.mark.parametrize(
    ("name", "over", "problem"),
    [
        ("v1_0", {"model": {"pred_sigma": False}}, "objective.learn_sigma: stdit gives no variance"),
        ("v1_1", {"objective": {"learn_sigma": False}}, "model.pred_sigma: gives a variance that learn_sigma false"),
        ("v1_0", {"sampling": {"steps": 1001}}, "sampling.steps: 1001 of the 1000 that are trained"),
        ("v1_2", {"sampling": {"ramp": True, "guidance_image": 2.0}}, "sampling: ramp, guidance_image of 1.3 and 2.0"),
        ("v1_2", {"sampling": {"sdedit": True}}, "sampling: sdedit of 1.3 and 2.0, without effect for stdit3"),
        ("v1_0", {"sampling": {"guidance_image": 3.0}}, "sampling: guidance_image of 1.3 and 2.0"),
        ("v1_2", {"sampling": {"aspect": "16x9"}}, "sampling: aspect '16x9' is unknown; known: 2.39:1, "),
        ("v2_0", {"model": {"guidance_embed": True}}, "guidance-distilled network is sampled, not trained"),
        ("v2_0", {"sampling": {"loops": 2}}, "sampling.loops: mmdit makes 1, not 2, as its network is told by kind"),
        ("v1_0", {"sampling": {"loops": 3}}, "sampling.loops: stdit makes 1, not 3, as it makes whole clips only"),
        ("v1_3", {"sampling": {"loops": 2}}, "sampling.loops: stdit3 makes 1, not 2"),
        ("v1_2", {"sampling": {"loops": 2}}, "sampling.loop_latents: 5 of a clip's 5 latent frames leave nothing"),
        (
            "v1_2",
            {"sampling": {"loops": 2, "loop_latents": 4, "align": 5}},
            "sampling.loop_latents: 4 is no multiple of sampling.align 5",
        ),
        (
            "v1_3",
            {"sampling": {"loops": 2, "loop_latents": 7, "condition": "mask", "frames": 33}},
            "sampling.loop_latents: opensora_v1_3 encodes no clip to 7 latent frames",
        ),
        ("v1_2", {"autoencoder": {"net": {"micro_frame_size": 9}}}, "micro_frame_size: 9; lengths count on 17"),
        ("v1_3", {"autoencoder": {"net": {"micro_frame_size": None}}}, "micro_frame_size: None; lengths count on 17"),
        ("v1_3", {"autoencoder": {"net": {"temporal_overlap": False}}}, "temporal_overlap: lengths count on windows"),
        (
            "v1_2",
            {"autoencoder": {"net": {"temporal_downsample": [False, False, True]}}},
            "temporal_downsample: must halve time twice",
        ),
    ],
)
def test_settings_that_the_generation_does_not_have_are_refused(name: str, over: dict[str, Any], problem: str) -> None:
    assert problem in refusal(overlaid(small(name), over))


@pytest.mark.parametrize(
    ("name", "objective", "problem"),
    [
        ("v2_0", FLOW_1_3, "objective.law: v1_3 tells the network times that mmdit does not know; use v2_0"),
        ("v1_3", "v2_0", "objective.law: v2_0 tells the network times that stdit3 does not know; use v1_2 or v1_3"),
        ("v2_0", NOISE, "objective: iddpm shows no given latents, which mmdit takes; use rectified_flow"),
        ("v1_3", NOISE, "objective: iddpm shows no given latents, which stdit3 takes"),
    ],
)
def test_a_network_learns_an_objective_of_its_own_kind(name: str, objective: Any, problem: str) -> None:
    document = small(name)
    document["objective"] = small(objective)["objective"] if isinstance(objective, str) else objective
    assert problem in refusal(document)


def test_loops_that_can_be_followed_load() -> None:
    """1.2 by its network, 1.3 by condition mask; a guidance-distilled network as it was released."""
    for name, sampling in (
        ("v1_2", {"loops": 2, "loop_latents": 5, "align": 5, "frames": 34}),
        ("v1_1", {"loops": 3, "loop_latents": 4}),
        ("v1_3", {"loops": 2, "loop_latents": 5, "condition": "mask", "frames": 33}),
        ("v1_2", {"loops": 2, "loop_latents": 0}),
    ):
        assert Recipe.validate_document(overlaid(small(name), {"sampling": sampling}), "r").sampling.loops > 1
    released = small("v2_0") | {"stages": [], "pretrained": {"uri": "weights/flux.safetensors", "source": "flux"}}
    assert Recipe.validate_document(overlaid(released, {"model": {"guidance_embed": True}}), "r").stages == ()
