"""What installing asks for, what importing costs, and whether the wheel draws where nothing else is installed."""
import ast
import importlib.metadata as metadata
import json
import os
import re
import subprocess
import sys
import venv
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import environment, ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ('train', 'scale', 'demo', 'dev')
# imported here, but installed by the distribution behind the arrow
COMES_WITH = {
    'tokenizers': 'transformers', 'IPython': 'ipykernel', 'nbclient': 'nbconvert', 'nbformat': 'nbconvert',
    'traitlets': 'ipykernel', 'packaging': 'transformers', 'huggingface_hub': 'transformers',
}
# declared, but used otherwise than by an import
USED_AS = {
    'dvc': 'the command', 'dvclive': 'a tracker that a profile may name', 'ipykernel': 'the kernel of stages',
    'jupyterlab': 'the command', 'pytest-xdist': 'an option of pytest', 'ruff': 'the command', 'mypy': 'the command', 'pre-commit': 'the command',
    'scipy': "transformers' Mask2Former, which GenEval's judge is", 'torch-fidelity': "torchmetrics' Inception",
}


def declared() -> dict:
    "Where -> names of distributions, from settings.ini; '' is what everybody gets."
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    lists = {'': ini['DEFAULT']['requirements']} | {e: ini['DEFAULT'][f'{e}_requirements'] for e in EXTRAS}
    return {k: {canonicalize_name(Requirement(r).name) for r in v.split()} for k, v in lists.items()}


def tops(source: str) -> set:
    "Packages that a piece of Python imports, without the standard library's."
    code = '\n'.join(line for line in source.splitlines() if not line.lstrip().startswith(('%', '!')))
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {a.name.split('.')[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split('.')[0])
    return {f for f in found if f not in sys.stdlib_module_names}


def imported() -> set:
    "Packages that anything in the repository imports: notebooks, tests, tools."
    own = {'spar'} | {p.stem for d in ('tests', 'tools') for p in (ROOT / d).glob('*.py')}
    found = set()
    for path in sorted((ROOT / 'nbs').rglob('*.ipynb')):
        cells = json.loads(path.read_text())['cells']
        found |= set().union(*(tops(''.join(c['source'])) for c in cells if c['cell_type'] == 'code'))
    for path in [*ROOT.glob('tests/*.py'), *ROOT.glob('tools/*.py')]:
        found |= tops(path.read_text())
    return found - own


def distributions(package: str) -> set:
    "The distributions that install a package."
    names = metadata.packages_distributions().get(package, [package])
    return {canonicalize_name(n) for n in [COMES_WITH.get(package), *names] if n}


def test_what_is_imported_is_declared():
    known = set().union(*declared().values())
    missing = sorted(p for p in imported() if not distributions(p) & known)
    assert not missing, f'imported, but in no list of settings.ini: {missing}'


def test_what_is_declared_is_used():
    used = set().union(*map(distributions, imported())) | USED_AS.keys()
    idle = {where or 'requirements': sorted(names - used) for where, names in declared().items()}
    assert not any(idle.values()), f'declared, but imported nowhere: {idle}'
    assert USED_AS.keys() <= set().union(*declared().values())


def test_every_requirement_has_an_exact_version():
    lines = (ROOT / 'constraints.txt').read_text().splitlines()
    pinned = {canonicalize_name(line.split('==')[0]) for line in lines if '==' in line}
    assert not set().union(*declared().values()) - pinned
    weights = [line for line in (ROOT / 'weights.txt').read_text().splitlines() if not line.startswith('#')]
    assert len(weights) == 1 and re.search(r'==[\d.]+ --hash=sha256:[0-9a-f]{64}$', weights[0])
    assert weights[0].split()[0] in lines


# ---- what `import spar.pipeline` costs

# None of it may be loaded. transformers and diffusers load scipy, accelerate and torchvision themselves where they are
# installed; that spar does not is shown by the second list, which counts only imports that a module of spar makes
# (torchvision is not in it: spar.core looks where it lies, to declare its operators), and by the wheel below.
NEVER = [
    'datasets', 'dvc', 'dvclive', 'ipykernel', 'IPython', 'ipywidgets', 'jupyter_client', 'jupyter_core', 'jupyterlab',
    'lpips', 'matplotlib', 'nbconvert', 'nbdev', 'nbformat', 'pandas', 'papermill', 'pyarrow', 'pytest', 'skimage',
    'sklearn', 'tensorboard', 'timm', 'torch_fidelity', 'torchmetrics', 'webdataset',
]
NOT_BY_SPAR = [*NEVER, 'accelerate', 'scipy', 'tqdm', 'yaml']

COST = '''
import json, sys, time
never, not_by_spar, statements, module = json.loads(sys.argv[1])
seen = {}

class Watch:
    "Notes which module is the first to ask for a package."
    def find_spec(self, name, path=None, target=None):
        top, frame = name.split('.')[0], sys._getframe(1)
        while frame and 'importlib' in frame.f_code.co_filename: frame = frame.f_back
        if top in not_by_spar and frame: seen.setdefault(top, frame.f_globals.get('__name__', '?'))

sys.meta_path.insert(0, Watch())
import torch
start = time.process_time()
import spar.core                       # before transformers, as everywhere
own = time.process_time() - start
for statement in statements: exec(statement)
start = time.process_time()
__import__(module)
own += time.process_time() - start
loaded = sorted(n for n in never if n in sys.modules)
by_spar = {k: v for k, v in seen.items() if v.split('.')[0] == 'spar'}
print(json.dumps(dict(seconds=own, loaded=loaded, by_spar=by_spar)))
'''
THEIRS = ('torch', 'transformers', 'diffusers', 'tokenizers', 'safetensors', 'numpy', 'PIL')


def reached(module: str) -> list:
    "Modules of spar that importing one of them loads, by their import statements outside of functions."
    todo, seen = [module], []
    while todo:
        name = todo.pop()
        path = ROOT / (name.replace('.', '/') + '.py')
        if name in seen or not path.is_file():
            continue
        seen.append(name)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                above = name.split('.')[: -node.level] if node.level else []
                todo.append('.'.join(above + ([node.module] if node.module else [])))
    return seen


def their_imports(module: str) -> list:
    "The statements by which spar imports what it cannot do without."
    found = set()
    for name in reached(module):
        for node in ast.parse((ROOT / (name.replace('.', '/') + '.py')).read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, 'module', None) or '']
            if isinstance(node, (ast.Import, ast.ImportFrom)) and names[0].split('.')[0] in THEIRS:
                if isinstance(node, ast.Import) or not node.level:
                    found.add(ast.unparse(node))
    return sorted(found)


def cost(module: str, statements: list) -> dict:
    args = [sys.executable, '-c', COST, json.dumps([NEVER, NOT_BY_SPAR, statements, module])]
    done = subprocess.run(args, cwd=ROOT, env=environment(ROOT), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_pipeline_is_cheap():
    statements = their_imports('spar.pipeline')
    assert any('diffusers' in s for s in statements) and any('transformers' in s for s in statements)
    found = cost('spar.pipeline', statements)
    print(f"spar.pipeline over what it needs: {found['seconds']:.2f} s")
    assert not found['loaded'] and not found['by_spar'], found
    assert found['seconds'] <= .5, found


def test_the_watch_sees_what_it_should():
    assert {'matplotlib'} <= cost('spar.figures', [])['by_spar'].keys()
    assert 'matplotlib' in cost('spar.figures', [])['loaded']


def test_importing_spar_loads_nothing_else():
    code = "import sys; before = set(sys.modules); import spar; print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment(ROOT), capture_output=True, text=True)
    assert done.stdout.strip() == "['spar']", done


# ---- the wheel

def closure(names) -> dict:
    "Name -> distribution, for these and all that they require."
    found, todo = {}, [Requirement(n) for n in names]
    while todo:
        r = todo.pop()
        if canonicalize_name(r.name) in found:
            continue
        dist = found[canonicalize_name(r.name)] = metadata.distribution(r.name)
        needed = [Requirement(q) for q in dist.requires or []]
        todo += [q for q in needed if q.marker is None or any(q.marker.evaluate({'extra': e}) for e in (r.extras or {''}))]
    return found


def expose(dist: metadata.Distribution, site: Path):
    "Links a distribution's files into another site-packages; folders that several share are made and filled."
    for file in dist.files:
        if '..' in file.parts or '__pycache__' in file.parts:
            continue
        target = site / file
        if not target.exists() and Path(dist.locate_file(file)).exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(Path(dist.locate_file(file)).resolve())


@pytest.fixture(scope='module')
def empty(tmp_path_factory):
    "The Python of an environment outside the repository: the wheel of this tree, what it requires, and nothing else."
    where = tmp_path_factory.mktemp('elsewhere')
    wheel = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-index', '--no-build-isolation']
    source = where / 'source'
    names = subprocess.run(['git', 'ls-files', '-coz', '--exclude-standard', 'spar', '*.in', '*.ini', '*.txt', '*.md', 'LICENSE', 'setup.py'],
                           cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\0')
    for name in filter(None, names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    clean = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PIP_FIND_LINKS')}
    subprocess.run([*wheel, '-w', where, source], cwd=where, env=clean, check=True)
    venv.create(where / 'env', with_pip=False, symlinks=True)
    python = where / 'env/bin/python'
    site = Path(subprocess.run([python, '-c', 'import sysconfig; print(sysconfig.get_paths()["purelib"])'], env=clean, capture_output=True, text=True, check=True).stdout.strip())
    built = next(where.glob('spar-*.whl'))
    for dist in closure(f'{n}' for n in declared()['']).values():
        expose(dist, site)
    # without --no-deps: pip itself has to agree that every requirement is there
    subprocess.run([sys.executable, '-m', 'pip', '--python', python, 'install', '-q', '--no-index', built], cwd=where, env=clean, check=True)
    return python, clean


DRAW = '''
import sys
from importlib.util import find_spec
from pathlib import Path
from spar import SparPipeline
import spar
assert Path(spar.__file__).is_relative_to(sys.prefix), spar.__file__
pipe = SparPipeline.from_pretrained(sys.argv[1], 'cpu', 'no')
pipe('a red star', num_inference_steps=2).images[0].save(sys.argv[2])
print([n for n in sys.argv[3:] if find_spec(n)])
'''


@pytest.mark.slow
def test_the_wheel_draws_where_nothing_else_is_installed(empty, tmp_path):
    from PIL import Image
    from spar import SparPipeline
    from spar.world.prompts import vocabulary
    from tiny import tiny_pipeline
    python, clean = empty
    tiny_pipeline(vocabulary()).save_pretrained(tmp_path / 'pipe')
    here = SparPipeline.from_pretrained(tmp_path / 'pipe', 'cpu', 'no')('a red star', num_inference_steps=2).images[0]
    args = [python, '-c', DRAW, tmp_path / 'pipe', tmp_path / 'star.png', *NEVER, 'accelerate', 'scipy', 'torchvision']
    done = subprocess.run(args, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == '[]'
    assert Image.open(tmp_path / 'star.png').tobytes() == here.tobytes()


@pytest.mark.slow
def test_the_wheel_has_every_module_and_picture(empty):
    python, clean = empty
    code = 'import spar, pathlib, json; r = pathlib.Path(spar.__file__).parent; print(json.dumps(sorted(str(p.relative_to(r)) for p in r.rglob("*") if p.suffix in (".py", ".jpg", ".png"))))'
    inside = json.loads(subprocess.run([python, '-c', code], env=clean, capture_output=True, text=True, check=True).stdout)
    tracked = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', 'spar'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert inside == sorted(n.removeprefix('spar/') for n in tracked if n.endswith(('.py', '.jpg', '.png')))
