"""What an experiment measured is kept whole, and nothing that it did not measure."""
import json, subprocess, sys
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/'tools'))
import evidence


def git(tree, *args): return subprocess.run(['git', '-c', 'user.email=a@b', '-c', 'user.name=a', *args], cwd=tree, check=True, capture_output=True, text=True).stdout.strip()

def write(path, value): path.parent.mkdir(parents=True, exist_ok=True); path.write_text(json.dumps(value))

@pytest.fixture
def tree(tmp_path):
    "A repository with a main line, and with one experiment as DVC leaves it: a commit that only a reference of its own knows."
    m = tmp_path/'metrics/mini'
    for name, value in {'run.json': dict(prepare=dict(commit='old')), 'summary.json': dict(psnr=1), 'understanding.json': dict(n=1)}.items(): write(m/name, value)
    git(tmp_path, 'init', '-q', '-b', 'main'); git(tmp_path, 'add', '-A'); git(tmp_path, 'commit', '-qm', 'main line'); here = git(tmp_path, 'rev-parse', 'HEAD')
    write(m/'run.json', dict(prepare=dict(commit='old'), dcae_tuned=dict(commit=here))); write(m/'summary.json', dict(psnr=2)); write(m/'stages/dcae_tuned.json', dict(steps=9))
    (tmp_path/'plots').mkdir(); (tmp_path/'plots/loss.csv').write_text('step'); git(tmp_path, 'add', '-A'); git(tmp_path, 'commit', '-qm', 'experiment')
    git(tmp_path, 'update-ref', f'refs/exps/{here[:2]}/{here[2:]}/dcae-tuned', 'HEAD'); git(tmp_path, 'reset', '-q', '--hard', here)
    return tmp_path

def test_it_keeps_what_the_experiment_measured_and_the_records_of_its_stages(tree):
    wrote = {p.relative_to(tree/'metrics/evidence/dcae_tuned').as_posix() for p in evidence.keep('dcae_tuned', tree)}
    assert wrote == {'run.json', 'stages/dcae_tuned.json'}
    kept = lambda name: json.loads((tree/'metrics/evidence/dcae_tuned'/name).read_text())
    assert kept('stages/dcae_tuned.json') == dict(steps=9) and kept('run.json') == dict(dcae_tuned=dict(commit=git(tree, 'rev-parse', 'HEAD')))
    assert not git(tree, 'status', '--porcelain', 'metrics/mini'), 'the main line is as it was'

def test_an_experiment_on_validation_or_none_is_no_evidence(tree):
    here = git(tree, 'rev-parse', 'HEAD'); git(tree, 'update-ref', f'refs/exps/{here[:2]}/{here[2:]}/no-dtr-val', 'HEAD')
    for name in ('no_dtr', 'sana_tuned'):
        with pytest.raises(SystemExit, match=f'{name}.*--split test'): evidence.keep(name, tree)
