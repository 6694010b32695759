"""The house measured: sizes, doors, floors of import, texts, mirrors, and what loading the definitions costs."""

import ast
import fnmatch
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("orchestration", "assets", "evaluation", "ml", "infra")

MAX_FUNCTION_LINES, MAX_FILE_LINES, MAX_PARAMETERS, MEDIAN_FUNCTION_LINES = 60, 400, 6, 12

# Vendor -> the modules that may import it, at any depth of the file.
DOORS = {
    "mlflow": ("infra/tracking.py", "infra/registry.py"),
    "dvc": ("infra/versioning.py",),
    "sky": ("infra/compute/skypilot.py",),
    "great_expectations": ("evaluation/expectations.py",),
    "vbench": ("evaluation/vbench*.py",),
    "gradio": ("evaluation/apps/*.py",),
    "colossalai": ("ml/engines/colossal.py",),
}
# Import times of 2 to 5 s each: inside functions only. The runner lives in VBench's own environment.
HEAVY = {*DOORS, "diffusers", "transformers"}
HEAVY_AT_TOP = {"evaluation/vbench_runner.py": {"vbench"}}
LIGHT_FOLDERS = ("infra", "assets", "orchestration", "ml/curation")
LIGHT_FILES = {
    f"ml/{name}.py"
    for name in (
        *("recipe", "section", "sections", "architectures", "processes", "reconstruction", "aspects", "shapes"),
        *("methods", "manifest", "counts", "plan", "score_text", "entry", "activations", "memory"),
    )
}

# Modules without a test of their own name, each with the place where they are tested.
DECLARED = (
    "autoencoder",
    "captions",
    "checkpoints",
    "clips",
    "corpus",
    "curated",
    "dataset",
    "latents",
    "samples",
    "scores",
)
TESTED_ELSEWHERE = {
    "ml/sections.py": "tests/ml/test_recipe.py: every validator runs when a recipe is loaded",
    "ml/models/autoencoders/opensora_v1_3_layers.py": "tests/ml/models/autoencoders/test_opensora_v1_3.py",
    "assets/reports.py": "tests/evaluation/test_judge.py, and tests/assets/test_steps.py for what makes it stale",
    "orchestration/resources.py": "tests/orchestration/test_definitions.py: the whole walk is built from it",
    "orchestration/jobs.py": "tests/orchestration/test_definitions.py: names, selections, partitions",
    "orchestration/automation.py": "tests/orchestration/test_definitions.py: schedule and sensors are evaluated",
    "orchestration/session.py": "tests/test_walk.py and tests/orchestration/test_cli.py: every verb opens one",
    **{f"assets/{name}.py": "tests/assets/test_steps.py: what each step reads and makes stale" for name in DECLARED},
}
# Tests of more than one module.
TESTS_OF_THE_WHOLE = {
    "test_house.py",
    "test_bootstrap.py",
    "test_environment.py",
    "test_walk.py",
    "orchestration/test_webserver.py",
    "ml/test_generations.py",
    "ml/engines/test_parity.py",
    "ml/training/test_faults.py",
}

CONFIGURATIONS = {"cfg", "conf", "config", "configuration", "settings", "recipe", "section", "options", "opts"}
MACHINE_FOLDERS = ("home", "root", "work", "farm", "Users")
# Written in parts, as the words below, so that this file passes its own rules.
REGISTRIES = (("pypi", "org"), ("pythonhosted", "org"), ("anaconda", "org"), ("npmjs", "org"), ("pytorch", "org/whl"))
UNFINISHED = ("TO" + "DO", "FIX" + "ME", "X" * 3, "Not" + "ImplementedError")


def test_functions_are_short() -> None:
    lengths = {f"{name}:{f.lineno} {f.name}": length(f) for name in sources() for f in functions(name)}
    assert {where: n for where, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}
    assert statistics.median(lengths.values()) <= MEDIAN_FUNCTION_LINES


def test_files_are_short() -> None:
    lengths = {name: text(name).count("\n") for name in (*sources(), *suite())}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_take_few_parameters() -> None:
    many = {f"{name}:{f.lineno} {f.name}": parameters(f) for name in sources() for f in functions(name)}
    assert {where: n for where, n in many.items() if n > MAX_PARAMETERS} == {}


@pytest.mark.parametrize("vendor", DOORS)
def test_each_vendor_has_one_door(vendor: str) -> None:
    users = {name for name in sources() if vendor in imported(tree(name))}
    assert {name for name in users if not any(fnmatch.fnmatch(name, door) for door in DOORS[vendor])} == set()


def test_heavy_libraries_are_imported_inside_functions() -> None:
    eager = {name: imported_on_load(name) & HEAVY - HEAVY_AT_TOP.get(name, set()) for name in sources()}
    assert {name: found for name, found in eager.items() if found} == {}


def test_torch_stays_out_of_what_everybody_loads() -> None:
    light = [name for name in sources() if name.startswith(LIGHT_FOLDERS) or name in LIGHT_FILES]
    assert [name for name in light if "torch" in imported_on_load(name)] == []


def test_dagster_sees_real_annotations() -> None:
    """A postponed annotation breaks `context: dg.AssetExecutionContext` at definition time."""
    both = [name for name in sources() if name.startswith(("assets/", "orchestration/"))]
    assert [name for name in both if "__future__" in imported(tree(name))] == []


def test_tests_are_no_package() -> None:
    """Other distributions install packages named `tests`; ours must never be imported, nor theirs."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    assert [name for name in (*sources(), *suite()) if "tests" in imported(tree(name))] == []


def test_every_module_has_a_mirrored_test() -> None:
    missing = {name for name in sources() if not (ROOT / mirror(name)).is_file()}
    untested = sorted(missing - set(TESTED_ELSEWHERE))
    assert not untested, "no test, and no reason on the list:\n" + "\n".join(untested)
    assert set(TESTED_ELSEWHERE) <= missing, "these have tests now, or are gone: take them off the list"


def test_every_test_mirrors_a_module() -> None:
    mirrors = {mirror(name) for name in (*sources(), *benchmarks())}
    named = [name for name in suite() if Path(name).name.startswith("test_")]
    assert [n for n in named if n not in mirrors and n.removeprefix("tests/") not in TESTS_OF_THE_WHOLE] == []


def test_configuration_is_never_asked_for_a_default() -> None:
    asked = [f"{name}:{call.lineno}" for name in sources() for call in calls(name) if asks_for_a_default(call)]
    assert asked == []


def test_no_shell_strings_and_no_pickled_weights() -> None:
    bad = [f"{name}:{call.lineno}" for name in sources() for call in calls(name) if is_dangerous(call)]
    assert bad == []


def test_nothing_is_left_open() -> None:
    words = re.compile(r"\b(" + "|".join(UNFINISHED) + r")\b")
    files = (*sources(), *suite())
    found = [f"{name}:{n} {line.strip()}" for name in files for n, line in numbered(name) if words.search(line)]
    assert found == []


def test_no_text_names_a_machine_or_a_package_registry() -> None:
    folders = rf"(?<![\w.~/:-])/({'|'.join(MACHINE_FOLDERS)})/"
    pattern = re.compile("|".join((folders, *(r"\.".join(host) for host in REGISTRIES))))
    found = [(name, number, line) for name in committed() for number, line in numbered(name) if pattern.search(line)]
    assert found == []


def test_ignored_folders_are_anchored() -> None:
    """An entry such as `data/` would also drop `ml/data` from the wheel, without a word."""
    entries = [line for line in text(".gitignore").splitlines() if line and not line.startswith("#")]
    anywhere = {"__pycache__/", "*.egg-info/", "*.pyc"}
    assert [entry for entry in entries if not entry.startswith("/") and entry not in anywhere] == []


@pytest.mark.parametrize("lock", sorted(path.name for path in (ROOT / "environments").glob("*.txt")))
def test_locks_hold_names_and_versions_only(lock: str) -> None:
    lines = [line for line in text(f"environments/{lock}").splitlines() if line and not line.startswith("#")]
    pin = re.compile(r"[A-Za-z0-9._-]+(\[[a-z0-9,_-]+\])?==[A-Za-z0-9.!]+( ?; .+)?")
    assert lines
    assert [line for line in lines if not pin.fullmatch(line)] == []


def test_definitions_load_light() -> None:
    """Dagster loads the code location in its server and in every step: 5 s of CPU, and none of the heavy libraries."""
    forbidden = {"torch", "sky", "mlflow", "dvc", "great_expectations", "vbench", "gradio"}
    script = (
        "import json, resource, sys\n"
        "from orchestration.definitions import defs\n"
        "assert defs().resolve_all_asset_specs()\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        f"loaded = sorted({forbidden!r} & set(sys.modules))\n"
        "print(json.dumps({'loaded': loaded, 'seconds': used.ru_utime + used.ru_stime}))\n"
    )
    command = [sys.executable, "-c", script]
    child = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout.splitlines()[-1])
    assert report["loaded"] == []
    assert report["seconds"] < 5.0


# --- how it is measured -------------------------------------------------------------------------------------------


@cache
def sources() -> tuple[str, ...]:
    """Every Python file of the five floors, as a path below the root."""
    return tuple(relative(path) for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py")))


@cache
def benchmarks() -> tuple[str, ...]:
    return tuple(relative(path) for path in sorted((ROOT / "benchmarks").rglob("*.py")))


@cache
def suite() -> tuple[str, ...]:
    return tuple(relative(path) for path in sorted((ROOT / "tests").rglob("*.py")))


@cache
def committed() -> tuple[str, ...]:
    """Text files that git tracks, and new ones that it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    paths = [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    return tuple(relative(path) for path in paths if b"\0" not in path.read_bytes()[:8192])


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def numbered(name: str) -> Iterator[tuple[int, str]]:
    return enumerate(text(name).splitlines(), 1)


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(text(name))


def functions(name: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def calls(name: str) -> list[ast.Call]:
    return [node for node in ast.walk(tree(name)) if isinstance(node, ast.Call)]


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def mirror(name: str) -> str:
    """Test file of a module; a package with code of its own is tested by `test_<package>.py` beside its folder."""
    path = Path("tests") / name.replace("/__init__.py", ".py")
    return path.with_name(f"test_{path.name}").as_posix()


def imported(node: ast.AST) -> set[str]:
    """Top-level packages that a piece of code imports, by statement or by name."""
    found: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            found |= {alias.name for alias in part.names}
        elif isinstance(part, ast.ImportFrom) and part.module and not part.level:
            found.add(part.module)
        elif isinstance(part, ast.Call) and called(part) in ("import_module", "__import__"):
            found |= {a.value for a in part.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name.split(".")[0] for name in found}


def imported_on_load(name: str) -> set[str]:
    """Packages imported when the module is: not in function bodies, not for type checkers only."""
    pending, found = list(tree(name).body), set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_checkers(node):
            continue
        found |= imported(node) if isinstance(node, ast.Import | ast.ImportFrom) else set()
        pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.excepthandler)]
    return found


def is_for_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def called(call: ast.Call) -> str:
    """Last name of what is called: `load` of `torch.load(...)`."""
    return ast.unparse(call.func).rsplit(".", 1)[-1]


def asks_for_a_default(call: ast.Call) -> bool:
    """`cfg.get("key")` and `getattr(cfg, "key", default)`: the schema has the defaults, not its readers."""
    if isinstance(call.func, ast.Attribute) and call.func.attr == "get":
        return ast.unparse(call.func.value).rsplit(".", 1)[-1] in CONFIGURATIONS
    if isinstance(call.func, ast.Name) and call.func.id == "getattr" and len(call.args) == 3:
        return ast.unparse(call.args[0]).rsplit(".", 1)[-1] in CONFIGURATIONS
    return False


def is_dangerous(call: ast.Call) -> bool:
    name, keywords = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
    if name == "torch.load":
        return keywords.get("weights_only") != "True"
    return name in ("os.system", "os.popen", "pickle.load", "pickle.loads") or keywords.get("shell", "False") != "False"
