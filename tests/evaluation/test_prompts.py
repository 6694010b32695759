"""Prompt sets: the packaged one loads, digests follow what is asked, bad sets are refused."""

import pytest

from evaluation.prompts import PACKAGED, PromptError, load

SET = """name: mine
prompts:
  - {{id: one, text: a red ball, tags: [{tag}]}}
  - {{id: {second}, text: a dog, tags: [x]}}
"""


def _write(folder, tag="x", second="two"):
    (folder / "mine.yaml").write_text(SET.format(tag=tag, second=second), encoding="utf-8")
    return load("mine", folder)


@pytest.mark.parametrize("path", sorted(PACKAGED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_packaged_set_loads_under_its_own_name(path):
    found = load(path.stem)
    assert found.name == path.stem
    assert len(set(found.texts)) == len(found.texts)


def test_walk_has_eight_prompts_and_fewer_can_be_taken():
    walk = load("walk")
    assert len(walk.prompts) == 8
    three = walk.first(3)
    assert three.texts == walk.texts[:3]
    assert three.digest != walk.digest
    assert walk.first(8).digest == walk.digest
    with pytest.raises(PromptError, match="has 8 prompts, 9"):
        walk.first(9)


def test_the_digest_follows_what_is_asked_and_not_the_tags(tmp_path):
    before = _write(tmp_path)
    assert _write(tmp_path, tag="y").digest == before.digest
    assert _write(tmp_path, second="other").digest != before.digest


def test_bad_sets_are_refused(tmp_path):
    with pytest.raises(PromptError, match="known: walk"):
        load("talk")
    with pytest.raises(PromptError, match="used twice: one"):
        _write(tmp_path, second="one")
    (tmp_path / "mine.yaml").write_text("name: mine\nprompts: []\nseed: 1\n", encoding="utf-8")
    with pytest.raises(PromptError, match="not a prompt set"):
        load("mine", tmp_path)
