"""The command `spar`: what it says at once, what it refuses before a model is loaded, and what it draws with a small one."""
import io, os, re, statistics, subprocess, sys, time, warnings
from pathlib import Path
import pytest
import torch
from PIL import Image
from conftest import ROOT, SPAR, environment
from spar import cli
from spar.command import COMMANDS, main, parser_of, _function
from spar.world.prompts import vocabulary
from tiny import tiny_pipeline

LEAVES = [(f'{n} {s}' if s else n, p) for n, v in COMMANDS.items() for s, p in (v.items() if isinstance(v, dict) else [('', v)])]
HEAVY = {'torch', 'transformers', 'diffusers', 'datasets', 'scipy', 'matplotlib', 'papermill', 'dvc', 'numpy', 'PIL'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('cli')/'pipe'
    tiny_pipeline(vocabulary()).save_pretrained(path, dict(profile='mini', seed=0))
    return path

@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

@pytest.fixture
def unloaded(monkeypatch):
    "Whoever loads a model fails."
    def loaded(*args): raise AssertionError('the model was loaded before the mistake was seen')
    monkeypatch.setattr(cli, 'loaded', loaded)

def fails(capsys, *argv) -> tuple:
    "(exit code, what was said) of a line that is refused."
    with pytest.raises(SystemExit) as e: main([str(a) for a in argv])
    said = capsys.readouterr().err
    return (e.value.code, said) if isinstance(e.value.code, int) else (1, e.value.code)


# ---- help ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name,place', LEAVES)
def test_every_parameter_is_explained(name, place):
    function = _function(place); p = parser_of(function, f'spar {name}')
    assert function.__doc__ and p.description.endswith('.'), 'a sentence says what the command does'
    for a in p._actions: assert a.help, f'spar {name}: {a.dest} has no comment beside it'
    assert p.epilog.count('spar ' + name.split()[0]) >= 1, 'an example'
    assert max(map(len, p.format_help().splitlines())) <= 122

def test_examples_of_the_help_are_lines_that_parse(capsys):
    for name, place in LEAVES:
        p = parser_of(_function(place), f'spar {name}')
        for line in re.findall(rf'^ *(spar {name} .*?)(?:   .*)?$', p.epilog.replace('\\\n', ' '), re.M):
            words = [w.strip('"') for w in re.findall(r'"[^"]*"|\S+', line)][1 + len(name.split()):]
            p.parse_args([w for w in words if w not in ('|', 'grep', 'star', '...')])

@pytest.mark.parametrize('argv', [['--help'], ['-h'], ['data', '--help'], ['evaluate', '-h'], *([*n.split(), '--help'] for n, _ in LEAVES)])
def test_help_is_no_error(argv, capsys):
    with pytest.raises(SystemExit) as e: main(argv)
    assert e.value.code == 0 and 'usage: spar' in capsys.readouterr().out

@pytest.mark.parametrize('argv,says', [([], 'commands'), (['genrate'], "Did you mean 'generate'"), (['data'], 'pack'), (['data', 'pakc'], "'pack'"), (['spar_generate'], 'unknown command'),
                                       (['generate'], 'either'), (['generate', 'a', '--prompts', 'x'], 'either'), (['generate', 'a', '--sead', '1'], '--sead'), (['generate', 'a', '--seed', '1.7'], '1.7'),
                                       (['generate', 'a', '--step', '3'], 'unrecognized'), (['export', 'all', '--out', 'x'], 'internvl'), (['stage', '--show'], '--list'), (['stage', 'x', '--list'], 'no stage'),
                                       (['models', '--depth', '0', '--random', 'x'], '--depth 0'), (['baselines'], '--small'), (['baselines', '--small', 'x', '--device', 'cpu'], 'belong'),
                                       (['edit', 'x.png'], 'INSTRUCTION')])
def test_a_line_that_is_typed_wrongly_ends_with_2(argv, says, capsys):
    code, said = fails(capsys, *argv)
    assert code == 2 and says in said and 'Traceback' not in said

def test_the_version(capsys):
    from spar import __version__
    with pytest.raises(SystemExit) as e: main(['--version'])
    assert e.value.code == 0 and capsys.readouterr().out == f'spar {__version__}\n'


# ---- how long it takes, and what is imported -------------------------------------------------------------------------
def imported(*argv, cwd) -> set:
    "Top-level modules that a command line imports."
    done = subprocess.run([sys.executable, '-X', 'importtime', '-m', 'spar', *map(str, argv)], cwd=cwd, env=environment(ROOT), capture_output=True, text=True)
    return {m.strip().partition('.')[0] for m in re.findall(r'^import time:.*\|([^|]*)$', done.stderr, re.M)}

@pytest.mark.parametrize('argv', [['--help'], ['generate', '--help'], ['stage', '--help'], ['benchmark', '--help'], ['models', '--help'], ['data', 'check', '--help'], ['evaluate', 'wise', '--help'], ['export', '--help'],
                                  ['baselines', '--help'], ['generate', 'a star', '--steps', '0'], ['stage', 'x'], ['benchmark', '--batch', '0']])
def test_what_says_no_imports_nothing_heavy(argv, tmp_path):
    found = imported(*argv, cwd=tmp_path); assert 'argparse' in found and not found & HEAVY

@pytest.mark.parametrize('argv,says', [(['generate', 'a staar'], "'staar'"), (['generate', 'a star', '--out', 'x.psd'], '.psd'), (['edit', 'no.png', 'remove the star'], 'no.png'),
                                       (['generate', 'a star', '--out', 'd.png'], 'd.png'), (['generate', '--prompts', 'no.txt'], 'no.txt')])
def test_what_the_command_sees_for_itself_is_said_without_torch(folder, argv, says, tmp_path):
    (tmp_path/'d.png').mkdir()
    argv = [*SPAR, *argv, '--model', str(folder)]
    done = subprocess.run([argv[0], '-X', 'importtime', *argv[1:]], env=environment(ROOT), capture_output=True, text=True)
    lines = [l for l in done.stderr.splitlines() if not l.startswith('import time')]
    assert done.returncode == 1 and len(lines) == 1 and says in lines[0], lines
    assert not re.search(r'\| +(torch|transformers|diffusers|numpy)$', done.stderr, re.M)

@pytest.mark.parametrize('argv', [['--help'], ['generate', '--help'], ['data', 'pack', '--help'], ['evaluate', 'geneval', '--help']])
def test_help_within_half_a_second_of_an_empty_interpreter(argv, tmp_path):
    "Medians of pairs, and processor time beside the clock: this machine has other work as well."
    def cost(*cmd):
        before, began = os.times(), time.monotonic()
        subprocess.run([sys.executable, *cmd], env=environment(ROOT), capture_output=True, check=True)
        after = os.times()
        return min(time.monotonic() - began, after.children_user + after.children_system - before.children_user - before.children_system)
    over = [cost('-m', 'spar', *argv) - cost('-c', 'pass') for _ in range(5)]
    assert statistics.median(over) < .5, over


# ---- what is refused before a model is loaded ------------------------------------------------------------------------
SAMPLING = ('generate a star', 'edit in.png a star')

@pytest.mark.parametrize('option,values', [('--steps', (0, -1, 1001)), ('--guidance', ('nan', 'inf', '-inf', -.1, 100.5)), ('--num', (0, -3)), ('--seed', (-1, 2**63))])
@pytest.mark.parametrize('command', ['generate', 'edit'])
def test_numbers_outside_their_range(command, option, values, folder, unloaded, capsys):
    Image.new('RGB', (64, 64)).save('in.png')
    for value in values:
        code, said = fails(capsys, command, *(['in.png'] if command == 'edit' else []), 'a star', f'{option}={value}', '--model', folder)
        assert code == 1 and f'{option} {value}' in said.replace('-0.1', '-.1').replace('-.1', '-0.1') and '\n' not in said, said

@pytest.mark.parametrize('argv,says', [(['answer', 'in.png', 'a star', '--max-tokens', '0'], '--max-tokens 0'), (['generate', 'a star', '--device', 'gpu'], 'cuda:1'), (['words', '--model', 'nowhere'], 'nowhere'),
    (['data', 'check', 'x', '--n', '-1'], '--n -1'), (['data', 'pack', 'x', 'y', '--per-shard', '0'], '--per-shard 0'), (['data', 'check', 'x', '--exclude', 'no.txt'], 'no.txt'),
    (['evaluate', 'mmvp', '--prompts', '.', '--out', 'x', '--limit', '0'], '--limit 0'), (['evaluate', 'geneval', '--prompts', 'nowhere', '--out', 'x', '--only', 'draw'], '--prompts nowhere'),
    (['evaluate', 'wise', '--prompts', '.', '--out', 'x'], '--judge-url'), (['evaluate', 'wise', '--prompts', '.', '--out', 'x', '--only', 'draw', '--timeout', '0'], '--timeout 0'),
    (['export', 'pipeline', '--out', '.'], 'exists'), (['export', 'pipeline', '--out', 'x', '--metrics', 'no.json'], 'no.json'), (['export', 'tokenizer', '--out', 'x', '--processor', '.'], 'internvl')])
def test_other_options_too(argv, says, folder, unloaded, capsys):
    Image.new('RGB', (64, 64)).save('in.png')
    code, said = fails(capsys, *argv); assert code == 1 and says in said and '\n' not in said

@pytest.mark.parametrize('prompt,says', [('', 'empty'), ('  ', 'empty'), ('red ' * 200, '200 words'), ('a red staar', "'staar'.*near it: star.*`spar words`"), ('a red \N{SNOWMAN}', '\N{SNOWMAN}'), ('<IMG_CONTEXT>', 'special token')])
def test_texts_that_no_model_has_to_see(prompt, says, folder, unloaded, capsys):
    Image.new('RGB', (64, 64)).save('in.png')
    for argv, what in ((['generate'], 'prompt'), (['edit', 'in.png'], 'instruction'), (['answer', 'in.png'], 'question')):
        code, said = fails(capsys, *argv, prompt, '--model', folder)
        assert code == 1 and re.search(f'{what}: .*{says}', said), said

def test_the_pipeline_says_the_same(folder, unloaded, capsys):
    from spar import SparPipeline
    pipe = SparPipeline.from_pretrained(folder, 'cpu')
    for prompt in ('', 'a red staar', '<img>', 'red ' * 200):
        with pytest.raises(ValueError) as e: pipe(prompt, num_inference_steps=1)
        assert fails(capsys, 'generate', prompt, '--model', folder) == (1, f'spar generate: {e.value}')

def bad_pictures():
    Image.new('RGB', (80, 80), 'red').save('ok.jpg')
    Path('cut.jpg').write_bytes(Path('ok.jpg').read_bytes()[:300]); Path('text.png').write_text('hello'); Path('empty.png').write_bytes(b''); Path('folder.png').mkdir()
    return ('nowhere.png', 'text.png', 'cut.jpg', 'empty.png', 'folder.png', '')

def test_pictures_that_are_none(folder, unloaded, capsys):
    for name in bad_pictures():
        for argv in (['reconstruct', name], ['edit', name, 'remove the star'], ['answer', name, 'is there a star']):
            code, said = fails(capsys, *argv, '--model', folder); assert code == 1 and name in said and '\n' not in said, said

def test_a_missing_or_damaged_model(tmp_path, unloaded, capsys):
    for model, says in ((tmp_path/'none', 'make repro'), ):
        code, said = fails(capsys, 'generate', 'a star', '--model', model); assert code == 1 and says in said
    (tmp_path/'half/mllm').mkdir(parents=True); (tmp_path/'half/mllm/tokenizer.json').write_text('{"model": {"vo')
    code, said = fails(capsys, 'generate', 'a star', '--model', tmp_path/'half'); assert code == 1 and 'tokenizer.json is damaged' in said


# ---- where pictures go -----------------------------------------------------------------------------------------------
def comes_back(suffix: str) -> bool:
    "Does a picture written under this ending come back as that picture, in colour and at its size?"
    image = Image.linear_gradient('L').resize((90, 50)); image = Image.merge('RGB', (image, image.rotate(180), image))
    try:
        image.save(f'probe{suffix}')
        with Image.open(f'probe{suffix}') as again: back = again.convert('RGB'); return back.size == image.size and len(set(back.getdata())) > 8 and again.mode not in ('1', 'L')
    except Exception as e: return suffix in ('.pdf',) and Path(f'probe{suffix}').read_bytes()[:4] == b'%PDF' or (suffix in ('.eps', '.ps') and 'Ghostscript' in str(e))

def endings(): Image.init(); return sorted(Image.registered_extensions())

class Red:
    "A pipeline that draws one thing."
    record = {}
    def __call__(self, text, **kw): return type('Out', (), dict(images=[Image.new('RGB', (64, 64), 'red')]))

@pytest.mark.parametrize('suffix', endings())
def test_an_ending_passes_if_a_picture_can_be_written_with_it(suffix, folder, monkeypatch, capsys):
    "The check against the deed, for every ending that Pillow registers."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); able = comes_back(suffix)
    monkeypatch.setattr(cli, 'loaded', lambda *a: Red())
    if able: assert main(['generate', 'a star', '--out', f'x{suffix}', '--model', str(folder)]) == 0 and Path(f'x{suffix}').is_file()
    else: assert fails(capsys, 'generate', 'a star', '--out', f'x{suffix}', '--model', folder)[0] == 1 and not Path(f'x{suffix}').exists()

def test_the_known_ones(): assert {e for e in endings() if cli.writes_rgb(e)} >= {'.png', '.jpg', '.jpeg', '.webp', '.tif', '.tiff', '.gif', '.bmp', '.pdf'} and not any(map(cli.writes_rgb, ('.psd', '.ico', '.icns', '.xbm', '.svg', '')))

@pytest.mark.parametrize('out,says', [('d.png', 'is a folder'), ('no/x.png', "'no' does not exist"), ('x', 'no ending'), ('.png', 'no ending'), ('x.PSD', '.PSD'), ('file.txt/x.png', 'does not exist'), ('', 'folder')])
def test_targets_that_cannot_be(out, says, folder, unloaded, capsys):
    Path('d.png').mkdir(); Path('file.txt').write_text(''); Image.new('RGB', (64, 64)).save('in.png')
    for argv in (['generate', 'a star'], ['edit', 'in.png', 'remove the star'], ['reconstruct', 'in.png']):
        code, said = fails(capsys, *argv, '--out', out, '--model', folder); assert code == 1 and says in said, said

def test_a_folder_where_a_further_picture_would_be(folder, unloaded, capsys):
    Path('x-1.png').mkdir(); Path('p.txt').write_text('a star\n')
    assert 'x-1.png' in fails(capsys, 'generate', 'a star', '--num', '2', '--out', 'x.png', '--model', folder)[1]
    assert 'x-1.png' in fails(capsys, 'generate', '--prompts', 'p.txt', '--out', 'x.png', '--model', folder)[1]


# ---- lists of prompts ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('content,says', [(b'', 'not one prompt'), (b'\n \n', 'not one prompt'), (b'a star\na caf\xe9\n', 'line 2: byte 0xe9 is not UTF-8'), ('a star'.encode('utf-16'), 'line 1'),
                                          (b'a star\n\na staar\n', "line 3: .*'staar'"), (b'a star\n<img>\n', 'line 2: .*special token')])
def test_lists_that_cannot_be_read(content, says, folder, unloaded, capsys):
    Path('p.txt').write_bytes(content)
    code, said = fails(capsys, 'generate', '--prompts', 'p.txt', '--model', folder); assert code == 1 and re.search(f'p.txt.*{says}', said), said

def test_a_list_is_counted_and_each_prompt_drawn_as_alone(folder, capsys, monkeypatch):
    monkeypatch.setattr(cli, 'loaded', (lambda load: lambda *a, pipe=[]: pipe[0] if pipe else pipe.append(load(*a)) or pipe[0])(cli.loaded))
    same = ['--steps', '2', '--seed', '5', '--model', str(folder), '--device', 'cpu']
    Path('p.txt').write_bytes('\ufeffa red star\r\n\r\ntwo green clouds'.encode())
    assert main(['generate', '--prompts', 'p.txt', '--num', '2', '--out', 'd.png', *same]) == 0
    said = capsys.readouterr().out; assert '2 prompts' in said and '1/2 wrote d-1.png' in said and '2/2 wrote d-2-1.png' in said
    monkeypatch.setattr(sys, 'stdin', type('In', (), dict(buffer=io.BytesIO(b'two green clouds\n'))))
    assert main(['generate', '--prompts', '-', '--num', '2', '--out', 's.png', *same]) == 0
    assert main(['generate', 'two green clouds', '--num', '2', '--out', 'a.png', *same]) == 0
    pixels = lambda name: Image.open(name).tobytes()
    assert pixels('d-2.png') == pixels('a.png') == pixels('s-1.png') and pixels('d-2-1.png') == pixels('a-1.png') == pixels('s-1-1.png') != pixels('a.png')


# ---- notes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('prompt,words', [('an orange anchor', "'orange', 'anchor'"), ('a red star', None)])
def test_words_that_were_never_drawn_are_named(prompt, words, folder, capsys):
    Image.new('RGB', (64, 64)).save('in.png')
    for argv in (['generate', prompt], ['edit', 'in.png', f'add {prompt}']):
        assert main([*argv, '--steps', '1', '--model', str(folder), '--device', 'cpu', '--out', 'x.png']) == 0
        said = capsys.readouterr(); assert ('never learned' in said.err) == bool(words) and (words or '') in said.err and 'never' not in said.out

def test_a_model_of_the_whole_world_has_drawn_them(folder, capsys):
    main(['generate', 'an orange anchor', '--steps', '1', '--model', str(folder), '--device', 'cpu']); assert 'never learned' in capsys.readouterr().err
    pipe = cli.loaded(str(folder), 'cpu'); pipe.record['dial'] = 'hard'; cli._say_never_drawn(pipe, ['an orange anchor'], vocabulary())
    assert 'never learned' not in capsys.readouterr().err

def test_an_answer_that_is_cut_says_so(folder, capsys, monkeypatch):
    Image.new('RGB', (64, 64)).save('in.png')
    asked = ['answer', 'in.png', 'is there a star', '--model', str(folder), '--device', 'cpu']
    assert main([*asked, '--max-tokens', '2']) == 0
    said = capsys.readouterr(); assert len(said.out.split()) == 2 and 'cut after 2 tokens; a larger --max-tokens reads on' in said.err      # a random model does not end
    assert main(asked) == 0; assert 'cut after 8 tokens' in capsys.readouterr().err

def test_an_answer_that_ends_says_nothing(capsys):
    cli._answer(type('Pipe', (), dict(answer=lambda self, *a, **kw: 'yes', pictures=lambda self, image: (None, [])))(), 'in.png', 'is it', None)
    said = capsys.readouterr(); assert (said.out, said.err) == ('yes\n', '')

def test_what_was_done_to_a_picture_is_said(folder, capsys):
    Image.new('RGB', (90, 64)).save('in.png')
    for argv in (['answer', 'in.png', 'is there a star'], ['reconstruct', 'in.png'], ['edit', 'in.png', 'remove the star', '--steps', '1']):
        assert main([*argv, '--model', str(folder), '--device', 'cpu']) == 0; assert 'crop 90x64' in (said := capsys.readouterr()).err and 'crop' not in said.out

def test_a_model_of_word_pieces_has_room_for_a_sentence(monkeypatch):
    from spar.backbones import mllm
    m, asked = tiny_pipeline(vocabulary()).opened_mllm, []
    monkeypatch.setattr(m.hf, 'generate', lambda max_new_tokens, **kw: asked.append(max_new_tokens) or torch.zeros(1, 1, dtype=int))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', mllm.AnswerCut)
        m.answer(None, ['is there a star'])
        monkeypatch.setattr(mllm, 'is_word_level', lambda tokenizer: False)
        for limit in (None, 3): m.answer(None, ['is there a star'], limit)
    assert asked == [8, 128, 3]


# ---- what a terminal cannot print, and where we are ------------------------------------------------------------------
def test_what_cannot_be_printed_is_escaped(tmp_path):
    env = environment(ROOT, PYTHONIOENCODING='ascii', PYTHONUTF8='0')
    for name in ('caf\u00e9.png', os.fsdecode(b'caf\xe9.png')):
        done = subprocess.run([*SPAR, 'reconstruct', name], env=env, capture_output=True, cwd=tmp_path)
        assert done.returncode == 1 and b'caf\\' in done.stderr and b'no such file' in done.stderr and b'Traceback' not in done.stderr
    (tmp_path/'odd.py').write_text('def words():\n    "Odd letters."\n    print("caf\\u00e9 \\udce9")\n')
    code = "import sys; from spar import command; command.COMMANDS['words'] = 'odd:words'; sys.exit(command.main(['words']))"
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, b'caf\\xe9 \\udce9\n'), done.stderr

def test_nobody_reads_on(folder):
    done = subprocess.run(f'{sys.executable} -c "import sys; from spar import command\nsys.exit(command.main([\'words\', \'--model\', \'{folder}\']))" | head -1; echo ${{PIPESTATUS[0]}}', shell=True, executable='/bin/bash',
                          env=environment(ROOT), capture_output=True, text=True)
    assert done.stdout.split()[-1] == '0' and 'Traceback' not in done.stderr

@pytest.mark.parametrize('argv', [['stage', 'prepare'], ['stage'], ['stage', '--ablation', 'no_dtr'], ['models', '--profile', 'spar-1b']])
def test_outside_a_checkout(argv, capsys, tmp_path, monkeypatch):
    code, said = fails(capsys, *argv); assert code == 1 and 'Clone the repository' in said and str(tmp_path) in said
    monkeypatch.chdir(ROOT/'nbs'); assert f'Run it in {ROOT}' in fails(capsys, *argv)[1]

def test_inside_a_checkout(capsys, monkeypatch):
    monkeypatch.chdir(ROOT); assert main(['stage']) == 0; assert 'unified_2_joint' in capsys.readouterr().out.split()
    assert main(['stage', '--ablation', 'no_dtr']) == 0 and capsys.readouterr().out.startswith('dvc exp run --temp --name no-dtr')
    assert "Did you mean 'prepare'" in fails(capsys, 'stage', 'prepar')[1]

def test_a_library_of_an_extra_is_named(monkeypatch, capsys):
    monkeypatch.chdir(ROOT); monkeypatch.setitem(sys.modules, 'papermill', None)
    assert 'papermill is not installed' in (said := fails(capsys, 'stage', 'prepare', '--profile', 'smoke')[1]) and '"spar[train]"' in said

def test_a_device_that_is_not_there(folder, capsys):
    code, said = fails(capsys, 'generate', 'a star', '--model', folder, '--device', 'cuda:77'); assert code == 1 and said.startswith('spar generate: --device cuda:77: ') and '\n' not in said

def test_words(folder, capsys):
    assert main(['words', '--model', str(folder)]) == 0; said = capsys.readouterr().out.split(); assert 'star' in said and said == sorted(said) and not any('<' in w for w in said)
    assert main(['words']) == 0; both = capsys.readouterr(); assert set(both.out.split()) == set(vocabulary()) and 'no model' in both.err
