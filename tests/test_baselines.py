"""SPAR and other systems in one table: real classes of diffusers and transformers, small; and everything that may be wrong with a line of the list."""
import json, shutil, sys
import numpy as np
import pytest
import torch, yaml
from PIL import Image
from conftest import ROOT
from tiny import tiny_pipeline
from spar.evaluation.systems import in_precision, renders
from spar.evaluation.reconstruction import reconstruction_mini
from spar.evaluation.understanding import question_set
from spar.scale.baselines import table as table_module
from spar.scale.baselines.adapters import Autoencoder, answerer, system_of
from spar.command import main
from spar.scale.baselines.lines import BASELINE_TASKS, baseline
from spar.scale.baselines.small import small_folders
from spar.scale.benchmarks import mmvp
from spar.scale.benchmarks.geneval import GENEVAL_TAGS
from spar.scale.benchmarks.run import SHA256
from spar.scale.baselines.table import as_markdown, checked, compare_systems, processes, tabulate
from spar.backbones.dcae import load_dcae
from spar.backbones.perceptual import load_features, load_lpips
from spar.backbones.mllm import load_mllm
from spar.mini.random import random_bases
from spar.world.datasets import SceneImages
from spar.mini.judge import Judge, JudgeConfig
from spar.images import to_pil
from spar.world.prompts import vocabulary
from test_protocols import GRADES, files, server  # noqa: F401  a fixture: the endpoint that answers like a judge

CPU = torch.device('cpu')
SMALL = [dict(name='reconstruction-mini', glyphs=8, photos=4, least=8), dict(name='understanding-mini', questions=1, pairs=1, riddles=2),
         dict(name='geneval-mini', prompts=1, images=1), dict(name='imgedit-mini', edits_per_type=1)]

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "bases, spar and small: everything that the table is made of."
    home = tmp_path_factory.mktemp('home')
    random_bases(home/'bases', vocabulary(), more=dict(judge=lambda path: Judge(JudgeConfig.of_world(width=8)).save_pretrained(path)))
    tiny_pipeline(vocabulary()).save_pretrained(home/'spar'); small_folders(home/'small', home/'bases')
    (home/'mine_of_test.py').write_text(
        'from PIL import Image\ndef copy(path, device, sampling): return lambda texts, pictures, indices: pictures\n'
        'def grey(path, device, sampling, side): return lambda texts, pictures, indices: [Image.new("RGB", (side, side), (i % 256,) * 3) for i in indices]\n'
        'def nothing(path, device, sampling): return None\n')
    return home

@pytest.fixture
def at_home(home, monkeypatch): monkeypatch.chdir(home); monkeypatch.setattr(sys, 'path', [p for p in sys.path if p != str(home)]); return home

def given(home) -> dict: return yaml.safe_load((home/'small/baselines.yaml').read_text())

def line(home, cls, task, path, **more): return baseline({'name': 'x', 'task': task, 'class': cls, 'path': str(home/path), **more})

@pytest.fixture(scope='module')
def table(home):
    "One command over everything; run once."
    params = given(home) | dict(spar=str(home/'spar'), out=str(home/'out'), steps=1, batch_size=8, device='cpu', benchmarks=SMALL)
    params['baselines'].append(dict(name='copy', task='editing', callable='mine_of_test:copy'))
    (home/'all.yaml').write_text(yaml.safe_dump(params))
    with pytest.MonkeyPatch.context() as m: m.chdir(home); main(['baselines', '--params', str(home/'all.yaml')])
    return json.loads((home/'out/table.json').read_text())


def test_one_command_puts_spar_beside_a_baseline_of_each_kind(table, home):
    tasks = {t: {c['task'] for c in (table['columns'][k] for k in row)} for t, row in table['rows'].items()}
    assert tasks['SPAR'] == set(BASELINE_TASKS)
    for task in BASELINE_TASKS: assert [t for t, did in tasks.items() if did == {task}], f'no baseline of {task}'
    for title in table['order']: assert sum(title in row for row in table['rows'].values()) >= 2, f'{title} holds one system only'
    text = (home/'out/table.md').read_text()
    assert all(f'| {name} |' in text for name in table['rows']) and all(i in text for i in table['protocols'])
    assert table['systems']['DC-AE, reconstruction-mini']['sha256'] and table['systems']['copy, imgedit-mini']['built_by'] == 'mine_of_test:copy'

def test_its_numbers_are_those_of_the_benchmarks(table, home):
    "DC-AE of the table is what `reconstruction_mini` says of `load_dcae`; the copying editor keeps everything and does nothing."
    dcae, x = load_dcae(home/'bases/dcae'), torch.stack([SceneImages(0, 'test', 'easy')[k]['image'] for k in range(8)])
    want = reconstruction_mini({'it': in_precision(dcae, CPU, 'no')}, x, load_lpips(home/'bases/lpips'), load_features(), 0, 8, 8)['it']
    got = {c['metric']: table['rows']['DC-AE'][t] for t, c in table['columns'].items() if c['benchmark'] == 'reconstruction-mini'}
    for metric in ('psnr', 'ssim', 'lpips_squeeze_mini', 'rfid_efflite0'): assert got[metric] == pytest.approx(want[metric], rel=2e-4, abs=1e-5), metric
    copied = {c['metric']: table['rows']['copy'][t] for t, c in table['columns'].items() if t in table['rows']['copy']}
    assert copied['overall'] == 0 and copied['preservation'] == 1

def code_of(notebook): return ''.join(''.join(c['source']) for c in json.loads(notebook.read_text())['cells'])

def test_protocol_lines_are_those_of_the_evaluation_stages(table):
    "The words around the values come from two places; they must not drift apart."
    lines = [p['line'] for p in table['protocols'].values()]
    assert len(lines) == 4
    for own in lines:
        name = own.split(';')[0]; books = [*(ROOT/'nbs/stages').glob('evaluate_*.ipynb'), *(ROOT/'nbs/evaluation').glob('*.ipynb')]
        stage = next(p for p in books if f'protocol({name!r}' in (text := code_of(p)) or f'"{name}",' in text)
        code = code_of(stage)
        keys = (part.split('=')[0].strip() for part in own.split('; ')[1:] if '=' in part)
        for key in keys: assert f'{key}=' in code, f'{name}: {key} is not in {stage.name}'

def test_what_is_measured_is_not_measured_again(table, home, at_home, monkeypatch):
    (home/'out/imgedit-mini/copy/result.json').unlink(); made, build = [], system_of
    monkeypatch.setattr(table_module, 'system_of', lambda b, *a: made.append((b.name, b.task)) or build(b, *a))
    assert compare_systems(yaml.safe_load((home/'all.yaml').read_text()), lambda s: None) == table and made == [('copy', 'editing')]
    other = yaml.safe_load((home/'all.yaml').read_text()) | dict(seed=1)
    with pytest.raises(ValueError, match='holds another run: protocol.line'): compare_systems(other, lambda s: None)

def test_other_weights_under_the_same_name_are_refused(home, at_home, tmp_path):
    shutil.copytree(home/'bases/dcae', tmp_path/'dcae'); base = given(home)
    params = base | dict(spar='', out=str(tmp_path/'out'), device='cpu', benchmarks=SMALL[:1],
                         baselines=[base['baselines'][0] | dict(path=str(tmp_path/'dcae'))])
    compare_systems(params, lambda s: None)
    config = json.loads((tmp_path/'dcae/config.json').read_text()); (tmp_path/'dcae/config.json').write_text(json.dumps(config | dict(scaling_factor=.5)))
    with pytest.raises(ValueError, match='holds another run: system.sha256'): compare_systems(params, lambda s: None)


def test_a_model_of_transformers_answers_as_it_does_here(home):
    "Processor, chat template and greedy search of transformers, against `MLLM.answer`."
    mllm, answer = load_mllm(home/'bases/mllm'), answerer(
        line(home, 'InternVLForConditionalGeneration', 'understanding', 'small/internvl', call=dict(max_new_tokens=4)), CPU)
    asked = [a for a in question_set(0, n=2, pairs=1, riddles=2)]
    seen, blind = [a for a in asked if a.scene], [a for a in asked if not a.scene]
    x = renders([a.scene for a in seen])
    assert answer(to_pil(x), [a.question for a in seen]) == mllm.answer(x, [a.question for a in seen], 4)
    assert answer(None, [a.question for a in blind]) == mllm.answer(None, [a.question for a in blind], 4)

def test_another_family_of_models_with_a_template_of_its_own(home, tmp_path):
    "LLaVA: another processor, another image token, no chat template in the folder."
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, Qwen2Config
    tk = load_mllm(home/'bases/mllm').tokenizer; tk.chat_template = None
    torch.manual_seed(0)
    cfg = LlavaConfig(vision_config=CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                                                     patch_size=8),
                      text_config=Qwen2Config(vocab_size=len(tk), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                              num_key_value_heads=2, tie_word_embeddings=False,
                                  eos_token_id=tk.eos_token_id, pad_token_id=tk.pad_token_id), image_token_id=tk.convert_tokens_to_ids('<IMG_CONTEXT>'))
    LlavaForConditionalGeneration(cfg).save_pretrained(tmp_path)
    LlavaProcessor(CLIPImageProcessor(size=dict(shortest_edge=16), crop_size=16), tk, patch_size=8, vision_feature_select_strategy='default',
                   image_token='<IMG_CONTEXT>', num_additional_image_tokens=1).save_pretrained(tmp_path)
    make = lambda **call: answerer(line(tmp_path, 'LlavaForConditionalGeneration', 'understanding', '', call=call), CPU)
    with pytest.raises(ValueError, match='no chat template'): make()
    template = "<user> {% for p in messages[0]['content'] %}" \
        "{% if p['type'] == 'image' %}<IMG_CONTEXT> {% else %}{{ p['text'] }}{% endif %}{% endfor %} <assistant>"
    answer = make(chat_template=template, max_new_tokens=3)
    red, blue = (Image.new('RGB', (20, 30), c) for c in ('red', 'blue'))
    told = answer([red, blue, red], ['what colour is this ?'] * 3)
    assert told[0] == told[2] and all(1 <= len(t.split()) <= 3 for t in told)
    with pytest.raises(ValueError, match="unknown 'max_tokens'"): make(max_tokens=3)
    with pytest.raises(ValueError, match='holds LlavaForConditionalGeneration, the line says InternVL'):
        answerer(line(tmp_path, 'InternVLForConditionalGeneration', 'understanding', ''), CPU)


@pytest.mark.parametrize('wrong,says', [
    (dict(task='drawing'), "unknown 'drawing'.*Allowed: editing, generation, reconstruction, understanding"),
    ({'class': 'AutoencoderDCC'}, "unknown 'AutoencoderDCC'. Did you mean 'AutoencoderDC'.*Allowed: .*AutoencoderKL,.*SparPipeline"),
    ({'class': 'SanaPipeline'}, "class for reconstruction.*unknown 'SanaPipeline'"),
    ({'class': None}, 'either class or callable, and has neither'), (dict(callable='m:f'), 'and has both'), (dict(path=''), 'path is missing'),
    (dict(steps=3), "unknown 'steps'"),
    (dict(dtype='half'), "dtype: unknown 'half'"), (dict(name='a/b'), 'also names a folder'),
    (dict(load=dict(trust_remote_code=True)), 'use it through callable'), (dict(pth='x'), "Did you mean 'path'")])
def test_a_wrong_line_is_named_before_anything_is_loaded(wrong, says):
    good = {'name': 'a', 'task': 'reconstruction', 'class': 'AutoencoderDC', 'path': 'nowhere'}
    assert baseline(good).cls == 'AutoencoderDC'
    with pytest.raises(ValueError, match=says): checked(dict(baselines=[good | wrong]))

@pytest.mark.parametrize('params,says', [
    (dict(baseline=[]), "Did you mean 'baselines'"), (dict(benchmarks=[dict(name='geneval')]), "Did you mean 'geneval-hf'"),
    (dict(benchmarks=[dict(name='wise', prompts='p')]), 'needs judge'),
    (dict(benchmarks=SMALL[:1], baselines=[dict(name='a', task='editing', callable='m:f')]), 'none of the benchmarks measures'),
    (dict(baselines=[dict(name='a', task='editing', callable='m:f')] * 2), 'there twice')])
def test_wrong_parameters(params, says):
    with pytest.raises(ValueError, match=says): checked(params)

@pytest.mark.parametrize('file', sorted((ROOT/'configs/baselines').glob('*.yaml')), ids=lambda p: p.stem)
def test_committed_lists_are_sound(file):
    p = checked(yaml.safe_load(file.read_text()))
    assert {b.task for b in p.systems if b.name != 'SPAR'} == set(BASELINE_TASKS)

@pytest.mark.parametrize('callable,says', [('no_such_module_of_test:f', 'there is no module'), ('mine_of_test:f', "has no 'f'"),
                                           ('mine_of_test:nothing', 'returned NoneType')])
def test_callables_that_are_not_there(callable, says, at_home):
    with pytest.raises(ValueError, match=says): system_of(baseline(dict(name='a', task='editing', callable=callable)), dict(steps=1, guidance=1., seed=0), CPU)

def test_an_import_error_inside_a_users_module_is_shown_as_it_is(at_home):
    (at_home/'broken_of_test.py').write_text('import a_package_that_is_not_there\n')
    with pytest.raises(ModuleNotFoundError, match='a_package_that_is_not_there'):
        system_of(baseline(dict(name='a', task='editing', callable='broken_of_test:f')), dict(steps=1, guidance=1., seed=0), CPU)

def test_partial_folders_are_named(home, tmp_path):
    shutil.copytree(home/'small/sana', tmp_path/'sana'); (tmp_path/'sana/model_index.json').unlink(); sampling = dict(steps=1, guidance=1., seed=0)
    with pytest.raises(FileNotFoundError, match='model_index.json'): system_of(line(tmp_path, 'SanaPipeline', 'generation', 'sana'), sampling, CPU)
    with pytest.raises(FileNotFoundError, match='config.json'): system_of(line(tmp_path, 'AutoencoderKL', 'reconstruction', 'nowhere'), sampling, CPU)

def test_other_guidance_is_another_column():
    result = lambda name, system, i: dict(benchmark='geneval-mini', system=system, result=dict(overall=.5, protocol=dict(id=i), system=dict(name=system)))
    table = tabulate([result('geneval-mini', s, i) for s, i in (('SPAR', 'g-1'), ('a', 'g-1'), ('b', 'g-2'))])
    assert table['order'] == ['geneval-mini overall ↑ (a)', 'geneval-mini overall ↑ (b)'] and list(table['rows']['b']) == ['geneval-mini overall ↑ (b)']
    assert '- geneval-mini (b): `g-2`' in as_markdown(table)


def test_the_published_protocols_through_the_same_door(home, at_home, server, tmp_path, monkeypatch):
    "A folder of pictures, MMVP, GenEval, WISE and ImgEdit: the runners are tested elsewhere, here that every adapter reaches them."
    known = files(tmp_path/'f'); server.grade = lambda key: GRADES['wise'] + '\n' if key in ('1', '401', '568', '701', '801', '901') else GRADES['imgedit']
    (tmp_path/'g').mkdir(); names = '\n'.join(f'thing{k}' for k in range(80)) + '\n'
    rows = ''.join(json.dumps(dict(tag=t, include=[{'class': 'thing1', 'count': 1}], prompt='a red star')) + '\n' for t in GENEVAL_TAGS)
    for n, text in {'geneval/evaluation_metadata.jsonl': rows, 'geneval/object_names.txt': names}.items():
        (tmp_path/'g'/n.split('/')[1]).write_text(text); known[n] = __import__('hashlib').sha256(text.encode()).hexdigest()
    for k, v in known.items(): monkeypatch.setitem(SHA256, k, v)
    seen = []
    class Looks:
        facts, failed = dict(kind='stand-in'), {}
        def __init__(self, detector, clip, classes, device): assert (detector, clip, len(classes)) == ('d', 'c', 80)
        def verdict(self, image, asked): seen.append(image.getpixel((0, 0))[0]); return ''
    monkeypatch.setattr(table_module, 'GenEvalJudge', Looks)
    (tmp_path/'mmvp/MMVP Images').mkdir(parents=True)
    (tmp_path/'mmvp/Questions.csv').write_text('Index,Question,Options,Correct Answer\n1,is it red ?,red or blue,(a)\n2,is it red ?,red or blue,(b)\n')
    for k in (1, 2): Image.new('RGB', (64, 64), 'red').save(tmp_path/f'mmvp/MMVP Images/{k}.jpg')
    monkeypatch.setattr(mmvp, 'MMVP_ASK', '{question} {options}')
    (tmp_path/'photos').mkdir()
    for k in range(3): Image.fromarray(np.random.default_rng(k).integers(0, 255, (70, 80, 3), dtype=np.uint8)).save(tmp_path/f'photos/{k}.png')
    kl, internvl = given(home)['baselines'][1:3]; judge = dict(url=server.url, model='gpt', pause=.01)
    table = compare_systems(dict(spar='', out=str(tmp_path/'out'), device='cpu', steps=1, batch_size=4, baselines=[kl, internvl,
        dict(name='grey', task='generation', callable='mine_of_test:grey', call=dict(side=8)), dict(name='copy', task='editing', callable='mine_of_test:copy')],
        benchmarks=[dict(name='reconstruction', sources=str(tmp_path/'photos'), side=64, limit=2), dict(name='mmvp', prompts=str(tmp_path/'mmvp')),
                    dict(name='geneval-hf', prompts=str(tmp_path/'g'), detector='d', clip='c', images=2),
                    dict(name='wise', prompts=str(tmp_path/'f'), judge=judge, limit=1, workers=1),
                    dict(name='imgedit', prompts=str(tmp_path/'f'), sources=str(tmp_path/'f'), judge=judge, workers=1)]), lambda s: None)
    value = lambda system, title: table['rows'][system][title]
    assert 0 < value('KL (random)', 'reconstruction psnr ↑') < 40 and value('InternVL', 'mmvp per_pair ↑') in (0., 1.)
    assert value('grey', 'geneval-hf overall ↑') == 1 and seen == list(range(12))                # noise index = place in the benchmark
    assert value('grey', 'wise overall ↑') == pytest.approx(.8) and value('copy', 'imgedit overall ↑') == pytest.approx(3.)
    copied = next((tmp_path/'out/imgedit/copy').glob('images/3.png'))
    assert Image.open(copied).getpixel((0, 0)) == (3, 0, 0)                                      # the source picture itself reached the system
    assert table['protocols'][table['columns']['reconstruction psnr ↑']['protocol']]['pictures'] == 2

def test_processes_share_the_published_protocols_and_one_collects(home, at_home, tmp_path, monkeypatch):
    (tmp_path/'photos').mkdir()
    for k in range(4): Image.fromarray(np.random.default_rng(k).integers(0, 255, (70, 80, 3), dtype=np.uint8)).save(tmp_path/f'photos/{k}.png')
    params = dict(spar='', out=str(tmp_path/'out'), bases=str(home/'bases'), device='cpu', steps=1, batch_size=9,
                  baselines=[given(home)['baselines'][1], dict(name='copy', task='editing', callable='mine_of_test:copy')],
                  benchmarks=[dict(name='reconstruction', sources=str(tmp_path/'photos'), side=64, shard=1), SMALL[3]])
    seen, call = [], Autoencoder.__call__
    monkeypatch.setattr(Autoencoder, '__call__', lambda self, x: seen.append((processes()['rank'], len(x))) or call(self, x))
    def as_rank(r, world=2):
        monkeypatch.setenv('RANK', str(r)); monkeypatch.setenv('WORLD_SIZE', str(world))
        return compare_systems(params, lambda s: None)
    # two of four pictures; the miniature's benchmarks belong to the first process
    assert as_rank(1)['rows'] == {} and not (tmp_path/'out/table.json').exists()
    assert set(as_rank(0)['rows']) == {'KL (random)', 'copy'} and seen == [(1, 1)] * 2 + [(0, 1)] * 2
    assert as_rank(0, 1) == json.loads((tmp_path/'out/table.json').read_text()) and len(seen) == 4

def test_what_goes_wrong_names_benchmark_and_system(home, at_home, tmp_path):
    lines = [dict(name='lost', task='reconstruction', path=str(tmp_path/'gone'), **{'class': 'AutoencoderDC'})]
    with pytest.raises(SystemExit, match='spar baselines: reconstruction-mini, lost: .*gone'):
        (tmp_path/'p.yaml').write_text(yaml.safe_dump(dict(spar='', out=str(tmp_path/'out'), bases=str(home/'bases'), device='cpu', benchmarks=SMALL[:1],
                                                           baselines=lines)))
        main(['baselines', '--params', str(tmp_path/'p.yaml')])

def test_both_small_folders_and_classes_from_the_command(home, tmp_path, capsys):
    main(['baselines', '--classes', 'understanding']); assert 'Qwen2_5_VLForConditionalGeneration' in capsys.readouterr().out.splitlines()
    for argv, says in (([], '2'), (['--params', str(tmp_path/'x.yaml')], 'no such file'),
                       (['--small', str(tmp_path/'s'), '--bases', str(tmp_path)], 'config.json is missing')):
        with pytest.raises(SystemExit, match=says): main(['baselines', *argv])
    (tmp_path/'l.yaml').write_text('- a\n')
    with pytest.raises(SystemExit, match='found a list'): main(['baselines', '--params', str(tmp_path/'l.yaml')])
