"""Clips on request: what may be changed, what is refused, imported weights; trained ones are in tests/test_walk.py."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from assets.steps import StepError
from assets.tasks import Watch
from infra.ledger import Ledger
from infra.registry import Registry
from infra.settings import Settings
from infra.tracking import Tracker
from infra.workspace import Workspace
from ml.models.autoencoders.registry import build_autoencoder
from ml.models.networks import build_network
from ml.models.official.looks import Part
from ml.models.weights import CheckpointMismatch
from ml.recipe import Recipe, RecipeError
from ml.weights import Wish, check_weights, import_weights
from orchestration.cli import app
from orchestration.generate import Ask, changed, generate
from orchestration.session import Session


def ask(*changes: str) -> Ask:
    return Ask("a rabbit", (), changes, (7, 8))


@pytest.fixture
def small() -> Recipe:
    """1.1's tiny recipe made smaller still, whose autoencoder is imported: it reads mask strategies."""
    document = Recipe.load("v1_1", "tiny").model_dump(mode="json")
    net = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 1}
    document["autoencoder"]["net"].update(net)
    document["autoencoder"].update(weights_uri="weights/vae.safetensors", stages=[], latent={"scale": 0.5})
    document["model"].update(hidden_size=48, num_heads=2, depth=1)
    document["text"].update(max_tokens=8)
    document["sampling"].update(resolution="48x80", aspect="80:48", frames=4, steps=2, fps=12)
    document.update(stages=[], pretrained={"uri": "weights/dit.safetensors"})
    return Recipe.validate_document(document, "small")


@pytest.fixture
def session(small: Recipe, workspace: Workspace) -> Session:
    return Session(Settings(workspace=workspace.root), small, Watch())


@pytest.fixture
def bring(small: Recipe, workspace: Workspace, tracker: Tracker) -> Callable[[Part], Path]:
    """Factory `bring("transformer")`: the folder that `opensora weights import` makes of an official file."""

    def make(part: Part) -> Path:
        torch.manual_seed(3)
        network = (
            build_network(small.network) if part == "transformer" else build_autoencoder(small.autoencoder.net).net
        )
        path = workspace.root / f"{part}.safetensors"
        save_file({name: tensor.contiguous().clone() for name, tensor in network.state_dict().items()}, path)
        wish = Wish(path, small, part)
        return import_weights(wish, check_weights(wish), workspace, Registry(tracker.uri)).folder

    return make


def videos(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "videos").iterdir())


def test_changes_are_read_as_the_recipe_reads_them(tiny_recipe: Recipe) -> None:
    recipe = changed(tiny_recipe, ask("steps=3", "condition=i2v_head", 'aspect="1:1"', "flow_shift=null"))
    assert (recipe.sampling.steps, recipe.sampling.condition, recipe.sampling.aspect) == (3, "i2v_head", "1:1")
    assert recipe.sampling.flow_shift is None
    assert recipe.evaluation.seeds == (7, 8)
    assert recipe.model == tiny_recipe.model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stepps=3", "sampling.stepps: unknown key.*steps"),
        ("steps", "KEY=VALUE"),
        ("steps=[", "is not YAML"),
        ("frames=18", "18 frames cannot be encoded by hunyuan; use 17 or 21"),
        ("condition=random", "sampling.condition"),
        ("solver=ddpm", "rectified flow, which the ddpm solver does not solve"),
    ],
)
def test_what_the_recipe_refuses_is_refused(tiny_recipe: Recipe, change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        changed(tiny_recipe, ask(change))


def test_without_a_checkpoint_it_says_how_to_get_one_and_makes_nothing(tiny_recipe: Recipe, tmp_path: Path) -> None:
    session = Session(Settings(workspace=tmp_path / "w"), tiny_recipe, Watch())
    with pytest.raises(StepError, match=r"opensora demo --recipe v2_0.*--weights"):
        generate(session, ask())
    assert not (tmp_path / "w" / "generated").exists()


def test_imported_weights_are_sampled_without_any_training(
    session: Session,
    bring: Callable[[Part], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make_video: Callable[..., Path],
) -> None:
    """Twice in one second, by relative paths; the second is led by a picture beside the caller, named in the tail."""
    torch.set_num_threads(1)
    dit, vae = bring("transformer"), bring("autoencoder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    asked = Ask("waves", (), (), (7, 8), dit.relative_to(tmp_path), vae.relative_to(tmp_path))
    plain = generate(session, asked)
    assert videos(plain) == ["0-7.mp4", "0-8.mp4"]
    make_video(tmp_path / "near" / "take.mp4", frames=4)
    tail = json.dumps({"reference_path": "near/take.mp4", "mask_strategy": "0"})
    led = generate(session, replace(asked, prompt=f"waves {tail}", changes=["condition=mask"]))
    assert plain != led
    (request,) = json.loads((led / "prompts.json").read_text(encoding="utf-8"))
    assert request == {"prompt": "waves", "references": ["reference-0.mp4"], "mask_strategy": "0"}
    assert (led / "reference-0.mp4").read_bytes() == (tmp_path / "near" / "take.mp4").read_bytes()
    assert (plain / "videos" / "0-7.mp4").read_bytes() != (led / "videos" / "0-7.mp4").read_bytes()
    billed = Ledger(session.runner.tracker).rows()
    assert list(billed["purpose"]) == ["eval", "eval"]
    assert set(billed["step"]) == {f"{session.recipe.id}/generated"}
    assert (billed["cost_usd"] > 0).all()


def test_what_is_not_there_is_refused_before_a_folder_is_made(
    session: Session, bring: Callable[[Part], Path], tmp_path: Path
) -> None:
    dit = bring("transformer")
    with pytest.raises(StepError, match="v1_1/autoencoder has not been made yet"):
        generate(session, replace(ask(), weights=dit))
    with pytest.raises(CheckpointMismatch, match="holds no finished weights"):
        generate(session, replace(ask(), weights=tmp_path / "nowhere"))
    here = replace(ask(), weights=dit, autoencoder=dit)
    for absent in (replace(here, references=[Path("a.png")]), replace(here, prompt='a {"reference_path": "a.png"}')):
        with pytest.raises(RecipeError, match=r"reference a\.png does not exist in /"):
            generate(session, absent)
    assert not (session.settings.workspace / "generated").exists()


def test_the_verb_takes_weights(monkeypatch: pytest.MonkeyPatch, workspace: Workspace) -> None:
    monkeypatch.setenv("OPENSORA_WORKSPACE", str(workspace.root))
    result = CliRunner().invoke(app, ["sample", "v2_0", "--prompt", "waves", "--weights", "nowhere"])
    assert result.exit_code == 1
    assert "CheckpointMismatch" in result.output
    broken = CliRunner().invoke(app, ["sample", "v2_0", "--prompt", "waves", "--set", "steps=["])
    assert broken.exit_code == 2
    assert "is not YAML" in broken.output
