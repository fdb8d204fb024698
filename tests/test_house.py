"""The sizes and directions that keep the house in order; `python tools/house.py` prints them."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tools'))
import house  # noqa: E402


@pytest.fixture(scope='module')
def table():
    return house.measure(dvc=False)


@pytest.mark.parametrize('key', house.LIMITS)
def test_stays_within_its_limit(table, key):
    assert table[key] <= house.LIMITS[key], '\n'.join(house.details())


def test_metrics_fit_a_screen(tmp_path):
    columns = house.columns_of_metrics()
    assert columns is not None and columns <= 120


@pytest.mark.parametrize('source,n', [('a = 1; b = 2', 1), ('if a: b = 1', 0), ('if a: b = 1; c = 2', 1), ('def f(x): return x', 0), ('x = 1\ny = 2', 0)])
def test_a_crowded_line_is_seen(source, n):
    assert house.crowded(source) == n


def test_circles_and_arrows_are_seen(tmp_path):
    (tmp_path / 'spar/world').mkdir(parents=True)
    for name, text in {'core': 'from .world.a import x', 'world/a': 'from .b import y', 'world/b': 'def f():\n    from spar.world import a'}.items():
        (tmp_path / f'spar/{name}.py').write_text(text)
    known = house.modules(tmp_path)
    graph = {name: house.imports(name, path, known) for name, path in known.items()}
    assert graph == {'core': {'world.a'}, 'world.a': {'world.b'}, 'world.b': {'world.a'}}
    assert house.circles(graph) == [('world.a', 'world.b')]
