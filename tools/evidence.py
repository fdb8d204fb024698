"""Keep what an experiment measured: python tools/evidence.py NAME [NAME ...]

NAME is a row of configs/ablations.yaml or a control, whose experiment has run on the test set:

    eval "$(spar stage --ablation NAME --split test)"

DVC keeps an experiment as a commit of this clone alone. This copies the metrics that it changed, and the records of the
stages that it ran (machine, precision, commit), to metrics/evidence/NAME, where the report, the README and
nbs/scale/evidence.ipynb read them. Nothing is computed; commit what it wrote.
"""
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROFILE = 'mini'


def git(*args, root=ROOT) -> str:
    return subprocess.run(['git', *args], cwd=root, capture_output=True, text=True, check=True).stdout


def commit_of(name: str, root=ROOT) -> str:
    "The newest experiment of this name on the test set."
    called = name.replace('_', '-')
    refs = git('for-each-ref', '--sort=-committerdate', '--format=%(objectname)', f'refs/exps/*/*/{called}', root=root)
    if not refs:
        cure = f'`spar stage --ablation {name} --split test` prints the command.'
        raise SystemExit(f'{name}: no experiment {called!r} in this clone. {cure}')
    return refs.split()[0]


def keep(name: str, root=ROOT) -> list:  # the files it wrote
    "Copy the metrics that an experiment changed."
    commit, base = commit_of(name, root), f'metrics/{PROFILE}'
    parent = git('rev-parse', f'{commit}^', root=root).strip()
    changed = git('diff', '--name-only', parent, commit, '--', base, root=root).split()
    found = {p: json.loads(git('show', f'{commit}:{p}', root=root)) for p in changed if p.endswith('.json')}
    found.pop(f'{base}/summary.json', None)
    record = f'{base}/run.json'
    if record in found:      # only the stages that ran; the others are the main line's
        before = json.loads(git('show', f'{parent}:{record}', root=root))
        found[record] = {k: v for k, v in found[record].items() if v != before.get(k)}
    out = []
    for path, value in found.items():
        to = root / 'metrics/evidence' / name / Path(path).relative_to(base)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps(value, indent=1, sort_keys=True) + '\n')
        out.append(to)
    return out


if __name__ == '__main__':
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    for name in sys.argv[1:]:
        print(*keep(name), sep='\n')
