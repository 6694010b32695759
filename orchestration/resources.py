"""What the settings turn into: the walk, the launcher, the tracker, and the runner that holds all three."""

from collections.abc import Iterable

from assets.autoencoder import autoencoder_steps, lpips_step
from assets.captions import caption_steps
from assets.checkpoints import checkpoint_steps
from assets.clips import clip_steps
from assets.corpus import corpus_step
from assets.costs import cost_steps
from assets.curated import curated_steps
from assets.dataset import dataset_steps
from assets.latents import latent_steps
from assets.releases import release_steps
from assets.reports import report_steps
from assets.samples import sample_steps
from assets.scores import score_steps
from assets.steps import Step, Walk
from assets.tasks import Runner
from infra.compute.local import LocalLauncher
from infra.compute.skypilot import SkyPilotLauncher
from infra.compute.task import Launcher
from infra.settings import Settings
from infra.tracking import Tracker
from ml.recipe import Recipe, user_folders


def load_recipes(settings: Settings) -> tuple[Recipe, ...]:
    """The recipes that this installation serves; raises RecipeError for one that does not hold together."""
    return tuple(Recipe.load(name, settings.profile, user_folders()) for name in settings.recipe_names)


def recipe_steps(recipe: Recipe, settings: Settings) -> list[Step]:
    """The whole walk of one recipe, from shots to dollars, in the order one would tell it."""
    return [
        *clip_steps(recipe),
        *score_steps(recipe),
        *curated_steps(recipe),
        *caption_steps(recipe),
        *dataset_steps(recipe, settings),
        *autoencoder_steps(recipe),
        *latent_steps(recipe),
        *checkpoint_steps(recipe),
        *sample_steps(recipe),
        *report_steps(recipe),
        *release_steps(recipe, settings),
        *cost_steps(recipe, settings),
    ]


def walk_of(recipes: Iterable[Recipe], settings: Settings) -> Walk:
    """Every step of the recipes, after the raw corpora and weights that they share."""
    chosen = tuple(recipes)
    corpora = dict.fromkeys(name for recipe in chosen for name in recipe.corpus.names)
    shared = [*(corpus_step(name) for name in corpora), lpips_step()]
    steps = [*shared, *(step for recipe in chosen for step in recipe_steps(recipe, settings))]
    return Walk({step.key: step for step in steps}, settings.space)


def launcher_of(settings: Settings) -> Launcher:
    """The launcher that the settings name."""
    return LocalLauncher() if settings.launcher == "local" else SkyPilotLauncher()


def runner_of(recipes: Iterable[Recipe], settings: Settings) -> Runner:
    """The runner of an installation; nothing is started and no server is asked yet."""
    walk = walk_of(recipes, settings)
    return Runner(walk, launcher_of(settings), Tracker(settings.tracking_uri), settings)
