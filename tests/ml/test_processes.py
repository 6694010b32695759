"""Sections of objectives and sampling: the released values hold, nonsense is refused with what to do."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from ml import processes
from ml.processes import KINDS, SAMPLED_KINDS, Objective, Sampling, ScoreText

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
