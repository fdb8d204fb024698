"""The first losses of every training stage are those of tests/golden_losses.json; `python tools/golden.py` writes them anew."""
import copy, sys
import pytest, torch
from conftest import ROOT

sys.path.insert(0, str(ROOT/'tools'))
import golden
from spar.core import has_fast_bf16
from spar.running.benchmark import training_of, training_stages
from spar.running.step_cost import phases

@pytest.fixture(autouse=True)
def root(monkeypatch): monkeypatch.chdir(ROOT)

def same(profile, precision='no'):
    bits, far = golden.checked(profile, precision)
    assert not far, golden.said(profile, precision, bits, far)

@pytest.mark.parametrize('profile', golden.PROFILES)
def test_the_first_losses_are_those_of_the_file(profile):
    "In fp32 on every machine; what other tests drew from torch's generator changes nothing."
    torch.manual_seed(1234)
    same(profile)

@pytest.mark.parametrize('profile', golden.PROFILES)
def test_the_first_losses_in_bf16(profile):
    if profile not in golden.read().get('bf16', {}): pytest.skip('bf16 is untried: on a machine that has it, `python tools/golden.py --precision bf16`')
    if not has_fast_bf16(golden.CPU): pytest.skip('this processor has no bf16')
    same(profile, 'bf16')

@pytest.mark.parametrize('profile', golden.PROFILES)
def test_every_training_stage_has_its_first_ten_steps_and_every_term(profile):
    stages = golden.recorded(profile)['stages']
    assert sorted(stages) == sorted(training_stages()) and len(stages) == 8
    for name, rows in stages.items():
        assert [r['step'] for r in rows][:10] == [*range(1, 11)][:len(rows)] and (profile == 'smoke' or len(rows) >= 10)
        assert all({'lr', 'grad_norm'} < r.keys() and r['grad_norm'] > 0 for r in rows)
    terms = {k for rows in stages.values() for r in rows for k in r} - {'step', 'lr'}
    assert terms == {'mse', 'lpips', 'L_p', 'L_s', 'L_GAN', 'critic', 'lecam', 'grad_norm', 'grad_norm_critic', 'L_fm', 'L_align', 'flow'}

ALLOWED = golden.TOLERANCE['no']

@pytest.mark.parametrize('what,by,says', [
    ('L_p', 1.0005, None), ('L_p', 1.002, 'L_p is'), ('grad_norm', 1.015, None), ('grad_norm', 1.03, 'grad_norm is'),
    ('lr', 1 + 1e-6, 'lr is'), ('L_p', float('nan'), 'L_p is nan')])
def test_how_far_is_too_far(what, by, says):
    known = golden.recorded('mini')['stages']; found = copy.deepcopy(known); found['tokenizer_1_init'][3][what] *= by
    far = golden.differences(known, found, ALLOWED)
    assert golden.differences(known, known, None) == [] != golden.differences(known, found, None)
    assert (far == []) if says is None else (len(far) == 1 and f'tokenizer_1_init: 1 of {len(known["tokenizer_1_init"])} rows differ, the first at step 4: {says}' in far[0])

def test_a_stage_a_row_or_a_term_too_few_or_too_many():
    known = golden.recorded('smoke')['stages']
    def far(change): found = copy.deepcopy(known); change(found); return golden.differences(known, found, ALLOWED)
    assert far(lambda f: f.pop('sana_tuned')) == ['sana_tuned: only in the file']
    assert far(lambda f: f.update(new=[])) == ['new: only in what was computed']
    assert far(lambda f: f['sana_tuned'].pop()) == ['sana_tuned: 3 rows, the file has 4']
    assert 'has step, lr, grad_norm; the file has step, lr, flow, grad_norm' in far(lambda f: f['sana_tuned'][0].pop('flow'))[0]

CHANGES = dict(
    noise=lambda t: setattr(t.objective, 'seed', 1),
    weights=lambda t: t.objective.base.transformer.proj_out.weight.data.mul_(1.1),
    optimiser=lambda t: setattr(t.train, 'betas', (.5, .999)),
    rate=lambda t: setattr(t.train, 'lr', 5.1e-4),
    samples=lambda t: setattr(t.train, 'batch_size', 3))

@pytest.mark.parametrize('change', CHANGES)
def test_a_change_that_moves_numbers_is_known(monkeypatch, change):
    "Of one stage of smoke, which builds on no other."
    def changed(name, profile): t = training_of(name, profile); CHANGES[change](t); return t
    monkeypatch.setattr(golden, 'training_of', changed)
    monkeypatch.setattr(golden, 'training_stages', lambda: ['sana_tuned'])
    bits, far = golden.checked('smoke', stages=['sana_tuned'])
    assert len(far) == 1 and far[0].startswith('sana_tuned: '), golden.said('smoke', 'no', bits, far)

def test_later_phases_begin_at_their_first_step():
    rows = golden.recorded('mini')['stages']['tokenizer_3_encoder']; steps = [r['step'] for r in rows]
    with golden.tree_of('smoke'):
        t = training_of('tokenizer_1_init', 'smoke')
        assert [p.first for p in phases(t)] == [0] and t.train.lr == 1e-6
    assert steps == [*range(1, 11), 1857, 1858, 1859, 2553, 2554, 2555]
    assert 'mse' not in rows[9] and 'mse' in rows[10] and 'critic' not in rows[12] and 'critic' in rows[13]

def test_without_backbones_the_command_is_named(tmp_path, monkeypatch):
    for name in ('nbs', 'configs'): (tmp_path/name).symlink_to(ROOT/name)
    monkeypatch.setattr(golden, 'ROOT', tmp_path)
    with pytest.raises(FileNotFoundError, match='data/bases/mllm.*dvc pull -q -r store data.dvc'): golden.losses('mini')
