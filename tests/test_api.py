"""What `import spar` gives: the public names, resolved when they are asked for."""
import ast, importlib, subprocess, sys
import pytest
import spar
from conftest import ROOT

@pytest.mark.parametrize('name', spar._PUBLIC)
def test_every_public_name_resolves(name):
    assert getattr(spar, name) is getattr(importlib.import_module(f'spar.{spar._PUBLIC[name]}'), name) and name in dir(spar)

def test_unknown_names_say_what_there_is():
    with pytest.raises(AttributeError, match="'Tokeniser'.*Tokenizer"): spar.Tokeniser
    from spar import figures      # a module is no public name, and imports all the same
    assert figures.save_figure

def test_import_is_free():
    code = 'import sys, spar; from spar import __version__; print([m for m in ("torch", "numpy", "transformers") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == '[]'

LATE = ('torchvision', 'transformers', 'diffusers', 'timm', 'lpips', 'torchmetrics', 'accelerate')

@pytest.mark.parametrize('path', sorted(p.relative_to(ROOT).as_posix() for p in (ROOT/'spar').rglob('*.py')))
def test_the_guard_of_torchvision_comes_first(path):
    "spar.core declares operators that torchvision may lack: a module imports it, or one of ours that does, before what imports torchvision."
    guarded = path == 'spar/core.py'
    for node in ast.parse((ROOT/path).read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level or ast.unparse(node) == 'import spar.core': guarded = True
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert guarded or not any(n.split('.')[0] in LATE for n in names), f'{path}: {names} before spar.core'
