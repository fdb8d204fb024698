"""Situations that users reported, in the public benchmarks: free answers, refusals, other endpoints, NaN, odd picture files."""
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from test_protocols import SAMPLING, SYSTEM, files, paint

from spar.images import read_image, squared
from spar.command import main
from spar.scale.benchmarks.imgedit import imgedit_result, parse_imgedit, run_imgedit
from spar.scale.benchmarks.judges import EndpointJudge, JudgeError, JudgeRefusal, Reply
from spar.scale.benchmarks.mmvp import parse_letter, run_mmvp
from spar.scale.benchmarks.reconstruction import _read_square, run_reconstruction
from spar.scale.benchmarks.run import spar_drawer
from spar.scale.benchmarks.wise import parse_wise, run_wise

LETTERS = {
    'b': [
        'The animal is facing a wall, so (b).', 'There is a shadow in the picture. B', 'Not (a). (b)', 'Option A is wrong; B',
        '**B**', 'Answer: B', 'b)', 'b', '(B).', '（ｂ）', '【b】', 'The answer is **(b)** because a dog is there.', 'A or B? B',
        '<think>It is a wall. (a)</think>\n\n(b)', "It can't be (a), so it must be (b).", 'rather than (a), (b)',
        '(a) Open (b) Closed\nAnswer: (b)', 'A is false, B is true', 'It has a tail and a beak.\nb', '(b), not (a)', '答案是B。',
    ],
    'a': [
        'a', 'A', '(a)', 'a.', 'A. Open', '**a)** open', 'The answer is a.', 'Answer: a', 'Option A', 'option a', 'A is the right option.',
        'It is not (b) but (a).',
        'A is correct, since B shows a wall.', 'B is wrong, a is right', 'There is a dog. (a)', '(a) because (b) shows a wall', "“a”", '选A，因为',
    ],
    None: [
        '', 'Both', 'Both (a) and (b).', '(a) or (b)', 'either a or b', 'A and B are both wrong', 'Neither (a) nor (b).', 'A dog.',
        'It is facing a', 'a wall', 'The answer is a dog', 'Not (a).', '(a) Open (b) Closed', '<think>so it is (b)', 'a/b', 'at 5 a.m.',
    ],
}


@pytest.mark.parametrize('letter, text', [(k, t) for k, texts in LETTERS.items() for t in texts])
def test_a_letter_is_read_and_the_article_is_not(letter, text):
    assert parse_letter(text) == letter


def test_an_answer_in_doubt_is_unparsed_and_wrong(tmp_path):
    (tmp_path/'MMVP Images').mkdir()
    rows = '1,Is it red?,(a) Yes (b) No,(a)\n2,Is it red?,(a) Yes (b) No,(b)\n'
    (tmp_path/'Questions.csv').write_text('Index,Question,Options,Correct Answer\n' + rows)
    for k in (1, 2): Image.new('RGB', (8, 8), (k * 100, 0, 0)).save(tmp_path/f'MMVP Images/{k}.jpg')
    def doubts(m): return Reply('a wall' if m[0]['content'][0]['image'].getpixel((0, 0))[0] < 150 else 'so (b)', 'x')
    result = run_mmvp(doubts, tmp_path, tmp_path/'run', SYSTEM)
    assert (result['unparsed'], result['per_question'], result['per_pair']) == (1, .5, 0)


NAMES = ('Prompt Compliance', 'Visual Naturalness', 'Physical & Detail Integrity')
EDIT = [
    '1. {}: 4\n2. {}: 3\n3. {}: 2', '1) **{}**: 4\n2) **{}**: 3\n3) **{}**: 2', '{}: 4 (cup added)\n{}: 3 (2 seams)\n{}: 2 - soft',
    '{}: 4, {}: 3, {}: 2', '{}: 4; {}: 3; {}: 2', '{}: 4 {}: 3 {}: 2', '{{"{}": 4, "{}": 3, "{}": 2}}', '{{"{}": "4/5", "{}": "3", "{}": 2.0}}',
    '```json\n{{"scores": {{"{}": 4, "{}": 3, "{}": 2}}, "total": 9}}\n```', '{}: 4\n{}: 3\n{}: 2\nTotal: 9', '{}: 4/5\n{}: 3/5\n{}: 2/5\n**Total**: 9/15',
    '{}: 4.\n{}: 3.\n{}: 2.', '**{}:** 4\n**{}:** **3**\n**{}**: __2__', '<think>{0}: 1\n{1}: 1\n{2}: 1</think>\n{0}: 4\n{1}: 3\n{2}: 2',
    'Brief reasoning: 5 of 5: fine\n{}: 4\n{}: 3\n{}: 2', '| {} | 4 |\n| {} | 3 |\n| {} | 2 |', '{} (1-5): 4\n{} (1-5): 3\n{} (1-5): 2',
    '[{{"criterion": "{}", "score": 4}}, {{"criterion": "{}", "score": 3}}, {{"criterion": "{}", "score": 2}}]', '{} 4/5, {} 3/5, {} 2/5',
    '{{"{}": {{"reason": "cup", "score": 4}}, "{}": {{"score": 3}}, "{}": {{"score": 2}}}}', '{} (out of 5): 4\n{} (out of 5): 3\n{} (out of 5): 2',
    '{}:\n4\n{}:\n3\n{}:\n2',
]
UNREAD = [
    '{}: 6\n{}: 3\n{}: 2', '{}: 0\n{}: 3\n{}: 2', '{}: -1\n{}: 3\n{}: 2', '{}: 4\n{}: 3', '{}: 4 or 5\n{}: 3\n{}: 2', '{}: 4-5\n{}: 3\n{}: 2',
    '{}: 4 cups\n{}: 3\n{}: 2', '{}: 8/10\n{}: 6/10\n{}: 4/10', '1. {}\n2. {}\n3. {}', '{}: 3.5\n{}: 3\n{}: 2', '<think>{}: 4\n{}: 3\n{}: 2',
    '<think>{}: 4\n{}: 3\n{}: 2</think>I cannot say.', '{0}: 4\n{0}: 5\n{1}: 3\n{2}: 2', '4\n3\n2', 'Total: 9',
]


@pytest.mark.parametrize('names', [NAMES, ('Style Fidelity', 'Content Preservation', 'Rendering Quality'), ('Form', 'Beauty', 'Depth')])
def test_grades_of_an_edit_in_every_form(names):
    assert [(t, parse_imgedit(t.format(*names))) for t in EDIT] == [(t, [4, 3, 2]) for t in EDIT]
    assert [(t, parse_imgedit(t.format(*names))) for t in UNREAD] == [(t, None) for t in UNREAD]


def test_grades_two_and_three_may_not_exceed_the_first():
    assert imgedit_result([dict(id='a', kind='add')], dict(a=parse_imgedit('1. A: 2\n2. B: 5\n3. C: 1')))['add'] == pytest.approx(5/3)


@pytest.mark.parametrize('text, grades', [
    ('1. Consistency: 2\n2. Realism: 1\n3. Aesthetic Quality: 0', [2, 1, 0]),
    ('Consistency: 2 (flag), Realism: 1, Aesthetic Quality: 0, Total: 3', [2, 1, 0]),
    ('{"Consistency": 2, "Realism": "1/2", "aesthetic_quality": 0, "total": 3}', [2, 1, 0]),
    ('<think>Consistency: 0</think>**Consistency**: 2.\n**Realism**: **1**\n**Aesthetics**: 0/2', [2, 1, 0]),
    ('Consistency Score: 2\nRealism Score: 1\nAesthetic Quality Score: 0', [2, 1, 0]),
    ('Consistency: 3\nRealism: 1\nAesthetic Quality: 0', None), ('Consistency: 1 or 2\nRealism: 1\nAesthetic Quality: 0', None),
    ('Consistency: 2/5\nRealism: 1/5\nAesthetic Quality: 0/5', None), ('1. Consistency\n2. Realism\n3. Aesthetic Quality', None),
    ('<think>Consistency: 2\nRealism: 1\nAesthetic Quality: 0</think>', None), ('Consistency: -1\nRealism: 1\nAesthetic Quality: 0', None),
])
def test_grades_of_wise_in_every_form(text, grades):
    assert parse_wise(text) == grades


class Endpoint(BaseHTTPRequestHandler):
    "`server.rule(body, key)` gives (status, body of the answer)."
    def log_message(self, *a): pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        text = next(p['text'] for p in body['messages'][-1]['content'] if p['type'] == 'text')
        key = text.split('number ')[1].split()[0].strip('".') if 'number ' in text else ''
        self.server.asked.append(key)
        status, answer = self.server.rule(body, key)
        raw = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header('Content-Length', str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


GRADES = 'Consistency: 2\nRealism: 1\nAesthetic Quality: 0'
HELLO = [dict(role='user', content=[dict(type='text', text='number 1')])]

def says(content=GRADES, **more):
    return 200, dict(model='judge-1', choices=[dict(message=dict(content=content), **more)])

def error(status, message, code=None): return status, dict(error=dict(code=code, message=message))


@pytest.fixture
def server():
    s = ThreadingHTTPServer(('127.0.0.1', 0), Endpoint)
    s.daemon_threads, s.asked, s.rule, s.url = True, [], lambda body, key: says(), f'http://127.0.0.1:{s.server_port}/v1'
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()

def wise(server, tmp_path, known, **kw):
    judge = EndpointJudge(server.url, 'gpt', pause=.01, tries=2, **kw)
    return run_wise(paint, judge, tmp_path/'f', tmp_path/'out', SYSTEM, SAMPLING, known=known, workers=1)


REFUSALS = [
    error(400, "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.", 'content_filter'),
    error(400, 'Your request was rejected as a result of our safety system.', 'content_policy_violation'),
    error(403, 'Your chosen model requires moderation and your input was flagged for "violence".'),
    error(400, 'Input data may contain inappropriate content.', 'data_inspection_failed'),
    says(None, finish_reason='content_filter'), (200, dict(choices=[dict(message=dict(content=None, refusal='I will not.'))])),
]

@pytest.mark.parametrize('refusal', REFUSALS)
def test_one_refused_question_does_not_block_the_rest(refusal, server, tmp_path):
    known = files(tmp_path/'f', 10)
    server.rule = lambda body, key: refusal if key == '5' else says()
    result = wise(server, tmp_path, known)
    assert (result['answers'], result['refused'], result['unparsed']) == (9, 1, 0) and server.asked.count('5') == 1
    record = next(json.loads(line) for line in next((tmp_path/'out').glob('*/answers-0.jsonl')).open() if '"5"' in line)
    assert record['scores'] is None and record['refused']
    asked = len(server.asked)
    assert wise(server, tmp_path, known) == result and len(server.asked) == asked

@pytest.mark.parametrize('fault', [
    error(401, 'Incorrect API key provided.', 'invalid_api_key'), error(403, 'Your account has no access to this model.'),
    error(429, 'You exceeded your current quota.', 'insufficient_quota'), error(400, 'invalid image'), error(404, 'no such model'),
    error(403, 'Sorry, your request was blocked.'), error(500, 'content_filter is down')])
def test_what_is_no_refusal_still_stops(fault, server, tmp_path):
    known = files(tmp_path/'f', 10)
    server.rule = lambda body, key: fault if key == '5' else says()
    with pytest.raises(JudgeError, match='questions are left') as e: wise(server, tmp_path, known)
    assert not isinstance(e.value, JudgeRefusal) and not list((tmp_path/'out').glob('*/result.json'))


def refuses_settings(body, key):
    if 'max_tokens' in body: return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
    if 'temperature' in body: return error(400, "'temperature' does not support 0 with this model. Only the default (1) value is supported.")
    return says([dict(type='text', text=GRADES[:20]), dict(type='text', text=GRADES[20:])])

def test_an_endpoint_that_refuses_settings_and_answers_in_parts(server, tmp_path, capsys):
    known, server.rule = files(tmp_path/'f', 10), refuses_settings
    result = wise(server, tmp_path, known)
    assert (result['answers'], result['unparsed'], result['protocol']['judge']['temperature']) == (10, 0, None)
    said = capsys.readouterr().err
    assert said.count('does not take max_tokens') == said.count('does not take temperature') == 1 and result['protocol']['id'] in said
    asked = len(server.asked)
    assert wise(server, tmp_path, known) == result and len(server.asked) == asked
    options = dict(temperature=None, tokens_name='max_completion_tokens')
    assert wise(server, tmp_path, known, **options) == result and len(server.asked) == asked, 'the same protocol, said beforehand'

def test_a_temperature_refused_half_way_mixes_nothing(server, tmp_path):
    known = files(tmp_path/'f', 10)
    server.rule = lambda body, key: refuses_settings(body, key) if len(server.asked) > 4 else says()
    result = wise(server, tmp_path, known)
    assert result['answers'] == 10 and result['protocol']['judge']['temperature'] is None
    assert sorted(len(p.read_text().splitlines()) for p in (tmp_path/'out').glob('*/answers-0.jsonl')) == [4, 10]

def test_settings_are_left_alone_when_the_error_is_another(server):
    server.rule = lambda body, key: error(400, 'max_tokens must be at most 1024')
    with pytest.raises(JudgeError, match='at most 1024'): EndpointJudge(server.url, 'gpt')(HELLO)
    server.rule = lambda body, key: error(422, 'temperature must be strictly positive') if 'temperature' in body else says('x')
    assert EndpointJudge(server.url, 'gpt')(HELLO).text == 'x'

@pytest.mark.parametrize('argv, error', [
    (('--judge-temperature', '-1'), '2'), (('--judge-temperature', 'cold'), '2'),
    (('--judge-local', 'folder', '--judge-temperature', '1'), 'no use for --judge-temperature')])
def test_options_of_the_judge(argv, error, tmp_path):
    with pytest.raises(SystemExit, match=error): main(['evaluate', 'wise', '--prompts', str(tmp_path), '--out', str(tmp_path), *argv])


def photos(tmp_path, n=4):
    (tmp_path/'photos').mkdir()
    noise = np.random.default_rng(0)
    for k in range(n): Image.fromarray(noise.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(tmp_path/f'photos/{k}.png')
    return tmp_path/'photos'

@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_a_reconstruction_that_is_not_finite_names_its_picture(value, tmp_path):
    def broken(x):
        y = x.clone()
        y[2, 1, 3, 3] = value
        return y
    with pytest.raises(ValueError, match='the reconstruction of 2.png: NaN or inf'):
        run_reconstruction(broken, photos(tmp_path), tmp_path/'out', SYSTEM, 32, device='cpu')
    assert [p.name for p in (tmp_path/'out').rglob('*') if p.is_file()] == ['run.json']

def test_a_drawing_that_is_not_finite_names_its_prompt():
    from types import SimpleNamespace
    pipe = SimpleNamespace(sample=lambda texts, *a, **kw: torch.full((len(texts), 3, 4, 4), torch.nan), tokenizer=None)
    import spar.pipeline
    with pytest.MonkeyPatch.context() as m:
        m.setattr(spar.pipeline, 'checked_texts', lambda texts, tokenizer: texts)
        with pytest.raises(ValueError, match="number 7 \\('a cup'\\): NaN or inf"): spar_drawer(pipe)(['a cup'], None, [7])


def odd_pictures(folder):
    folder.mkdir()
    ramp = np.linspace(0, 1, 48*32).reshape(48, 32)
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(folder/'grey16.png')
    clear = np.zeros((48, 32, 4), np.uint8)
    clear[:24] = (255, 0, 0, 255)                                      # below: black, but transparent
    Image.fromarray(clear).save(folder/'clear.png')
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((np.stack([ramp] * 3, -1) * 255).astype(np.uint8)).save(folder/'turned.jpg', exif=exif, quality=95)
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(folder/'grey16.tif')
    return folder

def test_reconstruction_reads_pictures_like_the_rest(tmp_path):
    folder = odd_pictures(tmp_path/'odd')
    for path in folder.iterdir():
        ours, theirs = _read_square(path, 32), np.asarray(squared(read_image(path).image, 32).image)
        assert abs(ours.astype(float) - theirs).mean() < 1, path.name
    assert 100 < _read_square(folder/'grey16.png', 32).mean() < 155 and (_read_square(folder/'clear.png', 32)[-4:] > 250).all()
    assert run_reconstruction(lambda x: x, folder, tmp_path/'out', SYSTEM, 32, device='cpu')['pictures'] == 4

def test_a_cut_picture_is_named(tmp_path):
    folder = photos(tmp_path)
    Image.effect_noise((200, 200), 50).convert('RGB').save(folder/'cut.jpg')
    (folder/'cut.jpg').write_bytes((folder/'cut.jpg').read_bytes()[:2000])
    with pytest.raises(ValueError, match='cut.jpg is damaged or cut off'):
        run_reconstruction(lambda x: x, folder, tmp_path/'out', SYSTEM, 32, device='cpu')

def test_model_and_judge_are_shown_the_same_crop(tmp_path):
    known, seen = files(tmp_path/'f', 9), []
    for k, path in enumerate(sorted(odd_pictures(tmp_path/'odd').iterdir())):
        read_image(path).image.save(tmp_path/f'f/{k}.png')
    def judge(messages):
        seen.append([np.asarray(p['image']) for p in messages[0]['content'][1:]])
        return Reply('A: 4\nB: 3\nC: 2', 'x')
    judge.facts = dict(kind='scripted')
    def keep(texts, sources, indices): return [squared(read_image(s).image, 16).image for s in sources]
    run_imgedit(keep, judge, tmp_path/'f', tmp_path/'f', tmp_path/'out', SYSTEM, SAMPLING, known=known, workers=1)
    assert len(seen) == 9 and all((before == after).all() for before, after in seen)
