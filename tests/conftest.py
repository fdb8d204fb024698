"""What the tests share: a copy of the working tree in which the pipeline can run without touching anything here."""
import os, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
SPAR = [sys.executable, '-m', 'spar']      # the command of the package under test, not of what is installed


def committed(*under: str) -> list[str]:
    "Files that a commit of the working tree would have, in these folders; what a run leaves behind and git ignores is none."
    names = subprocess.run(['git', 'ls-files', '-coz', '--exclude-standard', '--', *under], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\0')
    return [name for name in names if name and (ROOT/name).is_file()]

def clone(to: Path, profile: str = 'smoke') -> Path:
    "What `git clone` would give if the working tree were committed: tracked and new files, none of the ignored ones."
    for name in committed():
        if not name.startswith('dvcstore/'):
            (to/name).parent.mkdir(parents=True, exist_ok=True); shutil.copy2(ROOT/name, to/name)
    (to/'params.yaml').write_text(f'profile: {profile}\ncontrols: {{dcae_tuned: [], sana_tuned: []}}\n')
    for name in ('data.dvc', 'dvc.lock', 'metrics/smoke/run.json'): (to/name).unlink(missing_ok=True)
    (to/'data'/'bases').mkdir(parents=True, exist_ok=True)      # smoke makes random bases; DVC only wants the folder to be there
    subprocess.run(['git', 'init', '-q'], cwd=to, check=True)
    return to


def environment(cwd: Path, **env) -> dict:
    "This environment's commands, the package of `cwd`, one thread."
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    return {**os.environ, 'PATH': path, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(cwd), 'DVC_NO_ANALYTICS': '1', **env}

def run(cmd: list, cwd: Path, **env) -> subprocess.CompletedProcess:
    "Run a command of this environment in `cwd`; never fails by itself."
    return subprocess.run(cmd, cwd=cwd, env=environment(cwd, **env), capture_output=True, text=True)


@pytest.fixture(scope='session')
def tree(tmp_path_factory): return clone(tmp_path_factory.mktemp('clone'))


def pytest_configure(config):
    config.addinivalue_line('markers', 'smoke: runs the whole pipeline once (`-m "not smoke"` leaves it out)')
    config.addinivalue_line('markers', 'slow: left to `make test-slow`')


def pytest_collection_modifyitems(items):
    "The pipeline first: two processes share the files of tests, and it is the longest."
    items.sort(key=lambda item: not item.path.name.startswith('test_smoke'))
