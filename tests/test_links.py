"""Links between notebooks and pages lead somewhere."""
import json, re
from urllib.parse import unquote
import pytest
from conftest import ROOT

PAGES = [*sorted((ROOT/'nbs').rglob('*.ipynb')), ROOT/'README.md', ROOT/'CONTRIBUTING.md']

def prose(path):
    if path.suffix == '.md': return path.read_text()
    return '\n'.join(''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown')

@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_resolve(path):
    links = re.findall(r'\]\(([^)\s#]+)[^)]*\)', prose(path))
    assert not [l for l in links if '://' not in l and not (path.parent/unquote(l)).exists()]

@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_notebooks_are_called_by_their_names(path):
    numbered = {p.stem for p in (ROOT/'nbs').rglob('*.ipynb')}
    named = re.findall(r'\b\d\d_[a-z][a-z_]+', prose(path))
    assert set(named) <= numbered
