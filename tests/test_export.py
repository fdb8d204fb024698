"""What leaves the repository must work without it."""
import json, os, subprocess, sys
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline
from spar.pipeline import SparPipeline
from spar.scale.export import export, harness_processor, load_tokenizer
from spar.scale.benchmarks.judges import LocalJudge
from spar.scale.benchmarks.run import published_protocol

WORDS = ['a red star left of blue heart what colour is this ? number consistency realism']
QUESTIONS = ['what colour is this ?', 'is this a star ?', 'What colour is left of this star?']

# The first lines of the subprocess: `import spar` is an error, and torchvision's two operator schemas are declared where its binary cannot load.
STRANGER = '''
import sys, json, glob, os, importlib.util
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'spar': raise ImportError('spar is blocked')
sys.meta_path.insert(0, Blocked())
try: import spar; raise SystemExit('spar could be imported')
except ImportError: pass
import torch
where = importlib.util.find_spec('torchvision')
try: [torch.ops.load_library(f) for f in glob.glob(os.path.dirname(where.origin) + '/_C*.so')]
except (OSError, RuntimeError): pass
if not hasattr(torch.ops.torchvision, 'nms'):
    lib = torch.library.Library('torchvision', 'DEF')
    for op in ('nms', 'qnms'): lib.define(op + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
folder, picture, out, *questions = sys.argv[1:]
model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
answers, logits = [], []
for q in questions:
    talk = [dict(role='user', content=[dict(type='image', image=Image.open(picture)), dict(type='text', text=q)])]
    x = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt').to(model.device, model.dtype)
    with torch.no_grad(): logits.append(model(**x).logits[0, -1].float()); told = model.generate(**x, max_new_tokens=8, do_sample=False)
    answers.append(processor.batch_decode(told[:, x['input_ids'].shape[1]:], skip_special_tokens=True)[0].strip())
torch.save(torch.stack(logits), out)
print(json.dumps(dict(answers=answers, cls=type(model).__name__, dtype=str(model.dtype))))
'''

@pytest.fixture(scope='module')
def pipe(): return tiny_pipeline(WORDS)

@pytest.fixture
def photo(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path/'photo.png')
    return tmp_path/'photo.png'

def stranger(folder, photo, out):
    done = subprocess.run([sys.executable, '-I', '-c', STRANGER, str(folder), str(photo), str(out), *QUESTIONS], capture_output=True, text=True,
        cwd=photo.parent, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), torch.load(out, weights_only=True)

def our_logits(pipe, photo):
    x, rows = pipe.image_tokenizer.encoder(pipe.pictures(photo)[0]), []
    for q in QUESTIONS:
        ids = torch.tensor([pipe.opened_mllm.chat_ids(q, True)])
        with torch.no_grad(): rows.append(pipe.mllm(inputs_embeds=pipe.opened_mllm.splice(pipe.opened_mllm.embed(ids), ids == pipe.opened_mllm.image_token, x)).logits[0, -1])
    return torch.stack(rows)


def test_a_python_without_spar_gives_the_same_logits_and_answers(pipe, photo, tmp_path):
    folder = export(pipe, 'internvl', tmp_path/'internvl')
    told, logits = stranger(folder, photo, tmp_path/'logits.pt')
    assert told['cls'] == 'InternVLForConditionalGeneration'
    torch.testing.assert_close(logits, our_logits(pipe, photo), atol=1e-4, rtol=1e-4)
    assert told['answers'] == [pipe.answer(photo, q) for q in QUESTIONS]
    own = pipe.opened_mllm.encoder(pipe.pictures(photo)[0])
    assert (own - pipe.image_tokenizer.encoder(pipe.pictures(photo)[0])).abs().max() > 1e-3, 'the tuned encoder must differ, or this test says nothing'

def test_half_precision_is_half_as_large_and_close(pipe, photo, tmp_path):
    full, half = (export(pipe, 'internvl', tmp_path/n, half=h) for n, h in (('full', False), ('half', True)))
    size = lambda f: sum(p.stat().st_size for p in f.glob('*.safetensors'))
    assert size(half) < .55 * size(full) and json.loads((half/'config.json').read_text())['dtype'] == 'bfloat16'
    told, logits = stranger(half, photo, tmp_path/'logits.pt')
    ours = our_logits(pipe, photo)
    assert told['dtype'] == 'torch.bfloat16' and 0 < (logits - ours).abs().max() < .1 * ours.abs().max() + .05

def test_exported_pipeline_draws_the_same_pixels(pipe, photo, tmp_path):
    again = SparPipeline.from_pretrained(export(pipe, 'pipeline', tmp_path/'p'), 'cpu', 'no')
    same = lambda f: f(again).images[0].tobytes() == f(pipe).images[0].tobytes()
    assert same(lambda p: p('a red star', 2, seed=3)) and same(lambda p: p.edit(photo, 'a red star', 2, seed=3)) and same(lambda p: p.reconstruct(photo))
    assert again('a red star', 2, seed=4).images[0].tobytes() != pipe('a red star', 2, seed=3).images[0].tobytes()
    assert again.answer(photo, QUESTIONS[0]) == pipe.answer(photo, QUESTIONS[0])

@pytest.mark.parametrize('half', [False, True])
def test_tokenizer_alone(half, pipe, tmp_path):
    alone, x = load_tokenizer(export(pipe, 'tokenizer', tmp_path/'t', half=half)), torch.randn(2, 3, 64, 64)
    a, b = alone.encode(x), pipe.image_tokenizer.encode(x)
    torch.testing.assert_close(a.f_v, b.f_v, atol=.05 if half else 1e-5, rtol=.05 if half else 1e-5)
    if not half: assert torch.equal(alone.decode(b.z_f), pipe.image_tokenizer.decode(b.z_f))
    assert alone.cfg.stats == pipe.image_tokenizer.cfg.stats
    assert not any('language' in k for k in alone.state_dict())

def test_card_holds_metrics_and_their_protocol(pipe, tmp_path):
    (tmp_path/'result.json').write_text(json.dumps(dict(overall=.57, protocol=published_protocol('wise-legacy', judge='gpt'), system=dict(name='x', sha256='y'))))
    card = (export(pipe, 'pipeline', tmp_path/'p', metrics=[tmp_path/'result.json'])/'README.md').read_text()
    assert card.startswith('---\nlibrary_name: spar') and '| overall | 0.57 |' in card and published_protocol('wise-legacy', judge='gpt')['id'] in card
    assert 'streams' in card and 'FOLDER' in card

def test_nothing_is_replaced_by_accident(pipe, tmp_path):
    (tmp_path/'mine').mkdir(); (tmp_path/'mine/thesis.tex').write_text('x')
    with pytest.raises(FileExistsError, match='--overwrite'): export(pipe, 'tokenizer', tmp_path/'mine')
    assert (tmp_path/'mine/thesis.tex').read_text() == 'x'
    with pytest.raises(FileExistsError, match='thesis.tex'): export(pipe, 'tokenizer', tmp_path/'mine', overwrite=True)
    assert (tmp_path/'mine/thesis.tex').read_text() == 'x'
    for kind in ('tokenizer', 'pipeline', 'internvl'): export(pipe, kind, tmp_path/'own', overwrite=True)     # an earlier export is replaced
    with pytest.raises(ValueError, match='belongs to internvl'): export(pipe, 'tokenizer', tmp_path/'other', processor=tmp_path)

def test_the_processor_of_the_original_folder_is_kept(pipe, tmp_path):
    first = harness_processor(pipe); first.image_processor.max_patches = 5; first.save_pretrained(tmp_path/'original')
    folder = export(pipe, 'internvl', tmp_path/'internvl', processor=tmp_path/'original')
    from transformers import AutoProcessor
    assert AutoProcessor.from_pretrained(folder).image_processor.max_patches == 5

def test_exported_folder_is_a_judge(pipe, tmp_path):
    judge = LocalJudge(export(pipe, 'internvl', tmp_path/'internvl'), 'cpu', max_new_tokens=4)
    reply = judge([dict(role='user', content=[dict(type='image', image=Image.new('RGB', (64, 64), 'red')), dict(type='text', text=QUESTIONS[0])])])
    assert isinstance(reply.text, str) and len(judge.facts['sha256']) == 64 and judge.facts['kind'] == 'local'
    assert reply.text.strip() == pipe.answer(Image.new('RGB', (64, 64), 'red'), QUESTIONS[0], 4)
