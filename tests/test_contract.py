"""The contract between notebooks, profiles and pipelines: what a stage may be given, and what DVC must know of it."""
import ast, json, re
from pathlib import Path
import pytest, yaml
from conftest import ROOT
from spar.running import runner
from spar.training import stage as stages

PROFILES = ('mini', 'smoke', 'spar-1b', 'spar-3b')
STAGES = sorted(p.stem for p in (ROOT/'nbs/stages').glob('*.ipynb'))
BASES = sorted(p.stem for p in (ROOT/'nbs/bases').glob('*.ipynb'))
THIN = [(n, 'stages') for n in STAGES] + [(n, 'bases') for n in BASES]
TRAINED = [n for n in STAGES if re.match(r'tokenizer_\d|unified_\d|dcae_tuned|sana_tuned', n)]
EVALUATED = ('reconstruction', 'understanding', 'generation', 'editing')


@pytest.fixture(autouse=True)
def at_root(monkeypatch): monkeypatch.chdir(ROOT)

def pipeline(file='dvc.yaml'): return yaml.safe_load(Path(file).read_text())['stages']

def paths_in(value):
    "All strings in nested parameters that are paths of the repository."
    if isinstance(value, dict): return [p for v in value.values() for p in paths_in(v)]
    if isinstance(value, list): return [p for v in value for p in paths_in(v)]
    return [value] if isinstance(value, str) and re.match(r'(artifacts|metrics|plots|data)/\S+$', value) else []

def declared(entry, *kinds): return {p if isinstance(p, str) else next(iter(p)) for k in kinds for p in entry.get(k, [])}


def test_every_stage_of_the_issue_is_there():
    wanted = {'prepare', 'tokenizer_1_init', 'tokenizer_2_decoder', 'tokenizer_3_encoder', 'dcae_tuned', 'unified_1_connector', 'unified_2_joint',
              'unified_3_sft', 'sana_tuned', 'assemble', 'report', *(f'evaluate_{e}' for e in EVALUATED)}
    assert set(STAGES) == wanted == set(pipeline())


@pytest.mark.parametrize('name,kind', THIN)
def test_notebook_is_thin(name, kind):
    cells = json.loads(Path(f'nbs/{kind}/{name}.ipynb').read_text())['cells']
    assert cells[0]['cell_type'] == 'raw' and 'skip_exec: true' in ''.join(cells[0]['source'])
    assert not any(c.get('outputs') for c in cells), 'stage notebooks are committed without outputs'
    assert stages.parameters(f'nbs/{kind}/{name}.ipynb'), 'exactly one cell tagged parameters, literals only'
    for c in stages.code_cells(f'nbs/{kind}/{name}.ipynb'):
        found = [type(n).__name__ for n in ast.walk(ast.parse(stages.python_of(c['source']))) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.For, ast.While))]
        assert not found, f'{found[0]} in a stage notebook belongs into a component notebook'

@pytest.mark.parametrize('name,kind', THIN)
def test_notebook_calls_itself_by_its_name(name, kind):
    code = '\n'.join(c['source'] for c in stages.code_cells(f'nbs/{kind}/{name}.ipynb'))
    assert set(re.findall(r'Stage\.current\([\'"](\w+)', code)) <= {name}


@pytest.mark.parametrize('file', ['dvc.yaml', 'bases/dvc.yaml', 'evidence/dvc.yaml'])
def test_deps_equal_the_import_closure(file):
    for key, entry in pipeline(file).items():
        body = entry.get('do') or entry
        assert list(body['deps']) == runner.with_code_deps(Path(file), entry), f'{file}: {key}: run `spar_stage --write-dvc`'

@pytest.mark.parametrize('name', STAGES)
def test_stage_says_all_that_it_reads_and_writes(name):
    entry = pipeline()[name]
    assert entry['desc'] and entry['cmd'] == f'PYTHONPATH=$PWD spar_stage {name}'
    assert entry['params'] == ['profile', {'configs/${profile}.yaml': [name]}]
    known = declared(entry, 'deps', 'outs', 'metrics', 'plots')
    for path in paths_in(runner.resolved(name, 'mini')):
        assert any(path == k or path.startswith(k + '/') for k in known), f'{name} uses {path}, dvc.yaml does not say so'

@pytest.mark.parametrize('name', STAGES)
def test_what_is_cached(name):
    entry = pipeline()[name]
    assert all(isinstance(o, str) for o in entry.get('outs', [])), 'artifacts are cached'
    for p in entry.get('metrics', []) + entry.get('plots', []): assert next(iter(p.values())) == {'cache': False}
    assert 'metrics/run.json' not in declared(entry, 'outs', 'metrics', 'deps'), 'run.json is volatile'
    if name in TRAINED: assert f'metrics/stages/{name}.json' in declared(entry, 'metrics') and f'artifacts/{name}' in declared(entry, 'outs')


@pytest.mark.parametrize('profile', PROFILES)
def test_profile_has_a_section_for_every_stage(profile):
    assert sorted(runner.yaml_file(f'configs/{profile}.yaml')) == STAGES

@pytest.mark.parametrize('profile', PROFILES)
@pytest.mark.parametrize('name', STAGES)
def test_sections_resolve(name, profile): assert runner.resolved(name, profile)

def misspelt(value, path=()):
    "Every way of adding one unknown key to a nested dictionary."
    if isinstance(value, dict) and value:
        yield path
        for k, v in value.items(): yield from misspelt(v, (*path, k))

@pytest.mark.parametrize('name', STAGES)
def test_unknown_keys_fail_at_every_depth(name):
    defaults = stages.parameters(f'nbs/stages/{name}.ipynb')
    for path in misspelt(defaults):
        section = {'no_such_key': 1}
        for k in reversed(path): section = {k: section}
        with pytest.raises(ValueError, match="'no_such_key'.*Allowed"): runner.merged(defaults, section, name)

def test_unknown_section_stage_and_profile_fail(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="tokenizer_1_init"): runner.notebook_of('tokenizer_1_intt')
    with pytest.raises(FileNotFoundError, match='mini'): runner.resolved('prepare', 'maxi')


ABLATIONS = [(g, n) for g, rows in yaml.safe_load((ROOT/'configs/ablations.yaml').read_text()).items() if g != 'chains' for n in rows]

@pytest.mark.parametrize('group,name', ABLATIONS)
def test_ablation_changes_something_and_stays_beside_the_main_line(group, name):
    changes, chain = runner.ablation_of(name)
    assert set(changes) <= set(chain) and changes
    for stage in chain:
        main, other = runner.resolved(stage, 'smoke'), runner.resolved(stage, 'smoke', ablation=name)
        plain = runner.rerouted(main, name, chain)
        assert (plain != other) == (stage in changes), f'{name} does not change {stage}'
        assert not {p for p in paths_in(other) if p.startswith(('metrics/', 'plots/')) and '/evidence/' not in p}
        if 'out' in main: assert other['out'] == f'artifacts/evidence/{name}/{stage}'

def test_both_tables_of_the_paper_are_covered():
    assert {'no_pixel_stream', 'no_semantic_stream', 'frozen_encoder', 'no_dtr', 'no_alignment'} <= {n for _, n in ABLATIONS}

@pytest.mark.parametrize('group,name', [a for a in ABLATIONS])
def test_evidence_pipeline_runs_the_chain(group, name):
    entries = pipeline('evidence/dvc.yaml')
    for stage in runner.ablation_of(name)[1]:
        body = entries[stage]['do']
        assert entries[stage]['foreach'] == f'${{{group}}}' and body['wdir'] == '..'
        assert body['cmd'] == f'PYTHONPATH=$PWD spar_stage {stage} --ablation ${{key}}'
        known = {p.replace('${key}', name) for p in declared(body, 'deps', 'outs', 'metrics', 'plots')}
        for path in paths_in(runner.resolved(stage, 'smoke', ablation=name)):
            assert any(path == k or path.startswith(k + '/') for k in known), f'evidence/dvc.yaml: {stage}@{name} uses {path}'
