"""The contract between notebooks, profiles and pipelines: what a stage may be given, and what DVC must know of it."""
import ast, json, re, shutil
from pathlib import Path
import pytest
from conftest import ROOT, run
from spar.running import contract, profiles
from spar.training import notebook

PROFILES = ('mini', 'smoke', 'spar-1b', 'spar-3b')
STAGES = sorted(p.stem for p in (ROOT/'nbs/stages').glob('*.ipynb'))
BASES = sorted(p.stem for p in (ROOT/'nbs/bases').glob('*.ipynb'))
THIN = [(n, 'stages') for n in STAGES] + [(n, 'bases') for n in BASES]
TRAINED = [n for n in STAGES if re.match(r'tokenizer_\d|unified_\d|dcae_tuned|sana_tuned', n)]
EVALUATED = ('reconstruction', 'understanding', 'generation', 'editing')


@pytest.fixture(autouse=True)
def at_root(monkeypatch): monkeypatch.chdir(ROOT)

def pipeline(): return contract.stages_of()      # controls as the stages that they are in one profile

CONTROLS = ('dcae_tuned', 'sana_tuned')

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
    assert notebook.parameters(f'nbs/{kind}/{name}.ipynb'), 'exactly one cell tagged parameters, literals only'
    for c in notebook.code_cells(f'nbs/{kind}/{name}.ipynb'):
        found = [type(n).__name__ for n in ast.walk(ast.parse(notebook.python_of(c['source']))) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.For, ast.While))]
        assert not found, f'{found[0]} in a stage notebook belongs into a component notebook'

@pytest.mark.parametrize('name,kind', THIN)
def test_notebook_calls_itself_by_its_name(name, kind):
    code = '\n'.join(c['source'] for c in notebook.code_cells(f'nbs/{kind}/{name}.ipynb'))
    assert set(re.findall(r'Stage\.current\([\'"](\w+)', code)) <= {name}


def test_dependencies_cover_what_a_stage_imports_and_nothing_else(): assert contract.check_deps() == []

@pytest.mark.parametrize('stage,module,matters', [
    ('tokenizer_1_init', 'spar/unified/flow.py', False), ('tokenizer_3_encoder', 'spar/world/edits.py', False), ('dcae_tuned', 'spar/world/prompts.py', False),
    ('unified_2_joint', 'spar/running/runner.py', False), ('unified_2_joint', 'spar/tokenizer/training.py', False), ('evaluate_editing', 'spar/training/loop.py', False),
    ('tokenizer_1_init', 'spar/training/loop.py', True), ('unified_2_joint', 'spar/unified/flow.py', True), ('evaluate_editing', 'spar/world/edits.py', True)])
def test_a_stage_depends_on_what_can_change_its_result(stage, module, matters):
    assert any(contract.covers(d, module) for d in pipeline()[stage]['deps']) == matters and (module in notebook.import_closure(f'nbs/stages/{stage}.ipynb')) == matters

@pytest.mark.parametrize('name', STAGES)
def test_stage_says_all_that_it_reads_and_writes(name):
    entry = pipeline()[name]
    own, section = name in CONTROLS, {'configs/${profile}.yaml': [name]}
    assert entry['desc'] and entry['cmd'] == f'PYTHONPATH=$PWD spar stage {name}' + ' --profile ${profile}' * own
    assert entry['params'] == [section] if own else ['profile', section]
    known = {p.replace('${profile}', 'mini') for p in declared(entry, 'deps', 'outs', 'metrics', 'plots')}
    for path in paths_in(profiles.resolved(name, 'mini')):
        assert any(path == k or path.startswith(k + '/') for k in known), f'{name} uses {path}, dvc.yaml does not say so'

@pytest.mark.parametrize('name', STAGES)
def test_what_is_cached(name):
    for kind in ('outs', 'metrics'):
        for o in pipeline()[name].get(kind, []):
            path, cached = (o, True) if isinstance(o, str) else (next(iter(o)), next(iter(o.values())) != {'cache': False})
            assert path.split('/')[1] == '${profile}', 'a profile owns its folders'
            assert cached == path.startswith('artifacts/'), 'artifacts are cached, metrics and plots are in Git'
    assert 'run.json' not in str(pipeline()[name]), 'run.json is volatile'
    if name in TRAINED: assert {f'metrics/${{profile}}/stages/{name}.json', f'artifacts/${{profile}}/{name}'} <= declared(pipeline()[name], 'outs')

def test_one_metrics_file_a_dozen_keys(): assert [p for e in pipeline().values() for m in e.get('metrics', []) for p in m] == ['metrics/${profile}/summary.json']

def test_pipeline_reads_on_a_page_and_a_half():
    lines = Path('dvc.yaml').read_text().splitlines(); assert len(lines) <= 170 and max(map(len, lines)) <= 120


@pytest.mark.parametrize('profile', PROFILES)
def test_profile_has_a_section_for_every_stage(profile):
    assert sorted(set(profiles.yaml_file(f'configs/{profile}.yaml')) - {'from'}) == STAGES      # DVC asks for every one of them

@pytest.mark.parametrize('profile', PROFILES)
@pytest.mark.parametrize('name', STAGES)
def test_sections_resolve(name, profile):
    whole, given = profiles.complete(name, profile), profiles.resolved(name, profile)
    assert set(whole) == set(given) and all(profile in p.split('/')[1:2] for p in paths_in(given) if not p.startswith('data/') and p != 'metrics/evidence')      # of every profile
    
@pytest.mark.parametrize('name', STAGES)
def test_a_parameters_cell_carries_only_what_its_stage_sets(name):
    cells, whole = notebook.parameters(f'nbs/stages/{name}.ipynb'), profiles.complete(name, 'mini')
    for key in profiles.typed_parameters(f'nbs/stages/{name}.ipynb'): assert set(cells[key]) < set(whole[key]), f'{key} carries every key of its dataclass'

def nested(value, path=()):
    "The path of every dictionary in nested dictionaries that is not empty."
    if isinstance(value, dict) and value:
        yield path
        for k, v in value.items(): yield from nested(v, (*path, k))

@pytest.mark.parametrize('name', STAGES)
def test_unknown_keys_fail_at_every_depth(name, tmp_path, monkeypatch):
    whole, file = profiles.complete(name, 'smoke'), profiles.yaml_file('configs/smoke.yaml')
    typed, cells = profiles.typed_parameters(f'nbs/stages/{name}.ipynb'), notebook.parameters(f'nbs/stages/{name}.ipynb')
    for path in nested(whole):
        if path and path[0] not in typed and not cells[path[0]]: continue      # {} takes any key, what the notebook hands it to judges them
        section = {'no_such_key': 1}
        for k in reversed(path): section = {k: section}
        monkeypatch.setattr(profiles, 'sections', lambda p: file | {name: section})
        with pytest.raises(ValueError, match="'no_such_key'.*Allowed"): profiles.complete(name, 'smoke')

def test_unknown_section_stage_and_profile_fail():
    with pytest.raises(ValueError, match="tokenizer_1_init"): profiles.notebook_of('tokenizer_1_intt')
    with pytest.raises(FileNotFoundError, match='mini'): profiles.resolved('prepare', 'maxi')

def test_a_profile_from_another_says_only_what_differs():
    one, three = (profiles.resolved('unified_2_joint', p) for p in ('spar-1b', 'spar-3b'))
    assert three['train'] == one['train'] | dict(accumulate=16) and three['source'] == one['source']
    assert len(Path('configs/spar-3b.yaml').read_text().splitlines()) < 40

def test_a_circle_of_profiles_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); Path('configs').mkdir()
    for a, b in ('xy', 'yx'): Path(f'configs/{a}.yaml').write_text(f'from: {b}\n')
    with pytest.raises(ValueError, match='back to itself'): profiles.sections('x')

@pytest.mark.parametrize('profile', ['mini', 'spar-1b', 'spar-3b'])
def test_controls_train_as_long_as_what_they_are_compared_with(profile):
    for stage, expected in contract.control_steps(profile).items():
        section = profiles.complete(stage, profile)
        for key, value in expected.items():
            group, name = key.split('.'); assert section[group][name] == pytest.approx(value, rel=1e-3), f'{profile}.{stage}.{key} should be {value}'

@pytest.mark.parametrize('profile', PROFILES)
def test_a_user_edits_with_the_guidance_that_was_measured(profile):
    assert profiles.complete('assemble', profile)['image_guidance'] == profiles.complete('evaluate_editing', profile)['image_guidance']

@pytest.mark.parametrize('profile', PROFILES)
@pytest.mark.parametrize('control,beside', [('dcae_tuned', 'evaluate_reconstruction'), ('sana_tuned', 'evaluate_generation')])
def test_a_control_is_measured_as_what_it_stands_beside(profile, control, beside):
    ours, theirs = profiles.complete(beside, profile), profiles.complete(control, profile)['benchmark']
    assert theirs == {k: ours['other_images' if k == 'images' else k] for k in theirs} and 'split' in theirs

def test_the_default_pipeline_is_the_main_line_and_an_experiment_adds_a_control(tmp_path):
    "What DVC itself makes of dvc.yaml with the list of params.yaml, and with a filled one."
    assert profiles.controls() == [*CONTROLS] == [n for n, e in profiles.yaml_file('dvc.yaml')['stages'].items() if 'foreach' in e]
    for name in ('dvc.yaml', 'params.yaml', 'configs/mini.yaml'): (tmp_path/name).parent.mkdir(exist_ok=True); shutil.copy(name, tmp_path/name)
    for words in (['git', 'init', '-q'], ['dvc', 'init', '-q']): assert run(words, tmp_path).returncode == 0
    listed = lambda: {line.split()[0] for line in run(['dvc', 'stage', 'list', '--name-only'], tmp_path).stdout.splitlines()}
    assert listed() == {*STAGES} - {*CONTROLS}
    text = (tmp_path/'params.yaml').read_text(); (tmp_path/'params.yaml').write_text(text.replace('dcae_tuned: []', 'dcae_tuned: [mini]'))
    assert listed() == {*STAGES, 'dcae_tuned@mini'} - {*CONTROLS}


ABLATIONS = profiles.ablations()

@pytest.mark.parametrize('name', ABLATIONS)
def test_an_ablation_changes_something_and_is_an_experiment(name):
    changes, command = ABLATIONS[name], profiles.experiment(name, 'mini')
    assert changes and set(changes) <= set(STAGES) and command[:5] == ['dvc', 'exp', 'run', '--temp', '--name']
    assert len(command) == 6 + 2 * (len(list(profiles.leaves(changes))) + len(EVALUATED))
    for stage, section in changes.items():
        main = profiles.complete(stage, 'smoke')
        other = profiles.merged(notebook.parameters(f'nbs/stages/{stage}.ipynb'), section, name, profiles.typed_parameters(f'nbs/stages/{stage}.ipynb'))
        assert all(key in main for key in section) and other != notebook.parameters(f'nbs/stages/{stage}.ipynb'), f'{name} does not change {stage}'

def settings_of(command): return [b for a, b in zip(command, command[1:]) if a == '-S']

@pytest.mark.parametrize('name', [*ABLATIONS, 'main_line'])
def test_what_chooses_is_evaluated_on_validation_unless_it_is_said_otherwise(name):
    for split, suffix, options in (('val', '-val', {}), ('test', '', dict(split='test'))):
        command = profiles.experiment(name, 'mini', **options); found = [s for s in settings_of(command) if s.endswith(f'.split={split}')]
        assert command[5] == name.replace('_', '-') + suffix
        assert found == [f'configs/mini.yaml:+evaluate_{e}.split={split}' for e in sorted(EVALUATED)] and not [s for s in settings_of(command) if '.split=' in s and s not in found]

@pytest.mark.parametrize('name', CONTROLS)
def test_a_control_is_an_experiment_that_runs_its_stage_alone(name):
    command = profiles.experiment(name, 'mini', 'test'); assert command[-1] == f'{name}@mini'
    assert settings_of(command) == [f'configs/mini.yaml:+{name}.benchmark.split=test', f'controls.{name}=[mini]']

def test_both_tables_of_the_paper_are_covered():
    assert {'no_pixel_stream', 'no_semantic_stream', 'frozen_encoder', 'no_dtr', 'no_alignment'} <= set(ABLATIONS)
