import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from ml.curation.footage import Footage
from ml.curation.scorers.registry import REGISTRY


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_a_scorer_has_a_name_a_revision_a_unit_and_gives_threads_the_same_number(name, encode, scene, tmp_path):
    scorer = REGISTRY[name]()
    footage = Footage.read(encode(tmp_path / "a.mp4", scene(1, 24)), 24, 24)
    assert scorer.name == name
    assert scorer.revision
    assert scorer.unit
    with ThreadPoolExecutor(4) as pool:
        numbers = set(pool.map(scorer.score, [footage] * 8))
    assert len(numbers) == 1
    assert math.isfinite(numbers.pop())
