"""What a file of prompts may hold, and how it says no."""

import json
from pathlib import Path
from typing import Any

import pytest

from ml.diffusion.mask_strategy import MaskStrategyError
from ml.sampling.requests import Request, RequestError, read_requests


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two pictures and one more elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    for name in ("a.png", "b.png", "elsewhere/c.png"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def read(folder: Path, content: Any) -> list[Request]:
    (folder / "prompts.json").write_text(json.dumps(content), encoding="utf-8")
    return read_requests(folder / "prompts.json")


def test_a_text_and_a_mapping_say_the_same(folder: Path) -> None:
    assert read(folder, ["a cat", {"prompt": "a cat"}]) == [Request("a cat"), Request("a cat")]


def test_a_mapping_says_everything(folder: Path) -> None:
    entry = {
        "prompt": "a cat",
        "references": ["a.png", str(folder / "elsewhere" / "c.png")],
        "condition": "i2v_loop",
        "mask_strategy": "0",
    }
    references = (folder / "a.png", folder / "elsewhere" / "c.png")
    assert read(folder, [entry]) == [Request("a cat", references, "i2v_loop", "0")]


def test_the_tail_of_a_prompt_says_more_than_the_mapping(folder: Path) -> None:
    """As in 1.1: `{"reference_path": "a;b", "mask_strategy": "0"}` at the end of the text."""
    prompt = 'a cat {"reference_path": "a.png;b.png", "mask_strategy": "0;0,1,0,-1,1"}'
    entry = {"prompt": prompt, "references": ["elsewhere/c.png"], "mask_strategy": "0"}
    wanted = Request("a cat", (folder / "a.png", folder / "b.png"), None, "0;0,1,0,-1,1")
    assert read(folder, [prompt, entry]) == [wanted, wanted]
    half = {"prompt": 'a cat {"mask_strategy": "0"}', "references": ["a.png"]}
    assert read(folder, [half]) == [Request("a cat", (folder / "a.png",), None, "0")]


@pytest.mark.parametrize("content", [[], {"a": 1}, "a cat", 3, None])
def test_a_file_is_a_list(folder: Path, content: Any) -> None:
    with pytest.raises(RequestError, match="must hold a JSON list of prompts"):
        read(folder, content)


@pytest.mark.parametrize("entry", [1, None, ["a"], {}, {"prompt": 1}, {"prompt": "a", "seed": 1}, {"text": "a"}])
def test_an_entry_is_a_text_or_a_mapping_of_known_fields(folder: Path, entry: Any) -> None:
    with pytest.raises(RequestError, match="a prompt is a text, or a mapping with prompt, references"):
        read(folder, [entry])


@pytest.mark.parametrize(
    ("field", "problem"),
    [
        ({"mask_strategy": 0}, "mask_strategy is a text such as '0;0,1,0,-1,1', got 0"),
        ({"mask_strategy": None}, "mask_strategy is a text"),
        ({"references": "a.png"}, "references is a list of file names, got 'a.png'"),
        ({"references": [1]}, "references is a list of file names"),
        ({"references": None}, "references is a list of file names"),
        ({"condition": 2}, "condition is a text such as 'i2v_head', got 2"),
    ],
)
def test_a_field_of_another_type_is_named(folder: Path, field: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestError, match=f"prompt 'a cat': {problem}"):
        read(folder, [{"prompt": "a cat", **field}])


def test_a_file_that_is_not_json_or_not_there_is_named(folder: Path) -> None:
    (folder / "broken.json").write_text("[", encoding="utf-8")
    with pytest.raises(RequestError, match=r"broken\.json cannot be read"):
        read_requests(folder / "broken.json")
    with pytest.raises(RequestError, match=r"none\.json cannot be read"):
        read_requests(folder / "none.json")


def test_a_reference_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"reference .*gone\.png does not exist"):
        read(folder, [{"prompt": "a", "references": ["gone.png"]}])
    with pytest.raises(RequestError, match=r"gone\.png does not exist"):
        read(folder, ['a {"reference_path": "a.png;gone.png"}'])


@pytest.mark.parametrize(
    ("tail", "problem"),
    [("{reference", "is no JSON object"), ('{"refs": "a"}', "says refs"), ('{"mask_strategy": 0}', "must be a text")],
)
def test_a_tail_that_cannot_be_read_is_named(folder: Path, tail: str, problem: str) -> None:
    with pytest.raises(MaskStrategyError, match=problem):
        read(folder, [f"a cat {tail}"])
