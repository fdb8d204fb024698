"Situations that users reported, about machines, tokenizers, masks and templates: each was wrong once."
import contextlib, copy, json, pickle, shutil, subprocess, sys
from unittest import mock
import pytest, torch
from spar.core import freeze, has_fast_bf16, instructions, pick_precision, read_json
from spar.machine import provenance
from spar.backbones.dcae import DCAE, mini_dcae
from spar.backbones.mllm import load_mllm, mini_mllm, MLLM, pad_left
from spar.backbones.sana import mini_sana, mini_text_encoder, Text2Image
from spar.backbones.words import encode_text, is_word_level, make_tokenizer, Tokenised
from spar.mini.sana import SanaObjective
from spar.running.runner import record
from spar.scale.models.check import check_part
from spar.scale.models.parts import recipe
from spar.scale.models.random import narrow, write_mllm
from spar.tokenizer.model import new_tokenizer
from spar.training.loop import fit
from spar.training.run import _switch_on
from spar.training.objective import _CHOICES, TrainConfig
from spar.training.order import micro_batches
from spar.unified.condition import sequence
from spar.unified.flow import FlowConfig
from spar.unified.model import Unified, UnifiedConfig
from spar.unified.training import StageConfig, UnifiedObjective, validate
from spar.world.datasets import Mixture
from spar.world.tasks import Edits, SceneCaptions
from safetensors.torch import load_file
from transformers import AutoTokenizer
from conftest import ROOT
sys.path.insert(0, str(ROOT/'tools'))
from tokenising import large_tokenizer


@pytest.fixture(autouse=True)
def at_root(monkeypatch): monkeypatch.chdir(ROOT)


# --- which machine ---

CPU = torch.device('cpu')
MACHINES = {      # what torch knows of a CPU -> (instructions, is bf16 fast)
    'AVX2 alone': (['avx2'], 'avx2', False),
    'AVX-512 without bf16': (['avx2', 'avx512_f', 'avx512_bw', 'avx512_vl', 'avx512_vnni'], 'avx512', False),
    'AVX512_BF16': (['avx2', 'avx512_f', 'avx512_bf16'], 'avx512_bf16', True),
    'AMX_BF16': (['avx2', 'avx512_f', 'avx512_bf16', 'amx_tile', 'amx_bf16'], 'avx512_bf16 amx', True),
    'AMX without bf16': (['avx2', 'avx512_f', 'amx_tile', 'amx_int8'], 'avx512', False),
}


@pytest.mark.parametrize('machine', MACHINES)
def test_bf16_follows_the_instruction_itself(machine):
    known, names, fast = MACHINES[machine]
    with mock.patch('torch.cpu.get_capabilities', lambda: dict.fromkeys(known, True)):
        assert has_fast_bf16(CPU) is fast and instructions() == names
        assert pick_precision('auto', CPU) == ('bf16' if fast else 'no')
        assert provenance()['instructions'] == names


@pytest.mark.parametrize('error', [FileNotFoundError('git'), subprocess.TimeoutExpired('git', 10)], ids=['no git', 'git hangs'])
def test_a_record_is_written_without_git(tmp_path, error):
    with mock.patch('subprocess.run', side_effect=error):
        record('stage', dict(seed=3, train=dict(precision='no')), 1.5, tmp_path/'run.json', {})
    written = read_json(tmp_path/'run.json')['stage']
    assert written['commit'] is None and written['seed'] == 3
    assert written['precision'] == 'no', 'the precision of the numbers, not what this machine would choose'
    assert written['instructions'] and written['processor']


def test_no_git_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert provenance()['commit'] is None


# --- what a step asks of the tokenizer ---

WORDS = ['a red star left of blue heart make it green']
SMALL = dict(condition=dict(queries=3, layers=1), alignment=dict(block=1, hidden=16), flow=dict(steps=2))


def tiny_unified(tokenizer=None, **cfg) -> Unified:
    "Every class the real one, small and random; `tokenizer` in place of the miniature's."
    torch.manual_seed(0)
    mllm = MLLM(*mini_mllm(tokenizer or WORDS, dim=32, layers=4, heads=4, ffn=64, vision_dim=32, vision_layers=1))
    dcae = freeze(DCAE(mini_dcae(channels=(16, 16, 32, 32), enc_layers=(0, 1, 1, 1), dec_layers=(0, 1, 1, 1))))
    tok = new_tokenizer(mllm, dcae, dict(layers=1, heads=4, blocks=1))
    tok.measure(dcae, [dict(image=torch.randn(4, 3, 64, 64))])
    dit = mini_sana(text_dim=24, layers=2, heads=2, head_dim=16)
    return Unified(mllm, tok, dit, UnifiedConfig.from_dict(SMALL | cfg), dcae)


class Pairs(torch.utils.data.Dataset):
    "A caption or an edit, by number alone."
    def __init__(self, editing=False): self.editing = editing
    def __getitem__(self, k):
        image = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(k)).clamp(-1, 1)
        extra = dict(source=-image) if self.editing else {}
        return dict(image=image, text=['a red star', 'a blue heart left of a star'][k % 2], index=k, **extra)


@pytest.fixture(scope='module')
def large(): return large_tokenizer(20_000)


@contextlib.contextmanager
def counted(tokenizer, objective):
    "Counts of copies of the vocabulary, of texts read, and of texts read inside of the objective's forward."
    kind, calls, inside = type(tokenizer), dict(copies=0, texts=0, in_step=0), []
    call, copy, length, terms = kind.__call__, kind.get_vocab, kind.__len__, objective.terms
    def reads(self, *a, **k):
        calls['texts'] += 1
        calls['in_step'] += bool(inside)
        return call(self, *a, **k)
    def copies(original):
        def counts(self):
            calls['copies'] += 1
            return original(self)
        return counts
    def step(*a, **k):
        inside.append(1)
        try: return terms(*a, **k)
        finally: inside.pop()
    with mock.patch.object(kind, '__call__', reads), mock.patch.object(kind, 'get_vocab', copies(copy)), \
         mock.patch.object(kind, '__len__', copies(length)), mock.patch.object(objective, 'terms', step): yield calls


@pytest.mark.parametrize('editing', [False, True], ids=['generation', 'editing'])
@pytest.mark.parametrize('vocabulary', ['miniature', 'large'])
def test_a_step_copies_no_vocabulary_and_reads_no_text(tmp_path, large, vocabulary, editing):
    objective = UnifiedObjective(tiny_unified(large if vocabulary == 'large' else None), StageConfig('joint'))
    tokenizer = objective.model.mllm.tokenizer
    is_word_level(tokenizer)
    settings = TrainConfig(steps=3, batch_size=4, precision='no')
    with counted(tokenizer, objective) as calls:
        fit(objective, objective.tokenised(Pairs(editing)), settings, run=tmp_path/'run')
        validate(objective, Pairs(editing), n=4)
    print(calls)
    assert calls == dict(copies=0, texts=3 * 4 + 4, in_step=0)


def test_the_first_text_of_a_tokenizer_decides_what_it_is(large):
    for tokenizer, words in ((copy.deepcopy(large), False), (tiny_unified().mllm.tokenizer, True)):
        again = copy.deepcopy(tokenizer)
        with mock.patch.object(type(again), 'get_vocab', autospec=True, side_effect=type(again).get_vocab) as asked:
            for _ in range(5): encode_text(again, 'a red star')
        assert asked.call_count <= 1 and is_word_level(again) is words


def test_ids_made_in_workers_are_those_of_the_step(large):
    "Two processes, two micro-batches of each task: the same ids, the same loss to the last bit, the same drops."
    for tokenizer in (None, large):
        objective = UnifiedObjective(tiny_unified(tokenizer), StageConfig('joint'))
        for editing in (False, True):
            settings, data = TrainConfig(steps=2, batch_size=4, workers=2), Pairs(editing)
            made = list(micro_batches(objective.tokenised(data), settings, 0))
            plain = list(micro_batches(data, settings, 0))
            with torch.no_grad():
                for a, b in zip(made, plain):
                    assert 'prompt_ids' in a and 'prompt_ids' not in b
                    assert objective(a, dict(L_fm=1.)) == objective(b, dict(L_fm=1.))


def test_a_wrapped_dataset_stays_what_it_was():
    parts = dict(generation=(SceneCaptions(0), .5), editing=(Edits(0), .5))
    mixture = Mixture(parts, 0, per='batch')
    wrapped = Tokenised(mixture, lambda batch: {})
    assert wrapped.per == 'batch' and [s['index'] for s in wrapped.__getitems__([5, 6])] == [5, 6]
    assert pickle.loads(pickle.dumps(Tokenised(mixture, dict))).names == ['generation', 'editing']
    assert not hasattr(Tokenised(Pairs(), dict), '__getitems__')


def test_the_control_reads_no_text_in_its_step(tmp_path):
    tk = make_tokenizer(WORDS)
    base = Text2Image(mini_sana(text_dim=32, layers=2, heads=2, head_dim=16), mini_text_encoder(tk, 32, 1, 2), tk)
    objective = SanaObjective(base, FlowConfig())
    class Latents(Pairs):
        def __getitem__(self, k): return dict(latent=torch.ones(16, 8, 8) * k, text='a red star', index=k)
    is_word_level(tk)
    with counted(tk, objective) as calls:
        fit(objective, objective.tokenised(Latents()), TrainConfig(steps=2, batch_size=2, precision='no'), run=tmp_path/'run')
    assert calls == dict(copies=0, texts=4, in_step=0)


# --- padding is not seen ---

def _moved(condition, edit: bool) -> float:
    "How far other tokens in the padding move what the transformer attends to, at its tokens."
    f_v = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)) if edit else None
    s = sequence(condition.mllm, ['a red star', 'a red star left of a blue heart'], 3, editing=edit)
    other = s._replace(ids=torch.where(s.mask, s.ids, 9))
    assert not torch.equal(s.ids, other.ids), 'there is padding'
    return float((condition(s, f_v).tokens - condition(other, f_v).tokens)[s.mask].detach().abs().max())


@pytest.mark.parametrize('edit', [False, True], ids=['generation', 'editing'])
@pytest.mark.parametrize('attention', _CHOICES['attention'])
def test_padding_moves_nothing(attention, edit):
    "For every value of the switch: the connector, the frozen language model, and the velocity of the transformer."
    objective = UnifiedObjective(tiny_unified(), StageConfig('joint'))
    _switch_on(objective, TrainConfig(attention=attention))
    condition, mllm = objective.model.condition, objective.model.mllm
    assert condition.connector.layers[0].self_attn.config._attn_implementation == mllm.lm.config._attn_implementation
    moved = [_moved(condition, edit)]
    with torch.no_grad(): moved.append(_moved(condition, edit))
    ids, mask = pad_left([mllm.chat_ids('a red star'), mllm.chat_ids('a red star left of a blue heart')], 0)
    states = [mllm.states(mllm.embed(torch.where(mask.bool(), ids, fill)), mask, [2, 4]) for fill in (0, 9)]
    moved += [float((a - b)[mask.bool()].abs().max()) for a, b in zip(*states)]
    print(attention, moved)
    assert max(moved) == 0


@pytest.mark.parametrize('attention', [a for a in _CHOICES['attention'] if a != 'auto'])
def test_padded_and_alone_are_the_same(attention):
    objective = UnifiedObjective(tiny_unified(), StageConfig('joint'))
    _switch_on(objective, TrainConfig(attention=attention))
    condition = objective.model.condition
    both, alone = condition(['a red star', 'a red star left of a blue heart']), condition(['a red star'])
    n = int(alone.mask.sum())
    assert torch.allclose(both.tokens[0, -n:], alone.tokens[0], atol=1e-5)


# --- the teacher runs where its term has a weight, and nowhere else ---

class Network(torch.nn.Module):
    "An external teacher that counts its calls."
    map_dim, calls = 5, 0
    def map(self, images):
        Network.calls += 1
        return torch.ones(len(images), 5, 4, 4)


TEACHING = {     # (stage, lambda_a, kind, latent) -> passes of the tokenizer's encoder over the target, of the external one
    ('connector', .5, 'self', 'z_f'): (1, 0), ('connector', .5, 'self', 'dcae'): (0, 0),
    ('connector', .5, 'external', 'z_f'): (1, 0), ('connector', .5, 'external', 'dcae'): (0, 0),
    ('joint', 0., 'self', 'dcae'): (0, 0), ('joint', 0., 'external', 'z_f'): (1, 0), ('sft', 0., 'external', 'z_f'): (1, 0),
    ('joint', .5, 'none', 'dcae'): (0, 0), ('joint', .5, 'self', 'z_f'): (1, 0), ('joint', .5, 'self', 'dcae'): (1, 0),
    ('joint', .5, 'external', 'z_f'): (1, 1), ('sft', .5, 'external', 'dcae'): (0, 1),
}


@pytest.mark.parametrize('case', TEACHING, ids=lambda c: '-'.join(map(str, c)))
def test_the_teacher_runs_where_its_term_has_a_weight(case, monkeypatch, tmp_path):
    stage, lambda_a, kind, latent = case
    monkeypatch.setattr('spar.unified.model.load_features', Network)
    model = tiny_unified(alignment=dict(kind=kind, block=1, hidden=16), latent=latent)
    objective, seen = UnifiedObjective(model, StageConfig(stage, lambda_a)), []
    model.image_tokenizer.encoder.register_forward_hook(lambda *a: seen.append(1))
    Network.calls = 0
    fit(objective, objective.tokenised(Pairs()), TrainConfig(steps=1, batch_size=2, precision='no'), run=tmp_path/'run')
    assert (len(seen), Network.calls) == TEACHING[case]


# --- the transformer's own average as teacher, and alignment that ends early ---

OWN_AVERAGE = dict(alignment=dict(kind='ema', block=1, hidden=16, teacher_block=2))


class Breaks(Pairs):
    "Fails in the third step."
    def __getitem__(self, k):
        if k >= 9: raise RuntimeError('killed here')
        return super().__getitem__(k)


def trained(folder, data=Pairs(), steps=4, **stage):
    "The objective and its history after some steps of stage II with its own average as teacher."
    objective = UnifiedObjective(tiny_unified(**OWN_AVERAGE), StageConfig('joint', **stage))
    cfg = TrainConfig(steps=steps, batch_size=4, accumulate=2, lr=1e-2, log_every=1, save_every=2, precision='no')
    return objective, fit(objective, objective.tokenised(data), cfg, run=folder)


def test_a_killed_run_with_its_own_average_as_teacher_ends_with_the_same_bits(tmp_path):
    whole, history = trained(tmp_path/'whole')
    with pytest.raises(RuntimeError, match='killed here'): trained(tmp_path/'killed', Breaks())
    again, rows = trained(tmp_path/'killed')
    assert rows.rows == history.rows and all('L_align' in r for r in rows.rows)
    for part in ('named_parameters', 'named_buffers'):
        theirs = dict(getattr(again, part)())
        assert all(torch.equal(t, theirs[k]) for k, t in getattr(whole, part)()), part
    assert len([*whole.model.alignment.average.buffers()]) > 10


def test_the_average_moves_once_a_step_whatever_is_accumulated(tmp_path):
    objective, _ = trained(tmp_path/'run', steps=1)
    name = 'transformer_blocks.1.attn1.to_q.weight'
    begun = dict(tiny_unified(**OWN_AVERAGE).transformer.named_parameters())[name]
    after = torch.lerp(begun.detach(), load_file(tmp_path/'run/checkpoints/step-00000001/model.safetensors')[f'model.transformer.{name}'], .01)
    assert torch.equal(dict(objective.model.alignment.average.named_buffers())[name], after) and not torch.equal(after, begun)


def test_a_saved_model_has_no_teacher_and_the_next_stage_begins_a_new_one(tmp_path):
    model = trained(tmp_path/'run', steps=1)[0].model
    for head in (True, False): model.save_pretrained(tmp_path/str(head), head=head)
    assert not any('average' in k for k in load_file(tmp_path/'True/model.safetensors'))
    loaded = Unified.from_pretrained(tmp_path/'True', model.mllm, model.image_tokenizer)
    assert loaded.alignment.average is None and loaded.cfg.alignment.kind == 'ema'
    UnifiedObjective(loaded, StageConfig('sft'))
    name = 'transformer_blocks.1.attn1.to_q.weight'
    assert torch.equal(dict(loaded.alignment.average.named_buffers())[name], dict(model.transformer.named_parameters())[name])
    assert Unified.from_pretrained(tmp_path/'False', model.mllm, model.image_tokenizer).cfg.alignment.kind == 'none'


def test_alignment_ends_where_it_is_told_and_its_head_stays(tmp_path):
    objective, history = trained(tmp_path/'run', align_until=.5)
    assert ['L_align' in r for r in history.rows] == [True, True, False, False]
    half = load_file(tmp_path/'run/checkpoints/step-00000004/optimizer_model.safetensors')
    steps = {k: int(v) for k, v in half.items() if k.endswith(':step')}
    assert {v for k, v in steps.items() if 'alignment.head' in k} == {2} and {v for k, v in steps.items() if 'head' not in k} == {4}
    assert validate(objective, Pairs(), 2).keys() == {'L_fm'}


@pytest.mark.parametrize('stage,cfg,says', [
    (dict(stage='connector', align_until=.5), {}, 'align_until has no effect in stage connector'),
    (dict(stage='joint', align_until=.5), dict(alignment=dict(kind='none')), 'align_until=0.5 without an alignment head'),
    (dict(stage='joint'), dict(alignment=dict(kind='ema', block=1, teacher_block=3)), 'choose 2..2'),
    (dict(stage='joint'), dict(alignment=dict(kind='self', decay=.5)), 'decay: no effect'),
    (dict(stage='joint'), dict(alignment=dict(kind='ema', block=2, teacher_block=2)), 'must come after block 2'),
])
def test_alignment_that_cannot_be_is_refused(stage, cfg, says):
    with pytest.raises(ValueError, match=says): UnifiedObjective(tiny_unified(**cfg), StageConfig(**stage))


# --- queries that begin as words ---

def test_queries_begin_as_words_that_fit():
    def queries(words): return tiny_unified(condition=dict(queries=3, layers=1, words=words)).condition
    condition, random = queries('a red'), queries('').queries
    ids = torch.tensor(encode_text(condition.mllm.tokenizer, 'a red'))
    assert torch.equal(condition.queries[:2], condition.mllm.embed(ids)) and torch.equal(condition.queries[2:], random[2:])
    with pytest.raises(ValueError, match='4 tokens, there are 3 queries'): queries('a red star left')
    with pytest.raises(ValueError, match='rad'): queries('a rad star')


# --- the conditional projection ---

@pytest.mark.parametrize('projection', ['sana', 'linear'])
def test_the_projection_learns_and_is_kept(projection, tmp_path):
    model = tiny_unified(condition=dict(queries=3, layers=1, projection=projection))
    objective = UnifiedObjective(model, StageConfig('connector'))
    own = model.condition.connector.project.weight if projection == 'linear' else model.transformer.caption_projection.linear_1.weight
    sanas = model.transformer.caption_projection.linear_1.weight
    assert any(p is own for p in objective.groups['projection'])
    before, theirs = own.detach().clone(), sanas.detach().clone()
    seen = []
    own.register_hook(lambda g: seen.append(float(g.abs().sum())))
    fit(objective, objective.tokenised(Pairs()), TrainConfig(steps=1, batch_size=2, lr=1e-2, ema=0., precision='no'), run=tmp_path/'run')
    assert seen[0] > 0 and not torch.equal(own, before)
    assert torch.equal(sanas, theirs) is (projection == 'linear'), "SANA's own moves only where it is used"
    model.save_pretrained(tmp_path/'saved')
    back = Unified.from_pretrained(tmp_path/'saved', model.mllm, model.image_tokenizer)
    assert back.cfg.condition.projection == projection
    assert torch.equal(back.sample(['a red star']), model.eval().sample(['a red star']))
    joint = UnifiedObjective(back, StageConfig('joint'))
    ids = [id(p) for group in joint.groups.values() for p in group]
    assert len(ids) == len(set(ids)), 'each parameter in one group'
    idle = {id(p) for p in back.transformer.caption_projection.parameters()}
    assert bool(idle & set(ids)) is (projection == 'sana')


def test_configurations_from_before_the_switch(tmp_path):
    model = tiny_unified()
    model.save_pretrained(tmp_path/'saved')
    config = json.loads((tmp_path/'saved/config.json').read_text())
    del config['condition']['projection']
    (tmp_path/'saved/config.json').write_text(json.dumps(config))
    back = Unified.from_pretrained(tmp_path/'saved', model.mllm, model.image_tokenizer)
    assert back.cfg.condition.projection == 'sana'
    assert torch.equal(back.sample(['a red star']), model.eval().sample(['a red star']))
    with pytest.raises(ValueError, match='linear, sana'): UnifiedConfig.from_dict(dict(condition=dict(projection='mlp')))


# --- the chat template ---

QWENS_SYSTEM = (     # what Qwen2.5's own template says before a user who has not said it
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. "
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
)


def with_template(folder, template):
    "The tokenizer of a folder with another chat template, written back where transformers reads it."
    tk = AutoTokenizer.from_pretrained(folder)
    tk.chat_template = template
    for name in ('chat_template.jinja', 'chat_template.json'): (folder/name).unlink(missing_ok=True)
    tk.save_pretrained(folder)


@pytest.fixture(scope='module')
def real_layout(tmp_path_factory):
    "An MLLM folder with the tokens and the template of InternVL3, at toy width."
    folder = tmp_path_factory.mktemp('mllm')/'mllm'
    arch = narrow(recipe('spar-1b'))['mllm']
    write_mllm(folder, arch, 0)
    return folder, arch


def test_a_published_template_is_accepted(real_layout):
    folder, arch = real_layout
    mllm = load_mllm(folder)
    assert mllm.chat_text('Hello') == '<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n'
    assert check_part('mllm', folder, arch) == []


@pytest.mark.parametrize('what', ['system turn', 'no end of turn', 'none'])
def test_another_template_is_refused(real_layout, tmp_path, what):
    source, arch = real_layout
    folder = tmp_path/'mllm'
    shutil.copytree(source, folder)
    good = AutoTokenizer.from_pretrained(folder).chat_template
    templates = {'system turn': QWENS_SYSTEM + good, 'no end of turn': good.replace('<|im_end|>', ''), 'none': None}
    with_template(folder, templates[what])
    with pytest.raises(ValueError) as e: load_mllm(folder)
    message = str(e.value)
    assert 'chat_template.jinja' in message and str(folder) in message
    if what == 'system turn': assert 'adds a system turn' in message and 'You are Qwen' in message
    if what != 'none': assert repr('<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n') in message
    problems = check_part('mllm', folder, arch)
    assert len(problems) == 1 and 'template' in problems[0].says and 'chat_template.jinja' in problems[0].cure


def test_the_miniature_renders_its_own_template():
    folder = ROOT/'data/bases/mllm'
    if not folder.is_dir(): pytest.skip('data/ is not there: dvc pull data.dvc')
    assert load_mllm(folder).chat_text('hello', answer='yes') == '<bos> <user> hello <assistant> yes <eos>'
