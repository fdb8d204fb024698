"""The paper's two sizes: profiles, parts, checks of folders and random stand-ins. Nothing large is allocated."""
import json, os, shutil, subprocess, sys
import pytest, torch
from safetensors.torch import load_file, save_file
from spar.running.profiles import complete, yaml_file
from spar.scale.models.check import check_folders, check_part
from spar.scale.models.cost import saved_bytes, unified_cost
from spar.scale.models.parts import architecture, parts_as_text, recipe, Row, shallow, skeleton, table_of_parts
from spar.scale.models.random import gemma_like, narrow, write_dcae, write_mllm, write_sana
from spar.backbones.dcae import load_dcae
from spar.backbones.mllm import load_mllm
from spar.backbones.sana import load_sana
from conftest import ROOT

PROFILES = ('spar-1b', 'spar-3b')
STAGES = sorted(p.stem for p in (ROOT/'nbs/stages').glob('*.ipynb'))

@pytest.fixture(autouse=True)
def at_root(monkeypatch): monkeypatch.chdir(ROOT)

@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    "The three folders at toy widths, in shards, with the layout of the real ones, and their architectures."
    home = os.getcwd(); os.chdir(ROOT); place = tmp_path_factory.mktemp('toy')
    archs = narrow(recipe('spar-1b'))
    archs['dcae'] = shallow('dcae', archs['dcae'], 1)
    write_mllm(place/'mllm', archs['mllm'], 0, shard='2MB'); write_dcae(place/'dcae', archs['dcae'], 0, shard='100KB')
    write_sana(place/'sana', archs['sana'], 0, full=False, shard='100KB')
    os.chdir(home)
    return place, archs

@pytest.fixture
def damaged(toy, tmp_path):
    "damaged(part, do) -> problems of a copy of that part's folder after `do(folder)`, against the architecture itself."
    place, archs = toy
    def after(part, do, own=False):
        folder = tmp_path/part; shutil.rmtree(folder, ignore_errors=True); shutil.copytree(place/part, folder); do(folder)
        return check_part(part, folder, archs[part], own)
    return after


# profiles

@pytest.mark.parametrize('profile', PROFILES)
def test_profile_has_every_section_and_only_known_keys(profile):
    assert sorted(set(yaml_file(f'configs/{profile}.yaml')) - {'from'}) == STAGES
    for name in STAGES: assert complete(name, profile)

@pytest.mark.parametrize('profile', PROFILES)
def test_profile_says_what_the_method_says(profile):
    got = {s: complete(s, profile) for s in STAGES}
    for s in ('tokenizer_1_init', 'tokenizer_2_decoder', 'tokenizer_3_encoder'):
        t = got[s]['train']
        keys = ('steps', 'batch_size', 'lr', 'lr_end', 'warmup', 'ema', 'weight_decay')
        assert (got[s]['side'], *(t[k] for k in keys)) == (224, 100_000, 2048, 3e-4, 1e-4, 10_000, .999, 1e-4)
    assert got['tokenizer_1_init']['loss']['lambda_p'] == 1 and got['tokenizer_2_decoder']['loss']['lambda_p'] == 0
    loss = got['tokenizer_3_encoder']['loss']
    assert (loss['lambda_s'], loss['lambda_gan'], loss['gan_start'], loss['encoder_lr'], loss['lecam']) == (1, .1, .3, .1, .001)
    finer = got['tokenizer_3_encoder']['finer']      # (ref) a second pass of stage III
    again = got['tokenizer_3_encoder']['train'] | finer['train']
    rates = (again['steps'], again['batch_size'], again['lr'], float(again['lr_end']))
    assert (finer['side'], finer['loss'], *rates) == (448, dict(gan_start=0.), 100_000, 256, 3e-4, 1e-5)
    for s, batch, samples in (('unified_1_connector', 1024, 180e6), ('unified_2_joint', 1024, 255e6), ('unified_3_sft', 512, 1.215e6)):
        t = got[s]['train']
        assert (t['batch_size'], t['lr'], t['lr_end'], t['weight_decay']) == (batch, 1e-4, 1e-5, 0)
        assert abs(t['steps'] * batch - samples) < batch and t['warmup'] == round(.003 * t['steps'])
        if 'data' in t: assert abs(sum(v for v in got[s]['data'].values() if isinstance(v, float)) - 1) < 1e-9
    m = got['unified_1_connector']['model']
    c, a = m['condition'], m['alignment']
    assert (c['queries'], c['layers'], a['block'], a['hidden'], m['flow']['shift']) == (256, 6, 6, 2048, 3.0)
    for s in ('unified_2_joint', 'unified_3_sft'): assert got[s]['alignment'] == m['alignment'] and got[s]['stage']['lambda_a'] == .5

@pytest.mark.parametrize('profile', PROFILES)
def test_batches_divide_over_eight_processes(profile):
    for s in STAGES:
        t = complete(s, profile).get('train')
        for t in filter(None, (t, (t or {}) | complete(s, profile).get('finer', {}).get('train', {}))): assert t['batch_size'] % (8 * t['accumulate']) == 0, s


# sizes

@pytest.mark.parametrize('profile', PROFILES)
def test_every_part_has_the_stated_size(profile):
    rows = table_of_parts(profile)
    stated = [r for r in rows if r.stated is not None]
    assert len(stated) == 12 and all(r.fits for r in rows), parts_as_text(rows)

def test_a_wrong_size_is_seen():
    assert not Row('x', 10, 11).fits and not Row('x', 67_500_000, 67.6).fits and Row('x', 67_597_408, 67.6).fits
    assert 'STATED 11' in parts_as_text([Row('x', 10, 11)])

@pytest.mark.parametrize('profile', PROFILES)
def test_cut_depth_keeps_widths(profile):
    for part, arch in recipe(profile).items():
        full, cut = (skeleton(part, a['config']).state_dict() for a in (arch, shallow(part, arch, 6)))
        assert len(cut) < len(full)
        if part != 'dcae': assert all(full[k].shape == v.shape for k, v in cut.items())      # the autoencoder's levels renumber their layers

def test_unknown_profile_and_architecture_say_what_there_is():
    with pytest.raises(ValueError, match="'mini'.*spar-1b, spar-3b"): recipe('mini')
    with pytest.raises(ValueError, match='internvl3-1b'): architecture('internvl3-1')
    with pytest.raises(ValueError, match='at least one layer'): shallow('mllm', architecture('internvl3-1b'), 0)


# folders

def test_right_folders_pass_and_load(toy):
    place, archs = toy
    for part in archs: assert check_part(part, place/part, archs[part]) == []
    assert len(list((place/'mllm').glob('*.safetensors'))) > 1 and (place/'sana/transformer/diffusion_pytorch_model.safetensors.index.json').is_file()
    mllm, dcae, sana = load_mllm(place/'mllm', side=224), load_dcae(place/'dcae'), load_sana(place/'sana', text_encoder=True)
    assert mllm.encode(torch.zeros(1, 3, 224, 224)).shape == (1, 64, 32) and dcae.factor == 32 and sana.shift == 3.0
    assert abs(sana.std[0].item() - 1 / .41407) < 1e-4
    ids = mllm.chat_ids('a red star on a blue field', has_image=True)
    assert ids.count(151667) == 64 and ids[0] == 151644 and max(ids) < 151674
    texts = ['a red star', 'Ünïcode \N{SNOWMAN}']
    assert sana.encode_text(texts)[0].isfinite().all()
    assert mllm.answer(torch.zeros(1, 3, 224, 224), ['how many?'], max_new_tokens=1)

def test_random_weights_depend_on_the_seed_alone(toy, tmp_path):
    place, archs = toy
    tensors = lambda d: {k: v for p in sorted(d.glob('*.safetensors')) for k, v in load_file(p).items()}
    write_dcae(tmp_path/'same', archs['dcae'], 0); write_dcae(tmp_path/'other', archs['dcae'], 1)
    a, b, c = tensors(place/'dcae'), tensors(tmp_path/'same'), tensors(tmp_path/'other')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)

def test_names_on_disk_are_the_real_ones(toy):
    index = json.loads((toy[0]/'mllm/model.safetensors.index.json').read_text())['weight_map']
    assert {'language_model.lm_head.weight', 'language_model.model.embed_tokens.weight', 'vision_tower.embeddings.cls_token',
            'multi_modal_projector.linear_1.weight'} <= index.keys()

def test_missing_shard(damaged):
    gone = lambda f: sorted(f.glob('*.safetensors'))[1].unlink()
    found = damaged('mllm', gone)
    assert len(found) == 1 and 'model-00002' in found[0].where and 'missing' in found[0].says and 'fetch' in found[0].cure

def test_truncated_file(damaged):
    def cut(f): p = sorted(f.glob('*.safetensors'))[0]; p.write_bytes(p.read_bytes()[:-100])
    assert 'cut short' in damaged('mllm', cut)[0].says

def test_lfs_pointer(damaged):
    def point(f): sorted(f.glob('*.safetensors'))[0].write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n')
    assert 'git lfs pull' in damaged('dcae', point)[0].cure

def rewrite(folder, change):
    "Apply `change(tensors)` to one shard and keep the index true."
    path = sorted(folder.glob('*.safetensors'))[0]; before = load_file(path); after = change(dict(before)); save_file(after, path)
    index = next(folder.glob('*.index.json')); doc = json.loads(index.read_text())
    for k in before.keys() - after.keys(): del doc['weight_map'][k]
    doc['weight_map'] |= {k: path.name for k in after}; index.write_text(json.dumps(doc))

def test_missing_unexpected_and_misshapen_tensors_are_named(damaged):
    def change(t):
        names = sorted(t); del t[names[0]]; t[names[1]] = torch.zeros(3, 1, 4, 1); t['decoder.no_such_thing'] = torch.zeros(1); change.names = names; return t
    says = [p.says for p in damaged('dcae', lambda f: rewrite(f, change))]
    assert len(says) == 3
    assert repr(change.names[0]) in says[0] and 'missing' in says[0]
    assert "'decoder.no_such_thing'" in says[1]
    assert repr(change.names[1]) in says[2] and '[3, 1, 4, 1]' in says[2]

def test_renamed_keys_are_no_problem_and_unknown_ones_are_named_as_on_disk(damaged):
    def change(t): t['vision_model.encoder.layers.0.attn.qkv.weight'] = torch.zeros(2); return t
    found = damaged('mllm', lambda f: rewrite(f, change))
    assert len(found) == 1 and 'vision_model.encoder.layers.0.attn.qkv.weight' in found[0].says

def edit(name, **changes):
    def do(folder):
        path = folder/name; doc = json.loads(path.read_text())
        for k, v in changes.items():
            at = doc
            for part in k.split('__')[:-1]: at = at[part]
            at[k.split('__')[-1]] = v
        path.write_text(json.dumps(doc))
    return do

@pytest.mark.parametrize('part,name,changes,says', [
    ('mllm', 'config.json', dict(architectures=['InternVLChatModel']), '-hf'),
    ('mllm', 'config.json', dict(downsample_ratio=1.0), 'downsample_ratio is 1.0, wanted 0.5'),
    ('mllm', 'config.json', dict(text_config__num_attention_heads=8, text_config__head_dim=4), 'num_attention_heads is 8, wanted 4'),
    ('mllm', 'config.json', dict(text_config__rope_parameters__rope_theta=10000.0), 'rope_theta'),
    ('dcae', 'config.json', dict(scaling_factor=0.3), 'scaling_factor is 0.3, wanted 0.41407'),
    ('dcae', 'config.json', dict(_class_name='AutoencoderKL'), 'AutoencoderKL, wanted AutoencoderDC'),
    ('sana', 'transformer/config.json', dict(sample_size=32), 'sample_size is 32, wanted 16'),
    ('sana', 'scheduler/scheduler_config.json', dict(flow_shift=1.0), 'flow_shift is 1.0, wanted 3.0'),
    ('sana', 'vae/config.json', dict(scaling_factor=1.0), 'scaling_factor is 1.0')])
def test_wrong_configurations(damaged, part, name, changes, says):
    found = damaged(part, edit(name, **changes))
    assert found and any(says in p.says + p.cure for p in found), found

@pytest.mark.parametrize('part,name,changes', [('mllm', 'config.json', dict(text_config__use_cache=False)),
                                               ('mllm', 'config.json', dict(tie_word_embeddings=True)),
                                               ('mllm', 'config.json', dict(vision_config__initializer_range=0.5))])
def test_keys_that_change_nothing_are_no_problem(damaged, part, name, changes): assert damaged(part, edit(name, **changes)) == []

def test_damaged_json_and_empty_places(damaged, tmp_path):
    assert 'damaged' in damaged('mllm', lambda f: (f/'config.json').write_text('{'))[0].says
    assert 'damaged' in damaged('mllm', lambda f: (f/'model.safetensors.index.json').write_text('[]'))[0].says
    assert 'damaged' in damaged('dcae', lambda f: (f/'config.json').write_text('[]'))[0].says
    assert 'cannot be built' in damaged('mllm', edit('config.json', text_config__hidden_size='wide'))[0].says
    assert 'files of this folder' in damaged('mllm', edit('model.safetensors.index.json', weight_map={'x': '../x.safetensors'}))[0].says
    assert 'damaged' in damaged('sana', lambda f: (f/'vae/config.json').write_text('{'))[0].says
    assert [p.says for p in check_folders('spar-3b', tmp_path/'nothing')] == ['there is no such folder'] * 3

def test_only_pickled_weights(damaged):
    def pickled(f): [p.unlink() for p in (*f.glob('*.safetensors'), *f.glob('*.index.json'))]; (f/'diffusion_pytorch_model.bin').write_bytes(b'x')
    says = damaged('dcae', pickled)[0].says
    assert 'holds no diffusion_pytorch_model.safetensors' in says and 'diffusion_pytorch_model.bin' in says

def test_tokenizer_of_another_model(damaged, toy):
    def other(f): [p.unlink() for p in f.glob('tokenizer*')]; gemma_like(600).save_pretrained(f)
    assert any('special tokens' in p.says or 'cannot be loaded' in p.says for p in damaged('mllm', other))

def test_toy_folders_are_not_the_paper(toy):
    problems = check_folders('spar-1b', toy[0])
    assert {p.part for p in problems} == {'mllm', 'dcae', 'sana'}
    assert any('other shapes' in p.says for p in problems) and any('missing' in p.says for p in problems) and all(p.cure for p in problems)
    assert check_folders('spar-1b', toy[0], own=True) == []


# costs and the command

def test_memory_for_backward_is_counted():
    x, lin = torch.empty(10, 100, device='meta'), torch.nn.Linear(100, 50, device='meta')
    assert saved_bytes(lambda: lin(x).sigmoid(), [lin]) == 4 * (10 * 100 + 10 * 50)

def test_costs_follow_what_trains():
    one, two = unified_cost('unified_1_connector', 'spar-1b'), unified_cost('unified_2_joint', 'spar-1b')
    table = {r.part.strip(): r.parameters for r in table_of_parts('spar-1b')}
    new = table['queries'] + table['routing'] + table['connector']
    assert two.trained == new + table['sana'] + table['alignment head']
    assert new < one.trained < new + table['sana'] / 10 and one.saved < two.saved and one.samples == 175781 * 1024

def command(*args):
    code = 'from spar.scale.models.cli import models_command; models_command()'
    return subprocess.run([sys.executable, '-c', code, *args], cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})

def test_command(toy):
    found = command('check', '--profile', 'spar-1b', '--bases', str(toy[0]))
    assert found.returncode == 1 and '67.6 M' in found.stdout and 'WRONG' in found.stdout and 'cure:' in found.stdout and not found.stderr.count('Traceback')

@pytest.mark.parametrize('argv, says', [(('check', '--random', 'x'), '--random writes'), (('--depth', '4'), 'belong to --random'),
                                        (('--bases', 'x'), 'belong to `spar_models check`'),
                                        (('--random', 'x', '--full', '--depth', '3'), 'leave --depth out')])
def test_no_option_is_accepted_and_ignored(argv, says):
    found = command(*argv, '--profile', 'spar-1b'); assert found.returncode == 2 and says in found.stderr, found.stderr

def test_command_without_a_large_profile():
    found = command('--profile', 'mini')
    assert found.returncode == 1 and 'spar-1b, spar-3b' in found.stderr and 'Traceback' not in found.stderr
