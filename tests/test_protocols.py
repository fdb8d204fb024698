"""Public benchmarks against a small endpoint that fails in every known way, kills in the middle, files that are not the published ones."""
import hashlib, json, os, signal, subprocess, sys, threading, time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
import numpy as np
import pytest
import torch
from PIL import Image
from conftest import ROOT
from spar.backbones.perceptual import PerceptualVGG
from spar.command import main
from spar.scale.benchmarks.geneval import load_geneval
from spar.scale.benchmarks.imgedit import IMGEDIT_TYPES, load_imgedit, run_imgedit
from spar.scale.benchmarks.judges import EndpointJudge, JudgeError, Ledger
from spar.scale.benchmarks.reconstruction import reconstructs_at, run_reconstruction
from spar.scale.benchmarks.run import SHA256, Wanted, draw_all, prompt_file
from spar.scale.benchmarks.wise import WISE_FILES, load_wise, run_wise

GRADES = dict(wise='Consistency: 2\nRealism: 1\nAesthetic Quality: 0', imgedit='Compliance: 4\nNaturalness: 3\nDetail: 2')
SYSTEM, SAMPLING = dict(name='painter', sha256='0'), dict(steps=2, guidance=1., seed=0)


class Endpoint(BaseHTTPRequestHandler):
    def log_message(self, *a): pass
    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        text = next(p['text'] for p in body['messages'][-1]['content'] if p['type'] == 'text')
        key = text.split('number ')[1].split()[0].strip('".')
        with server.lock: server.asked.append(key); n = len(server.asked); fault = server.script.pop(0) if server.script else None
        server.headers_seen.append(self.headers.get('Authorization'))
        if server.hold_after is not None and n > server.hold_after: server.held.set(); server.gate.wait(); return
        if fault == 'slow': time.sleep(1.2)
        if fault == 'hang up': self.connection.close(); return
        status, head = (fault if isinstance(fault, int) else 200), {}
        if fault == 'wait': status, head = 429, {'Retry-After': '1'}
        answer = dict(model='judge-2026', choices=[dict(message=dict(content=server.grade(key)))])
        told = '{' if fault == 'half' else json.dumps({'choices': []} if fault == 'empty' else answer)
        try:
            self.send_response(status); [self.send_header(*h) for h in head.items()]
            self.send_header('Content-Length', str(len(told))); self.end_headers(); self.wfile.write(told.encode())
            if status == 200 and fault is None: server.answered.append(key)
        except OSError: pass


@pytest.fixture
def server():
    s = ThreadingHTTPServer(('127.0.0.1', 0), Endpoint); s.daemon_threads = True
    s.asked, s.answered, s.script, s.headers_seen, s.hold_after, s.grade = [], [], [], [], None, lambda key: GRADES['wise']
    s.lock, s.gate, s.held, s.url = threading.Lock(), threading.Event(), threading.Event(), f'http://127.0.0.1:{s.server_port}/v1'
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.gate.set(); s.shutdown(); s.server_close()


def write(folder, name, text):
    (folder/name.split('/')[1]).write_text(text)
    return {name: hashlib.sha256(text.encode()).hexdigest()}

def files(tmp, n=12):
    "Small prompt files in the published layouts, their source pictures, and their hashes."
    tmp.mkdir(exist_ok=True)
    numbers = [1, 401, 568, 701, 801, 901] + list(range(2, n - 4))
    known = write(tmp, WISE_FILES[0], json.dumps([dict(prompt_id=k, Prompt=f'number {k} ', Explanation=f'e{k}') for k in numbers]))
    for name in WISE_FILES[1:]: known |= write(tmp, name, '[]')
    edits = {str(k): dict(id=f'{k}.png', prompt=f'number {k} ', edit_type=IMGEDIT_TYPES[k % 9]) for k in range(n)}
    known |= write(tmp, 'imgedit/basic_edit.json', json.dumps(edits))
    known |= write(tmp, 'imgedit/prompts.json', json.dumps({t: f'{t}: <edit_prompt>' for t in IMGEDIT_TYPES}))
    for k in range(n): Image.new('RGB', (9, 9), (k, 0, 0)).save(tmp/f'{k}.png')
    return known

def paint(texts, sources, indices): return [Image.new('RGB', (8, 8), (0, i % 255, 0)) for i in indices]

def go(which, folder, out, url, known, draw=paint, sampling=SAMPLING, **kw):
    judge = EndpointJudge(url, 'gpt', timeout=kw.pop('timeout', 5), pause=.01, tries=kw.pop('tries', 6))
    if which == 'wise': return run_wise(draw, judge, folder, out, SYSTEM, sampling, known=known, workers=1, **kw)
    return run_imgedit(draw, judge, folder, folder, out, SYSTEM, sampling, known=known, workers=1, **kw)


PROGRAM = '''
import sys, json
sys.path.insert(0, sys.argv[1] + '/tests'); sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_protocols as t
t.go(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5], json.loads(sys.argv[6]), rank=int(sys.argv[7]), world=int(sys.argv[8]))
'''
def start(which, folder, out, url, known, rank=0, world=1):
    return subprocess.Popen([sys.executable, '-c', PROGRAM, str(ROOT), which, str(folder), str(out), url, json.dumps(known), str(rank), str(world)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, 'OMP_NUM_THREADS': '1'})


@pytest.mark.parametrize('which', ['wise', 'imgedit'])
def test_killed_half_way_it_asks_each_remaining_question_once(which, server, tmp_path):
    known, server.grade, server.hold_after = files(tmp_path/'f'), lambda key: GRADES[which], 5
    process = start(which, tmp_path/'f', tmp_path/'out', server.url, known)
    assert server.held.wait(90), process.stderr.read().decode()
    process.send_signal(signal.SIGKILL); process.wait()
    assert len(server.answered) == 5
    ledger = next((tmp_path/'out').glob('*/answers-0.jsonl'))
    with open(ledger, 'ab') as f: f.write(b'{"key": "7", "scores": [2')              # what a kill inside a write leaves
    first, server.hold_after, server.asked = list(server.answered), None, []
    result = go(which, tmp_path/'f', tmp_path/'out', server.url, known)
    assert result['answers'] == 12 and not set(first) & set(server.asked)
    assert Counter(server.answered) == Counter(set(server.answered)) and len(server.answered) == 12   # each was answered once
    assert Counter(server.asked).most_common(1)[0][1] == 1
    server.asked.clear()
    assert go(which, tmp_path/'f', tmp_path/'out', server.url, known) == result and not server.asked

def test_two_processes_share_the_questions(server, tmp_path):
    known = files(tmp_path/'f'); server.grade = lambda key: GRADES['imgedit']
    both = [start('imgedit', tmp_path/'f', tmp_path/'out', server.url, known, r, 2) for r in range(2)]
    assert [p.wait(90) for p in both] == [0, 0], 'torchrun ends all processes when one fails: whoever is done first must not'
    assert Counter(server.asked) == {str(k): 1 for k in range(12)}
    result = go('imgedit', tmp_path/'f', tmp_path/'out', server.url, known)
    assert len(server.asked) == 12 and result['overall'] == 3.0

def test_every_passing_fault_is_waited_out(server, tmp_path, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'sesame')
    known, server.script = files(tmp_path/'f'), ['slow', 503, 'half', 'hang up', 'empty', None, 'wait']
    began = time.monotonic()
    result = go('wise', tmp_path/'f', tmp_path/'out', server.url, known, timeout=.6)
    assert result['answers'] == 12 and result['unparsed'] == 0 and time.monotonic() - began > 1    # Retry-After: 1 was obeyed
    assert len(server.asked) == 12 + 6
    assert set(server.headers_seen) == {'Bearer sesame'}
    assert not any(b'sesame' in p.read_bytes() for p in (tmp_path/'out').rglob('*') if p.is_file())

@pytest.mark.parametrize('fault', [400, 401, 404])
def test_what_waiting_does_not_mend_stops_at_once_and_loses_nothing(fault, server, tmp_path):
    known, server.script = files(tmp_path/'f'), [None, None, fault]
    with pytest.raises(JudgeError, match=f'HTTP {fault}.*10 of 12 questions are left'): go('wise', tmp_path/'f', tmp_path/'out', server.url, known)
    assert len(server.asked) == 3
    assert go('wise', tmp_path/'f', tmp_path/'out', server.url, known)['answers'] == 12 and len(server.asked) == 3 + 10

def test_an_endpoint_that_never_answers_ends_after_its_tries(server, tmp_path):
    known, server.script = files(tmp_path/'f'), [500] * 99
    with pytest.raises(JudgeError, match='no answer in 4 requests'): go('wise', tmp_path/'f', tmp_path/'out', server.url, known, tries=4)
    assert len(server.asked) == 4

def test_a_wait_longer_than_the_patience_ends_the_run(server):
    judge = EndpointJudge(server.url, 'gpt', patience=.5); server.script = ['wait']
    with pytest.raises(JudgeError, match='asks to wait 1 s'): judge([dict(role='user', content=[dict(type='text', text='number 1')])])

def test_unreadable_answers_are_counted_and_not_asked_again(server, tmp_path):
    known = files(tmp_path/'f'); server.grade = lambda key: 'No idea.' if key == '3' else GRADES['wise']
    result = go('wise', tmp_path/'f', tmp_path/'out', server.url, known)
    assert (result['unparsed'], result['asked_again'], server.asked.count('3')) == (1, 1, 3)
    go('wise', tmp_path/'f', tmp_path/'out', server.url, known)
    assert server.asked.count('3') == 3

def test_only_one_prompt_in_a_category_and_it_is_unreadable(server, tmp_path):
    known = files(tmp_path/'f'); server.grade = lambda key: 'No idea.' if key == '901' else GRADES['wise']
    with pytest.raises(ValueError, match='chemistry'): go('wise', tmp_path/'f', tmp_path/'out', server.url, known)

def test_a_changed_prompt_file_names_both_hashes(tmp_path):
    known = files(tmp_path)
    path = tmp_path/'basic_edit.json'; path.write_text(path.read_text().replace('adjust', 'alter'))
    with pytest.raises(ValueError) as e: load_imgedit(tmp_path, known=known)
    assert known['imgedit/basic_edit.json'] in str(e.value) and hashlib.sha256(path.read_bytes()).hexdigest() in str(e.value)
    known['imgedit/basic_edit.json'] = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="unknown 'alter'"): load_imgedit(tmp_path, known=known)
    (tmp_path/'prompts.json').unlink()
    with pytest.raises(FileNotFoundError, match=SHA256['imgedit/prompts.json']): prompt_file(tmp_path, 'imgedit/prompts.json')

def test_other_sampling_is_another_run_and_another_judge_another_column(server, tmp_path):
    known = files(tmp_path/'f')
    first = go('wise', tmp_path/'f', tmp_path/'out', server.url, known)
    with pytest.raises(ValueError, match='protocol.sampling'): go('wise', tmp_path/'f', tmp_path/'out', server.url, known, sampling=dict(SAMPLING, steps=3))
    Ledger(tmp_path/'out').close()
    (tmp_path/'rubric.txt').write_text('Grade {prompt}, that is {explanation}.')
    second = go('wise', tmp_path/'f', tmp_path/'out', server.url, known, rubric=tmp_path/'rubric.txt')
    assert first['protocol']['id'] != second['protocol']['id'] and len(server.asked) == 24
    assert {p.parent.name for p in (tmp_path/'out').glob('*/result.json')} == {first['protocol']['id'], second['protocol']['id']}

def test_pictures_do_not_depend_on_processes_or_batches(tmp_path, monkeypatch):
    noise = lambda texts, sources, indices: [Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)) for i in indices]
    want = [Wanted(f'{k}.png', f't{k}', 10 + k) for k in range(7)]
    draw_all(noise, want, tmp_path/'a', 7)
    for r in (2, 1, 0):                                                # every process writes its own
        monkeypatch.setenv('RANK', str(r)); monkeypatch.setenv('WORLD_SIZE', '3')
        draw_all(noise, want, tmp_path/'b', 2, r, 3)
    assert all((tmp_path/'a'/w.path).read_bytes() == (tmp_path/'b'/w.path).read_bytes() for w in want)


def random_inception(path):
    "Random weights of torch-fidelity's own class; its constructor insists on a file, so it is given an empty one for a moment."
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with mock.patch('torch.load', return_value={}), mock.patch.object(FeatureExtractorInceptionV3, 'load_state_dict'):
        net = FeatureExtractorInceptionV3('inception-v3-compat', ['2048'], 'none')
    for p in net.parameters():
        if p.dim() == 4: torch.nn.init.kaiming_normal_(p)               # so that features differ between pictures
    torch.save(net.state_dict(), path)

@pytest.mark.slow
def test_reconstruction_with_inception_and_vgg_from_files(tmp_path):
    random_inception(tmp_path/'inception.pth')
    from torchvision.models.vgg import cfgs, make_layers
    torch.manual_seed(0); torch.save({f'features.{k}': v for k, v in make_layers(cfgs['D']).state_dict().items()}, tmp_path/'vgg.pth')
    (tmp_path/'photos/n01').mkdir(parents=True); g = np.random.default_rng(0)
    for k in range(5): Image.fromarray(g.integers(0, 255, (40 + k, 50, 3), dtype=np.uint8)).save(tmp_path/f'photos/n01/{k}.JPEG')
    calls = []
    def blur(x): calls.append(len(x)); return torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    go = lambda out, f=blur, **kw: run_reconstruction(f, tmp_path/'photos', tmp_path/out, SYSTEM, 32, inception_weights=tmp_path/'inception.pth',
                                                        vgg_weights=tmp_path/'vgg.pth', device='cpu', least=4, shard=2, **kw)
    assert go('a', rank=1, world=2) is None and calls == [2]
    result = go('a'); assert calls == [2, 2, 1]                        # the second shard was not repeated
    assert sum(calls) == 5 and result == json.loads((tmp_path/'a/result.json').read_text())
    same = go('b', lambda x: x)
    assert result['rfid_inception'] > 1e-3 > abs(same['rfid_inception']) and result['lpips_vgg'] > 1e-3 > same['lpips_vgg'] and same['psnr'] == 100
    assert result['ssim_range2'] > result['ssim'] and result['protocol']['rfid']['torchmetrics']
    (tmp_path/'photos/n01/9.png').write_bytes((tmp_path/'photos/n01/0.JPEG').read_bytes())
    with pytest.raises(ValueError, match='holds another run'): go('a')
    with pytest.raises(ValueError, match='not a VGG-16'): PerceptualVGG(tmp_path/'inception.pth')

def test_too_few_pictures_give_no_rfid(tmp_path):
    random_inception(tmp_path/'inception.pth'); (tmp_path/'p').mkdir(); Image.new('RGB', (40, 40)).save(tmp_path/'p/a.png')
    told = run_reconstruction(lambda x: x, tmp_path/'p', tmp_path/'out', SYSTEM, 32, inception_weights=tmp_path/'inception.pth', device='cpu')
    assert told['rfid_inception'] is None


@pytest.fixture(scope='module')
def pipeline(tmp_path_factory):
    from tiny import tiny_pipeline
    folder = tmp_path_factory.mktemp('pipe')/'pipeline'
    tiny_pipeline(['number is it red ? yes no answer with the letter of right option only . ( ) a b', *map(str, range(1000))]).save_pretrained(folder)
    return folder

def command(*argv):
    steps = ('--steps', 1) if argv[0] in ('geneval', 'wise', 'imgedit') else ()
    main(['evaluate', *(str(a) for a in (*argv, '--device', 'cpu', *steps))])

@pytest.mark.parametrize('argv, says', [
    (('reconstruction', '--sources', '.', '--only', 'draw'), 'unrecognized arguments: --only draw'),
    (('mmvp', '--prompts', '.', '--judge-url', 'x', '--guidance', 2), 'unrecognized arguments: --judge-url x --guidance 2'),
    (('geneval', '--prompts', '.', '--rubric', 'x'), 'unrecognized arguments: --rubric x'),
    (('wise', '--prompts', '.', '--judge-url', 'x', '--judge-local', 'y'), 'one judge')])
def test_no_option_is_accepted_and_ignored(argv, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as e: command(*argv, '--out', tmp_path)
    assert says in f'{e.value} {capsys.readouterr().err}'

def test_a_tokenizer_reconstructs_at_other_sides_than_its_own(pipeline):
    from spar.pipeline import SparPipeline
    tk = SparPipeline.from_pretrained(pipeline, 'cpu').image_tokenizer; own = tk.encoder.side; x = torch.rand(1, 3, 96, 96) * 2 - 1
    with torch.no_grad(): at = {S: reconstructs_at(tk)(x[..., :S, :S]) for S in (own, 32, 96)}; assert at[own].equal(tk.reconstruct(x[..., :own, :own]))
    assert all(y.shape[-2:] == (S, S) for S, y in at.items()) and tk.encoder.side == own
    with pytest.raises(ValueError, match=f'multiples of {tk.factor}'): reconstructs_at(tk)(x[..., :33, :33])

def test_the_command_draws_then_scores(pipeline, server, tmp_path, monkeypatch, capsys):
    known, server.grade = files(tmp_path/'f'), lambda key: GRADES['imgedit']
    for k, v in known.items(): monkeypatch.setitem(SHA256, k, v)
    judged = ('--model', pipeline, '--judge-url', server.url, '--judge-model', 'gpt')
    same = ('imgedit', '--prompts', tmp_path/'f', '--sources', tmp_path/'f', '--out', tmp_path/'out', *judged)
    command(*same, '--only', 'draw'); assert not server.asked and len(list((tmp_path/'out/images').glob('*.png'))) == 12
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path/'out/images').glob('*.png')}
    command(*same, '--only', 'score'); assert len(server.asked) == 12
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path/'out/images').glob('*.png')}
    assert '"overall": 3.0' in capsys.readouterr().out
    command('wise', '--prompts', tmp_path/'f', '--out', tmp_path/'wise', *judged, '--only', 'draw', '--limit', 1)
    assert len(list((tmp_path/'wise/images').glob('*.png'))) == 6
    with pytest.raises(SystemExit, match='--judge-url'): command('wise', '--prompts', tmp_path/'f', '--out', tmp_path/'w', '--model', pipeline)

def test_the_command_reconstructs_and_answers(pipeline, tmp_path, capsys):
    (tmp_path/'photos').mkdir(); g = np.random.default_rng(0)
    for k in range(3): Image.fromarray(g.integers(0, 255, (70, 80, 3), dtype=np.uint8)).save(tmp_path/f'photos/{k}.png')
    command('reconstruction', '--sources', tmp_path/'photos', '--out', tmp_path/'rec', '--model', pipeline)
    told = json.loads((tmp_path/'rec/result.json').read_text())
    assert told['pictures'] == 3 and told['protocol']['kind'] == 'native' and told['protocol']['side'] == 64 and 0 < told['psnr'] < 40
    # the paper's 256 px of a tokenizer trained at 512
    command('reconstruction', '--sources', tmp_path/'photos', '--out', tmp_path/'rec32', '--model', pipeline, '--side', 32)
    assert json.loads((tmp_path/'rec32/result.json').read_text())['protocol'].items() >= dict(kind='native', side=32).items()
    (tmp_path/'mmvp/MMVP Images').mkdir(parents=True)
    (tmp_path/'mmvp/Questions.csv').write_text('Index,Question,Options,Correct Answer\n1,Is it red?,(a) Yes (b) No,(a)\n2,Is it red?,(a) Yes (b) No,(b)\n')
    for k in (1, 2): Image.new('RGB', (64, 64), 'red').save(tmp_path/f'mmvp/MMVP Images/{k}.jpg')
    command('mmvp', '--prompts', tmp_path/'mmvp', '--out', tmp_path/'m', '--model', pipeline)
    assert json.loads(next((tmp_path/'m').glob('*/result.json')).read_text())['pairs'] == 1

@pytest.mark.skipif('SPAR_BENCHMARKS' not in os.environ, reason='set SPAR_BENCHMARKS to a folder with geneval/, wise/ and imgedit/')
def test_the_published_prompt_files():
    here = Path(os.environ.get('SPAR_BENCHMARKS', ''))
    assert Counter(i['kind'] for i in load_wise(here/'wise')) == dict(culture=400, time=167, space=133, biology=100, physics=100, chemistry=100)
    edits = dict(extract=117, style=100, add=95, adjust=94, background=94, replace=92, remove=86, action=36, compose=23)
    assert Counter(i['kind'] for i in load_imgedit(here/'imgedit')[0]) == edits
    rows, names = load_geneval(here/'geneval')
    assert Counter(r['tag'] for r in rows) == dict(single_object=80, two_object=99, counting=80, colors=94, position=100, color_attr=100)
    assert len(names) == 80 and {c['class'] for r in rows for c in r['include']} <= set(names)
