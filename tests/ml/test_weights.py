"""Import and export of whole networks: real files, a real workspace, a real store."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra.registry import Registry
from infra.tracking import Tracker
from infra.workspace import Workspace
from ml.models.networks import build_network, load_network
from ml.models.official.files import OfficialError
from ml.models.weights import CheckpointMismatch, read_card
from ml.recipe import Recipe
from ml.weights import RECORD, Placed, Wish, check_weights, export_weights, import_weights, target_of

GIB = 1 << 30


@pytest.fixture(scope="session")
def recipes() -> dict[str, Recipe]:
    return {name: Recipe.load(name, "tiny") for name in ("v1_0", "v1_2", "v2_0")}


@pytest.fixture
def registry(tracker: Tracker) -> Registry:
    return Registry(tracker.uri)


def state_of(recipe: Recipe, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {name: tensor.to(dtype) for name, tensor in build_network(recipe.network).state_dict().items()}


def bring(wish: Wish, workspace: Workspace, registry: Registry) -> Placed:
    return import_weights(wish, check_weights(wish), workspace, registry)


# --- in -----------------------------------------------------------------------------------------------------------


def test_imported_weights_load_into_the_recipes_network(
    tmp_path: Path, recipes: dict[str, Recipe], workspace: Workspace, registry: Registry
) -> None:
    recipe, state = recipes["v1_2"], state_of(recipes["v1_2"])
    torch.save({"ema": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "ema.pt")
    placed = bring(Wish(tmp_path / "ema.pt", recipe, licence="Apache-2.0", url="https://a.b/c"), workspace, registry)
    assert placed.folder.parent == workspace.root / "weights"
    assert placed.folder.name.startswith("v1_2-tiny-transformer-")
    network = build_network(recipe.network)
    card = load_network(placed.folder, network, recipe.id)
    assert (card.kind, card.origin.stage) == ("stdit3", "released")
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in network.state_dict().items())


def test_weights_stay_as_precise_as_they_were_published_and_say_so(
    tmp_path: Path, recipes: dict[str, Recipe], workspace: Workspace, registry: Registry
) -> None:
    save_file(state_of(recipes["v2_0"]), tmp_path / "w.safetensors")
    placed = bring(Wish(tmp_path / "w.safetensors", recipes["v2_0"], licence="L", url="U"), workspace, registry)
    kept = load_file(placed.folder / "weights.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    record = json.loads((placed.folder / RECORD).read_text(encoding="utf-8"))
    assert record["dtypes"] == {"bfloat16": len(kept)}
    assert (record["licence"], record["url"], record["files"]) == ("L", "U", ["w.safetensors"])
    assert record["sha256"].startswith(placed.folder.name.rpartition("-")[2])


def test_an_import_is_an_external_model_with_source_digest_and_licence(
    tmp_path: Path, recipes: dict[str, Recipe], workspace: Workspace, registry: Registry
) -> None:
    from mlflow import MlflowClient

    save_file(state_of(recipes["v2_0"]), tmp_path / "w.safetensors")
    placed = bring(Wish(tmp_path / "w.safetensors", recipes["v2_0"], licence="L", url="U"), workspace, registry)
    model = MlflowClient(registry.uri, registry.uri).get_logged_model(placed.model_id)
    assert model.name == "opensora-v2_0-tiny-transformer"
    assert (model.tags["licence"], model.tags["source_url"], model.tags["source"]) == ("L", "U", "w.safetensors")
    assert model.tags["sha256"] == placed.sha256
    assert model.params["kind"] == "mmdit"


def test_the_same_import_again_changes_nothing(
    tmp_path: Path, recipes: dict[str, Recipe], workspace: Workspace, registry: Registry
) -> None:
    save_file(state_of(recipes["v2_0"]), tmp_path / "w.safetensors")
    wish = Wish(tmp_path / "w.safetensors", recipes["v2_0"])
    first = bring(wish, workspace, registry)
    written = (first.folder / "weights.safetensors").stat().st_mtime_ns
    again = bring(wish, workspace, registry)
    assert (first.reused, again.reused) == (False, True)
    assert (again.folder, again.model_id) == (first.folder, first.model_id)
    assert (first.folder / "weights.safetensors").stat().st_mtime_ns == written
    licensed = bring(Wish(tmp_path / "w.safetensors", recipes["v2_0"], licence="MIT"), workspace, registry)
    assert not licensed.reused


def test_what_has_no_source_starts_like_a_fresh_network_of_the_seed(
    tmp_path: Path, recipes: dict[str, Recipe], workspace: Workspace, registry: Registry
) -> None:
    recipe, state = recipes["v1_0"], state_of(recipes["v1_0"], torch.float32)
    spatial = {n: t for n, t in state.items() if ".attn_temp." not in n and not n.startswith("pos_embed")}
    spatial["x_embedder.proj.weight"] = spatial["x_embedder.proj.weight"][:, :, 0].contiguous()
    torch.save({"state_dict": spatial}, tmp_path / "PixArt.pth")
    placed = [
        bring(Wish(tmp_path / "PixArt.pth", recipe), Workspace(workspace.root / name), registry) for name in ("a", "b")
    ]
    made = load_file(placed[0].folder / "weights.safetensors")
    assert set(made) == set(state)
    assert torch.equal(made["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
    assert not torch.equal(made["blocks.0.attn_temp.qkv.weight"], state["blocks.0.attn_temp.qkv.weight"])
    assert not torch.equal(made["blocks.0.attn_temp.qkv.weight"], made["blocks.1.attn_temp.qkv.weight"])
    assert torch.equal(made["pos_embed"], state["pos_embed"])
    assert placed[0].sha256 == placed[1].sha256


def test_refused_weights_leave_nothing_behind(
    tmp_path: Path, recipes: dict[str, Recipe], workspace: Workspace, registry: Registry
) -> None:
    save_file(state_of(recipes["v1_2"]), tmp_path / "w.safetensors")
    with pytest.raises(OfficialError, match=r"(?s)these look like 1.2's STDiT-3; v2_0-tiny wants 2.0's.*unknown name"):
        bring(Wish(tmp_path / "w.safetensors", recipes["v2_0"]), workspace, registry)
    assert not (workspace.root / "weights").exists()


# --- autoencoders -------------------------------------------------------------------------------------------------


def test_an_autoencoder_is_normalised_as_its_weights_say(
    tmp_path: Path, recipes: dict[str, Recipe], workspace: Workspace, registry: Registry
) -> None:
    from ml.models.autoencoders.registry import build_autoencoder, load_autoencoder

    recipe = recipes["v1_2"]
    state = build_autoencoder(recipe.autoencoder.net).net.state_dict()
    channels = recipe.autoencoder.latent_channels
    state["shift"], state["scale"] = torch.full((1, channels, 1, 1, 1), 0.25), torch.full((1, channels, 1, 1, 1), 3.0)
    save_file(state, tmp_path / "vae.safetensors")
    placed = bring(Wish(tmp_path / "vae.safetensors", recipe, "autoencoder"), workspace, registry)
    loaded = load_autoencoder(placed.folder)
    assert loaded.latent.mean == (0.25,) * channels
    assert loaded.latent.std == (3.0,) * channels


def test_an_autoencoder_of_unknown_scale_is_refused(
    tmp_path: Path, recipes: dict[str, Recipe], workspace: Workspace, registry: Registry
) -> None:
    from ml.models.autoencoders.registry import build_autoencoder

    recipe = recipes["v2_0"]
    assert recipe.autoencoder.latent is None
    save_file(build_autoencoder(recipe.autoencoder.net).net.state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(OfficialError, match="does not say how latents are normalised"):
        bring(Wish(tmp_path / "vae.safetensors", recipe, "autoencoder"), workspace, registry)
    assert not (workspace.root / "weights").exists()


# --- the published sizes ------------------------------------------------------------------------------------------


def sparse(path: Path, wanted: dict[str, tuple[int, ...]], dtype: str = "BF16", size: int = 2) -> None:
    """A safetensors file of any size that takes no room: its header, and a hole."""
    table, end = {}, 0
    for name, shape in wanted.items():
        start, end = end, end + torch.Size(shape).numel() * size
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(table).encode()
    with path.open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        stream.truncate(8 + len(head) + end)


def test_11_billion_parameters_are_checked_in_seconds_and_little_memory(tmp_path: Path) -> None:
    recipe = Recipe.load("v2_0", "paper")
    wanted = dict(target_of(recipe, "transformer").wanted)
    assert sum(torch.Size(shape).numel() for shape in wanted.values()) == pytest.approx(11.89e9, rel=1e-3)
    path = tmp_path / "Open_Sora_v2.safetensors"
    sparse(path, wanted, "F32", 4)
    work = (
        f"report = check_weights(Wish(Path({str(path)!r}), Recipe.load('v2_0', 'paper'))).report\n"
        "answer = [report.fits, report.counts()]\n"
    )
    answer, seconds, peak = alone(work)
    assert answer == [True, {"used": len(wanted)}]
    assert seconds < 20.0
    assert peak < 0.6 * GIB


def test_flux_dev_is_checked_at_its_published_size(tmp_path: Path) -> None:
    """11.9 billion parameters, fused and guidance-distilled, as `flux1-dev.safetensors` has them."""
    recipe = Recipe.load("v2_0", "paper")
    width, wanted = recipe.network.hidden_size, dict(target_of(recipe, "transformer").wanted)
    flux = {n: s for n, s in wanted.items() if not any(p in n for p in ("q_proj", "k_proj", "v_proj", "v_mlp", "cond"))}
    for name, shape in wanted.items():
        if ".q_proj." in name:
            single = name.startswith("single")
            fused = (7 if single else 3) * width
            flux[name.replace("q_proj", "linear1" if single else "qkv")] = (fused, *shape[1:])
    flux |= {name.replace("time_in", "guidance_in"): shape for name, shape in wanted.items() if "time_in" in name}
    sparse(tmp_path / "flux1-dev.safetensors", flux)
    started = time.monotonic()
    report = check_weights(Wish(tmp_path / "flux1-dev.safetensors", recipe)).report
    assert report.fits, report.hint
    assert report.source == "flux"
    assert {entry.name for entry in report.having("initialised")} == {"cond_in.weight", "cond_in.bias"}
    assert len(report.having("dropped")) == 4
    assert time.monotonic() - started < 20.0


def test_a_published_file_is_not_for_the_tiny_profile(tmp_path: Path) -> None:
    sparse(tmp_path / "w.safetensors", dict(target_of(Recipe.load("v1_2", "paper"), "transformer").wanted))
    report = check_weights(Wish(tmp_path / "w.safetensors", Recipe.load("v1_2", "tiny"))).report
    assert "another size (28 deep, 1152 wide; v1_2-tiny has 3 deep, 96 wide)" in report.hint


def test_large_weights_are_written_without_holding_them(tmp_path: Path) -> None:
    """A 1.2 network of 0.6 GB: converting it takes the memory of its largest tensors, not the file's."""
    document = Recipe.load("v1_2", "paper").model_dump(mode="json")
    document["model"] |= {"depth": 6}
    recipe = Recipe.validate_document(document, "r")
    sparse(tmp_path / "w.safetensors", dict(target_of(recipe, "transformer").wanted))
    (tmp_path / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    path, out = tmp_path / "w.safetensors", tmp_path / "out"
    work = (
        f"recipe = Recipe.parse(Path({str(tmp_path / 'recipe.yaml')!r}).read_text())\n"
        f"wish = Wish(Path({str(path)!r}), recipe)\n"
        f"place(Path({str(out)!r}), wish, check_weights(wish), '')\n"
    )
    *_, peak = alone(work + "answer = None\n")
    assert (out / "weights.safetensors").stat().st_size > 0.5 * GIB
    assert peak < 0.5 * GIB  # torch and the recipe alone take 0.3


def alone(work: str) -> tuple[Any, float, int]:
    """Run Python in a process of its own: its `answer`, the seconds it took, and the most memory it had in bytes.

    The kernel's high-water mark, since `getrusage` starts a child at the memory of its parent.
    """
    script = (
        "import json, re, time\n"
        "from pathlib import Path\n"
        "from ml.recipe import Recipe\n"
        "from ml.weights import Wish, check_weights, place\n"
        f"start = time.monotonic()\n{work}"
        "peak = int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024\n"
        "print(json.dumps([answer, time.monotonic() - start, peak]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer, seconds, peak = json.loads(done.stdout)
    return answer, seconds, peak


# --- out ----------------------------------------------------------------------------------------------------------


def test_out_again_bit_for_bit(
    tmp_path: Path, recipes: dict[str, Recipe], workspace: Workspace, registry: Registry
) -> None:
    state = state_of(recipes["v2_0"])
    save_file(state, tmp_path / "w.safetensors")
    placed = bring(Wish(tmp_path / "w.safetensors", recipes["v2_0"]), workspace, registry)
    assert export_weights(placed.folder, "opensora", tmp_path / "out.safetensors") == ()
    back = load_file(tmp_path / "out.safetensors")
    assert set(back) == set(state)
    assert all(torch.equal(back[name].view(torch.uint8), state[name].view(torch.uint8)) for name in state)


def test_diffusers_reads_what_is_exported_for_it(tmp_path: Path, workspace: Workspace, registry: Registry) -> None:
    from diffusers import AutoencoderKL

    from ml.models.autoencoders.registry import build_autoencoder

    document = Recipe.load("v1_0", "tiny").model_dump(mode="json")
    document["autoencoder"]["latent"] = {"scale": 0.5}
    recipe = Recipe.validate_document(document, "r")
    ours = build_autoencoder(recipe.autoencoder.net)
    save_file(ours.net.state_dict(), tmp_path / "vae.safetensors")
    placed = bring(Wish(tmp_path / "vae.safetensors", recipe, "autoencoder"), workspace, registry)
    export_weights(placed.folder, "diffusers", tmp_path / "vae")
    theirs = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert theirs.config.scaling_factor == 0.5
    picture = torch.randn(1, 3, 32, 32).clamp(-1, 1)
    with torch.inference_mode():
        latent = theirs.encode(picture).latent_dist.mean
        torch.testing.assert_close(latent, ours.eval().posterior(picture[:, :, None])[0][:, :, 0])


@pytest.mark.parametrize(
    ("layout", "to", "why"),
    [
        ("opensora", "out.pth", "ends in .safetensors"),
        ("opensora", "folder/weights.safetensors", "is the file to export"),
        ("diffusers", "out", "no network of kind mmdit"),
    ],
)
def test_an_export_that_makes_no_sense_is_refused(
    tmp_path: Path, recipes: dict[str, Recipe], layout: Any, to: str, why: str
) -> None:
    from ml.models.networks import save_network
    from ml.models.weights import Origin

    save_network(tmp_path / "folder", build_network(recipes["v2_0"].network), Origin("v2_0-tiny", "stage1"))
    with pytest.raises(OfficialError, match=why):
        export_weights(tmp_path / "folder", layout, tmp_path / to)


def test_only_a_weights_folder_is_exported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="holds no finished weights"):
        export_weights(tmp_path, "opensora", tmp_path / "x.safetensors")


def test_trained_weights_are_exported_too(tmp_path: Path, recipes: dict[str, Recipe]) -> None:
    from ml.models.networks import save_network
    from ml.models.weights import Origin

    network = build_network(recipes["v2_0"].network)
    save_network(tmp_path / "folder", network, Origin("v2_0-tiny", "stage1"))
    notes = export_weights(tmp_path / "folder", "flux", tmp_path / "flux.safetensors")
    assert "double_blocks.0.img_attn.qkv.weight" in load_file(tmp_path / "flux.safetensors")
    assert len(notes) == 3
    assert read_card(tmp_path / "folder").kind == "mmdit"
