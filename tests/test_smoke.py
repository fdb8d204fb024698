"""The whole pipeline on random backbones in a copy of the working tree, and what a user does with its result."""
import csv, json, os, re, resource, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import psutil, pytest, yaml
from PIL import Image
from safetensors.torch import load_file
from conftest import ROOT, SPAR, committed, environment, run
from spar import cli
from spar.command import main
from spar.core import file_hash
from spar.evaluation.report import control_of
from spar.pipeline import SparPipeline
from spar.images import read_image
from spar.training.checkpoints import checkpoint_steps

pytestmark = pytest.mark.smoke
CPU_SECONDS = 6 * 60      # of one core: on two the pipeline takes no longer than this

def children_cpu(): u = resource.getrusage(resource.RUSAGE_CHILDREN); return u.ru_utime + u.ru_stime

@pytest.fixture(scope='session')
def smoke(tree):
    "The clone after `dvc repro`; what it printed is in repro.log."
    before, done = children_cpu(), run(['dvc', 'repro'], tree)
    (tree/'repro.log').write_text(done.stdout + done.stderr)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (tree/'cpu').write_text(str(children_cpu() - before))
    return tree

def read(tree, name): return json.loads((tree/'metrics/smoke'/f'{name}.json').read_text())

def numbers(value):
    if isinstance(value, dict): return [n for v in value.values() for n in numbers(v)]
    return [n for v in value for n in numbers(v)] if isinstance(value, list) else [value]


def test_takes_under_six_minutes(smoke): assert float((smoke/'cpu').read_text()) < CPU_SECONDS

RECONSTRUCTION = {'psnr', 'psnr_ci', 'ssim', 'ssim_range2', 'lpips_squeeze_mini', 'n'}
KINDS = {'overall', 'existence', 'count', 'colour', 'position', 'object', 'pairs', 'riddles'}
TASKS = {'overall', 'overall_ci', 'single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr'}
TYPES = {'overall', 'overall_ci', 'add', 'adjust', 'extract', 'replace', 'remove', 'background', 'style', 'hybrid', 'action'}

def test_reconstruction_metrics(smoke):
    m = read(smoke, 'reconstruction'); rows = {'init', 'decoder', 'spar', 'dcae'}
    assert rows <= set(m['glyphs']) and rows <= set(m['photos'])
    assert all(RECONSTRUCTION | {'rfid_efflite0'} <= set(m['glyphs'][r]) for r in rows)
    assert all(RECONSTRUCTION <= set(m['photos'][r]) and 'rfid_efflite0' not in m['photos'][r] for r in rows)

def test_understanding_metrics(smoke):
    m = read(smoke, 'understanding')
    assert KINDS <= set(m['base']) and KINDS <= set(m['spar']) and {'chance', 'n'} <= set(m)
    assert all(0 <= m[who][k] <= 1 for who in ('base', 'spar') for k in KINDS)

def test_generation_metrics(smoke):
    m = read(smoke, 'generation')
    assert TASKS <= set(m['geneval_mini']) and {'overall', 'cultural', 'time', 'space', 'biology', 'physics', 'chemistry'} <= set(m['wise_mini'])
    assert {'judge_on_renders', 'judge_on_dcae', 'chance_geneval', 'chance_wise', 'sana_base'} <= set(m['rulers'])
    assert {'geneval_mini_heldout', 'n_images'} <= set(m)

RULERS = {'copy_input', 'judge_on_targets', 'judge_on_reconstructions'}

def test_editing_metrics(smoke):
    m = read(smoke, 'editing')
    assert TYPES <= set(m['imgedit_mini']) and RULERS == set(m['rulers']) == set(m['rulers_by_type']) and {'preservation', 'n'} <= set(m)
    assert all(TYPES <= set(row) and row['overall'] == m['rulers'][name] for name, row in m['rulers_by_type'].items())
    assert set(m['duties']) == RULERS | {'spar'} and all(TYPES - {'overall_ci'} == set(d[k]) for d in m['duties'].values() for k in ('done', 'preserved'))

@pytest.fixture(scope='session')
def controls(smoke):
    "The clone after both controls were trained beside the main line, as their experiments do it."
    kept = (smoke/'params.yaml').read_text()
    (smoke/'params.yaml').write_text('profile: smoke\ncontrols: {dcae_tuned: [smoke], sana_tuned: [smoke]}\n')
    done = run(['dvc', 'repro', 'dcae_tuned@smoke', 'sana_tuned@smoke'], smoke)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    yield smoke
    (smoke/'params.yaml').write_text(kept)

@pytest.mark.slow
@pytest.mark.parametrize('name,file,base', [('dcae_tuned', 'reconstruction', 'dcae'), ('sana_tuned', 'generation', 'sana')])
def test_a_control_is_measured_on_the_same_pictures_as_the_main_line(controls, name, file, base):
    control, main = read(controls, f'stages/{name}'), read(controls, file)
    said = main['protocol'] if file == 'reconstruction' else main['protocol']['rulers']
    assert control['benchmark']['protocol'] == said and control['benchmark']['base'] == main['base'] and control['equal']['train.steps'] == control['steps']
    if file == 'reconstruction': assert all(control['benchmark'][k][base] == main[k][base] for k in ('glyphs', 'photos')), 'the same row, measured twice'
    found = control_of(control, (said, main['base']), control['equal'], 'abc'); assert found.result and found.note == 'abc'
    assert not control_of(control, (said, main['base']), {'train.steps': 99}).result

def test_metrics_are_numbers_and_nothing_volatile(smoke):
    for file in (smoke/'metrics/smoke').rglob('*.json'):
        if file.name == 'run.json': continue
        text = file.read_text(); m = json.loads(text)
        assert not re.search(r'NaN|Infinity', text) and not {'seconds', 'commit', 'device', 'time'} & set(m), file
        assert all(isinstance(n, (int, float, str)) or n is None for n in numbers(m))

def test_run_json_knows_every_stage(smoke):
    m = read(smoke, 'run'); stages = set(re.findall(r"Running stage '(\w+)'", (smoke/'repro.log').read_text()))
    assert stages == set(m) == {p.stem for p in (ROOT/'nbs/stages').glob('*.ipynb')} - {'dcae_tuned', 'sana_tuned'}
    assert all({'seconds', 'peak_memory_gb', 'device', 'versions', 'commit', 'seed'} <= set(s) for s in m.values())

def test_training_is_visible_while_it_runs(smoke): assert re.search(r'tokenizer_1_init: 100%', (smoke/'repro.log').read_text())

def test_pictures_and_report_are_there(smoke):
    assert len(list((smoke/'plots/smoke').rglob('*.png'))) >= 8 and len(list((smoke/'plots/smoke').rglob('*.csv'))) >= 6
    pages = [p for p in (smoke/'artifacts/smoke/report').rglob('*.html')]
    assert pages and not re.search(r'(src|href)="https?://[^"]+\.(js|css|png)"', pages[0].read_text()), 'one self-contained file'


@pytest.mark.slow
def test_the_journey_runs(smoke):
    done = run([sys.executable, '-m', 'papermill', '-k', 'python3', 'nbs/00_journey.ipynb', 'runs/00_journey.ipynb'], smoke)
    assert done.returncode == 0, done.stderr[-3000:]

def test_second_repro_runs_nothing(smoke):
    done = run(['dvc', 'repro'], smoke)
    assert done.returncode == 0 and 'Running stage' not in done.stdout, done.stdout

def status(tree): return {k for k in json.loads(run(['dvc', 'status', '--json'], tree).stdout or '{}') if not k.endswith('.dvc')}

@pytest.fixture(scope='session')
def before(smoke):
    "What is stale before anything was changed; whoever changes a file puts it back."
    return status(smoke)

def test_prose_of_a_component_reruns_nothing_and_a_cell_reruns_its_stage(smoke, before):
    prose = smoke/'nbs/method/02_streams.ipynb'; nb = json.loads(prose.read_text())
    next(c for c in nb['cells'] if c['cell_type'] == 'markdown')['source'] = '# Other words'
    prose.write_text(json.dumps(nb)); assert status(smoke) == before
    cell = smoke/'nbs/stages/unified_3_sft.ipynb'; kept = cell.read_text(); nb = json.loads(kept)
    nb['cells'][-1]['source'] = ''.join(nb['cells'][-1]['source']) + '\n1 + 1'
    cell.write_text(json.dumps(nb))
    try: assert status(smoke) - before == {'unified_3_sft'}
    finally: cell.write_text(kept)

@pytest.fixture
def docstring(smoke):
    "Change the module's docstring and put it back."
    kept = {}
    def change(module):
        path = smoke/module; kept[path] = path.read_text()
        path.write_text(kept[path].replace('"""', '"""Reworded. ', 1))
    yield change
    for path, text in kept.items(): path.write_text(text)

TOKENIZER = {'tokenizer_1_init', 'tokenizer_2_decoder', 'tokenizer_3_encoder'}
TRAININGS = TOKENIZER | {'unified_1_connector', 'unified_2_joint', 'unified_3_sft'}

@pytest.mark.parametrize('module,stale,fresh', [
    ('spar/unified/flow.py', {'unified_1_connector', 'assemble', 'evaluate_generation'}, TOKENIZER | {'evaluate_reconstruction', 'evaluate_understanding', 'report'}),
    ('spar/world/edits.py', {'unified_2_joint', 'evaluate_editing'}, TOKENIZER),
    ('spar/running/runner.py', set(), TRAININGS | {'prepare', 'assemble', 'report'}),
    ('spar/evaluation/report.py', {'report'}, TRAININGS | {'prepare', 'assemble'}),
    ('spar/pipeline.py', {'assemble'}, TRAININGS | {'prepare'})])
def test_a_reworded_docstring_reruns_only_what_imports_it(smoke, before, docstring, module, stale, fresh):
    docstring(module); now = status(smoke) - before
    assert stale <= now and not now & fresh, now

def test_a_record_is_a_row_and_the_stage_is_as_before(smoke, monkeypatch, capsys):
    monkeypatch.chdir(smoke)
    artifact = file_hash(smoke/'artifacts/smoke/unified_2_joint')
    main(['benchmark', '--record', 'as it is', '--target', '1000'])
    assert '| 1. as it is |' in capsys.readouterr().out
    row, = json.loads((smoke/'metrics/smoke/records.json').read_text())
    assert row['accepted'] and row['stage'] == 'unified_2_joint' and len(row['minutes']) == 2
    (smoke/'metrics/smoke/records.json').unlink()
    assert file_hash(smoke/'artifacts/smoke/unified_2_joint') == artifact

def test_another_profile_leaves_the_miniature_alone(smoke):
    mini = committed('metrics/mini', 'plots/mini')
    assert len(mini) > 20 and all(file_hash(smoke/p) == file_hash(ROOT/p) for p in mini)
    assert {p.relative_to(smoke).as_posix() for f in ('metrics/mini', 'plots/mini') for p in (smoke/f).rglob('*') if p.is_file()} == {*mini}
    assert not (smoke/'artifacts/mini').exists() and not (smoke/'runs/mini').exists()

def stage(tree, name): return subprocess.Popen([*SPAR, 'stage', name], cwd=tree, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    env={**os.environ, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}', 'PYTHONPATH': str(tree), 'OMP_NUM_THREADS': '1'})

def result(tree, name): return [file_hash(tree/p) for p in (f'artifacts/smoke/{name}', f'metrics/smoke/stages/{name}.json', f'plots/smoke/{name}/loss.csv')]

def kill_tree(p):
    for q in [*psutil.Process(p.pid).children(recursive=True), psutil.Process(p.pid)]: q.send_signal(signal.SIGKILL)
    p.wait()

@pytest.mark.slow
def test_a_killed_stage_continues_to_the_same_bytes(smoke):
    name = 'tokenizer_3_encoder'; whole = result(smoke, name)
    shutil.rmtree(smoke/'runs/smoke'/name); there = lambda: [*checkpoint_steps(smoke/'runs/smoke'/name/'checkpoints')]
    p = stage(smoke, name)
    while p.poll() is None and not there(): time.sleep(.01)
    kill_tree(p); assert there() and there()[-1] < 6, 'it was killed before its end'
    p = stage(smoke, name); out = p.communicate(timeout=600)[0]
    assert p.returncode == 0 and 'Resumed at step' in out, out[-2000:]
    assert result(smoke, name) == whole and there() == [6]      # the last state stays

@pytest.mark.slow
def test_the_artifact_of_a_checkpoint_without_training(smoke):
    name = 'tokenizer_1_init'; whole = result(smoke, name)
    done = run([*SPAR, 'stage', name, '--export', 'last'], smoke); assert done.returncode == 0, done.stderr[-3000:]
    out = smoke/done.stdout.strip().splitlines()[-1]; assert out == smoke/f'runs/smoke/{name}/export/4'
    assert [file_hash(out/p) for p in ('artifact', 'metrics.json', 'plots/loss.csv')] == whole == result(smoke, name)
    none = run([*SPAR, 'stage', name, '--export', '3'], smoke); assert none.returncode == 1 and 'no checkpoint of step 3. There are: 4, or last' in none.stderr

@pytest.mark.slow
def test_a_signal_to_the_command_reaches_the_training(smoke):
    name, profile = 'tokenizer_1_init', yaml.safe_load((smoke/'configs/smoke.yaml').read_text())
    profile[name]['prepared'] = 'artifacts/smoke/prepared'; profile[name]['train'] |= dict(steps=5000, log_every=1000)
    (smoke/'configs/long.yaml').write_text(yaml.safe_dump(profile)); there = lambda: [*checkpoint_steps(smoke/'runs/long'/name/'checkpoints')]
    p = subprocess.Popen([*SPAR, 'stage', name, '--profile', 'long'], cwd=smoke, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(smoke))
    while p.poll() is None and not there(): time.sleep(.05)
    p.terminate(); out = p.communicate(timeout=120)[0]
    assert p.returncode == 1 and (m := re.search(r'paused at step (\d+) of 5000', out)), out[-3000:]
    assert there() == [int(m[1])]

@pytest.mark.slow
def test_the_second_pass_of_tokenizer_3_is_at_twice_the_side_and_the_unified_model_starts_from_it(smoke):
    smoked = yaml.safe_load((smoke/'configs/smoke.yaml').read_text())
    inputs = dict(prepared='artifacts/smoke/prepared')      # everything else goes to the profile's own folders
    smoked['tokenizer_3_encoder'] |= dict(inputs, tokenizer_in='artifacts/smoke/tokenizer_2_decoder', finer=dict(side=128, loss=dict(gan_start=0.), train=dict(steps=3, lr='3e-4', lr_end=1e-5)))
    smoked['unified_1_connector'] |= inputs
    (smoke/'configs/finer.yaml').write_text(yaml.safe_dump(smoked))
    for stage in ('tokenizer_3_encoder', 'unified_1_connector'): assert (done := run([*SPAR, 'stage', stage, '--profile', 'finer'], smoke)).returncode == 0, done.stderr[-3000:]
    side = lambda folder: json.loads((smoke/folder/'config.json').read_text())['cfg']['side']
    assert side('artifacts/smoke/tokenizer_3_encoder') == 64 and side('artifacts/finer/tokenizer_3_encoder') == 128
    rows = list(csv.DictReader(open(smoke/'plots/finer/tokenizer_3_encoder/finer.csv')))
    assert rows[-1]['step'] == '3' and all(r['L_GAN'] for r in rows)          # the adversary is there from the start
    assert (smoke/'artifacts/finer/unified_1_connector').is_dir()
    assert [*checkpoint_steps(smoke/'runs/finer/tokenizer_3_encoder/finer/checkpoints')] == [3]

@pytest.mark.slow
def test_the_control_learns_from_a_corpus_with_its_text_encoder_at_rest(smoke):
    smoked = yaml.safe_load((smoke/'configs/smoke.yaml').read_text()); name = 'sana_tuned'
    smoked[name] |= dict(prepared='artifacts/smoke/prepared', train_text_encoder=False,
                         source=dict(side=64, sources=dict(captions=dict(path='corpora/captions', task='caption'))))
    (smoke/'configs/corpus.yaml').write_text(yaml.safe_dump(smoked))
    for cmd in ([*SPAR, 'data', 'pack', 'world:captions', 'corpora/captions', '--count', '24', '--per-shard', '8'], [*SPAR, 'stage', name, '--profile', 'corpus']):
        assert (done := run(cmd, smoke)).returncode == 0, done.stderr[-3000:]
    bases = json.loads((smoke/'artifacts/smoke/prepared/backbones.json').read_text())
    of = lambda folder, part: load_file(next((smoke/folder/part).glob('*.safetensors')))
    before, after = (of(f, 'text_encoder') for f in (bases['sana'], f'artifacts/corpus/{name}')); assert all(before[k].equal(v.to(before[k].dtype)) for k, v in after.items())
    before, after = (of(f, 'transformer') for f in (bases['sana'], f'artifacts/corpus/{name}')); assert any(not before[k].equal(v.to(before[k].dtype)) for k, v in after.items())

@pytest.mark.slow
def test_the_same_stage_twice_gives_the_same_bytes(smoke):
    name = 'unified_2_joint'; once = result(smoke, name)
    p = stage(smoke, name); out = p.communicate(timeout=600)[0]
    assert p.returncode == 0, out[-2000:]
    assert result(smoke, name) == once

def test_a_failing_stage_says_why_on_one_screen(smoke, tmp_path):
    kept = (smoke/'configs/smoke.yaml').read_text()
    try:
        (smoke/'configs/smoke.yaml').write_text(kept.replace('bases: random', 'bases: data/bases'))
        done = run([*SPAR, 'stage', 'prepare'], smoke); out = done.stdout + done.stderr
        assert done.returncode == 1 and 'data/bases' in out and 'dvc pull data.dvc' in out and len(out.splitlines()) < 40, out
    finally: (smoke/'configs/smoke.yaml').write_text(kept)


@pytest.fixture(scope='session')
def pipe(smoke): return SparPipeline.from_pretrained(smoke/'artifacts/smoke/pipeline', 'cpu')

def odd_pictures(folder):
    "A dozen kinds of picture files that people have."
    g = np.random.default_rng(0); rgb = Image.fromarray(g.integers(0, 255, (50, 70, 3), np.uint8)); exif = Image.Exif(); exif[0x0112] = 6
    rgb.quantize(16).save(folder/'palette.png'); rgb.save(folder/'plain.jpg', exif=exif); rgb.convert('CMYK').save(folder/'cmyk.jpg', exif=exif)
    Image.fromarray(g.integers(0, 65535, (50, 70), np.uint16)).save(folder/'grey16.tif'); Image.fromarray(g.random((50, 70), np.float32)).save(folder/'float.tif')
    rgb.convert('RGBA').save(folder/'alpha.png'); rgb.convert('LA').save(folder/'la.png'); rgb.convert('1').save(folder/'bits.png'); rgb.convert('L').save(folder/'grey.bmp')
    rgb.save(folder/'film.gif', save_all=True, append_images=[rgb.rotate(90)]); rgb.crop((0, 0, 1, 1)).save(folder/'dot.png'); rgb.resize((3, 900)).save(folder/'thin.webp')
    return sorted(folder.iterdir())

def test_every_kind_of_picture_passes(pipe, tmp_path):
    files = odd_pictures(tmp_path); out = pipe.reconstruct(files)
    assert [im.size for im in out.images] == [(64, 64)] * len(files) and all(im.mode == 'RGB' for im in out.images)
    assert all(any(f.name in note for note in out.notes) for f in files), 'each says what was done to it'
    assert read_image(tmp_path/'plain.jpg').image.size == (50, 70), 'upright'

@pytest.mark.parametrize('name', ['nowhere.png', 'text.png', 'cut.jpg', 'empty.png', 'huge.png', 'folder'])
def test_bad_pictures_give_one_line(pipe, smoke, tmp_path, name):
    Image.new('RGB', (80, 80), 'red').save(tmp_path/'ok.jpg'); (tmp_path/'cut.jpg').write_bytes((tmp_path/'ok.jpg').read_bytes()[:300])
    (tmp_path/'text.png').write_text('hello'); (tmp_path/'empty.png').write_bytes(b''); (tmp_path/'folder').mkdir(); Image.new('1', (20000, 9000)).save(tmp_path/'huge.png')
    with pytest.raises((ValueError, OSError), match=name): pipe.reconstruct(tmp_path/name)

@pytest.mark.parametrize('prompt,says', [('', 'empty'), ('   ', 'empty'), ('red ' * 200, '200 words'), ('a red staar', "'staar'.*star.*spar words"), ('a red \N{SNOWMAN}', '\N{SNOWMAN}'), ('<IMG_CONTEXT>', 'special token')])
def test_bad_prompts_give_one_line(smoke, prompt, says, capsys, tmp_path, pipe, monkeypatch):
    monkeypatch.setattr(cli, 'loaded', None); folder = str(smoke/'artifacts/smoke/pipeline')      # nothing is loaded
    with pytest.raises(SystemExit, match=says): main(['generate', prompt, '--model', folder, '--out', str(tmp_path/'x.png')])

def test_commands(smoke, pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, 'loaded', lambda *args: pipe); monkeypatch.chdir(smoke); a, b = tmp_path/'a.png', tmp_path/'b.png'
    main(['generate', 'a red star', '--out', str(a), '--steps', '2', '--num', '2']); main(['edit', str(a), 'remove the star', '--steps', '2', '--out', str(b)])
    main(['reconstruct', str(a), '--out', str(b)]); main(['answer', str(a), 'how many stars are there'])
    assert a.exists() and b.exists() and (tmp_path/'a-1.png').exists() and 'wrote' in capsys.readouterr().out
    main(['words', '--model', str(smoke/'artifacts/smoke/pipeline')]); assert 'star' in capsys.readouterr().out.split()

def test_generate_from_the_shell_twice_is_the_same_picture(smoke):
    pictures, before = [], children_cpu()
    for name in ('one.png', 'two.png'):
        done = run([*SPAR, 'generate', 'a red star left of a blue heart on a white background', '--out', name], smoke)
        assert done.returncode == 0, done.stderr
        pictures.append(Image.open(smoke/name).tobytes())
    assert pictures[0] == pictures[1] and (children_cpu() - before) / 2 < 20

def test_no_model_names_the_command(tmp_path):
    with pytest.raises(SystemExit, match='make repro'): main(['generate', 'a red star', '--model', str(tmp_path/'none'), '--out', str(tmp_path/'x.png')])
