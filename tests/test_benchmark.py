"""`spar benchmark`: the parts of a step are the step, every part is named, and nothing that was trained is touched."""
import json, time
import torch
import pytest
from torch import nn
from conftest import SPAR, run
from spar.backbones.dcae import DCAE, mini_dcae
from spar.running import records, step_cost
from spar.running.benchmark import parts_table, stages_table
from spar.running.plain import beside_plain, plain_table
from spar.running.step_cost import forward_parts, measured, STEP_PARTS, phases, Training
from spar.tokenizer.training import ReconstructionLoss, TokenizerObjective
from spar.training.objective import Objective, TrainConfig
from spar.unified.training import StageConfig, UnifiedObjective
from spar.world.datasets import Mixture
from spar.world.prompts import vocabulary
from spar.world.tasks import Edits, SceneCaptions
from tiny import tiny_unified

AROUND = {'reading', 'other forward', 'backward', 'clipping', 'optimiser', 'EMA', 'rest'}
MACHINE = dict(precision='no', peak_gflops=dict(fp32=50., bf16=100.))


def state(objective): return {k: v.clone() for k, v in objective.state_dict().items()}

def train(**changes): return TrainConfig.from_dict(dict(steps=10, warmup=9, batch_size=2, precision='no', optimizer='muon', muon_share=0) | changes)

@pytest.fixture(scope='module')
def unified():
    "Stage II of the unified model on small random networks: batches of generation and of editing."
    objective = UnifiedObjective(tiny_unified(vocabulary()), StageConfig(stage='joint'))
    tasks = Mixture(dict(generation=(SceneCaptions(0, 'train'), .5), editing=(Edits(0, 'train'), .5)), 0, per='batch')
    return Training('joint', objective, objective.tokenised(tasks), train())

@pytest.fixture(scope='module')
def tokenizer():
    "Stage III of the tokenizer: latents first, then pixels, then the critic."
    t = tiny_unified(vocabulary()).image_tokenizer
    dcae = DCAE(mini_dcae(channels=(16, 16, 32, 32), enc_layers=(0, 1, 1, 1), dec_layers=(0, 1, 1, 1)))
    loss = dict(train_encoder=True, train_decoder=True, lambda_p=1, lambda_s=.1, lambda_gan=.1, lpips=0, pixels_start=.3, gan_start=.6, critic_width=8)
    objective = TokenizerObjective(t, ReconstructionLoss.from_dict(loss), dcae=dcae, encoder=t.encoder)
    return Training('third', objective, Pictures(), train())

class Pictures:
    def __getitem__(self, k): return dict(image=torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(int(k))) * 2 - 1, index=k)


def check(cases: list[dict]):
    "Parts are named and stand in the tables; they add up to the step."
    for c in cases:
        assert AROUND <= c['ms'].keys() <= set(STEP_PARTS)
        for part, (low, median, high) in c['ms'].items(): assert 0 <= low <= median <= high, part
        if c['repetitions'] <= 2: assert sum(v[1] for v in c['ms'].values()) == pytest.approx(c['step_ms'][1])     # medians of more need not add up
        assert c['gflop']['backward'] > 0 and not c['gflop']['reading'] and not c['gflop']['EMA']
        assert c['samples_a_second'] == pytest.approx(c['batch_size'] / c['step_ms'][1] * 1e3)
    text = parts_table([c for c in cases if c['stage'] == cases[0]['stage']], MACHINE)
    for part in {p for c in cases if c['stage'] == cases[0]['stage'] for p in c['ms']} | {'step'}: assert f'| {part} |' in text
    assert stages_table(cases, MACHINE).count('\n') == len(cases) + 1 and json.loads(json.dumps(cases)) == cases

def test_parts_add_up_to_what_a_watch_beside_them_says(unified, monkeypatch):
    seconds, take = [], step_cost.take_step
    def taken(*args):
        began = time.perf_counter(); micros = take(*args); seconds.append(time.perf_counter() - began)
        return micros
    monkeypatch.setattr(step_cost, 'take_step', taken)
    case, = measured(unified, steps=1, warm=1)
    assert len(seconds) == 3, 'warm-up, the step, and the one whose operations are counted'
    assert sum(v[1] for v in case['ms'].values()) == pytest.approx(1e3 * seconds[1], rel=.1)

def test_a_unified_stage_by_task(unified):
    before = state(unified.objective)
    cases = measured(unified, steps=6, warm=1)
    check(cases)
    tasks = {c['task']: c for c in cases}
    assert tasks.keys() == {'editing', 'generation'} and sum(c['repetitions'] for c in cases) == 6
    for c in cases:
        assert {'encoder', 'streams', 'language model', 'connector', 'transformer', 'head'} <= c['ms'].keys()
        assert c['gflop']['backward'] < 2.1 * sum(v for p, v in c['gflop'].items() if p not in ('backward', 'optimiser')), 'depthwise'
        assert c['gflop']['optimiser'] > 0, 'Muon multiplies matrices'
        assert c['draws_a_second'] == pytest.approx(c['samples_a_second']), 'one draw of noise a sample'
    assert tasks['editing']['gflop']['encoder'] == pytest.approx(2 * tasks['generation']['gflop']['encoder']), 'source and target'
    assert tasks['editing']['gflop']['language model'] > tasks['generation']['gflop']['language model'], 'a longer prompt'
    after = unified.objective.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())

def test_a_tokenizer_stage_by_phase(tokenizer):
    before, random = state(tokenizer.objective), torch.get_rng_state()
    assert [(p.first, p.steps) for p in phases(tokenizer)] == [(0, 3), (3, 3), (6, 4)]
    cases = measured(tokenizer, steps=3, warm=1)
    check(cases)
    assert all({'encoder', 'streams', 'DC-AE encoder'} <= c['ms'].keys() for c in cases)
    assert ['decoder' in c['ms'] for c in cases] == [False, True, True] and ['critic' in c['ms'] for c in cases] == [False, False, True]
    assert [c['terms'] for c in cases] == [['L_p', 'L_s'], ['mse', 'L_p', 'L_s'], ['mse', 'L_p', 'L_s', 'L_GAN', 'critic', 'lecam']]
    assert all(c['draws_a_second'] is None for c in cases), 'nothing is drawn from noise'
    after = tokenizer.objective.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items()) and torch.equal(random, torch.get_rng_state())
    assert not any(p.grad is not None for p in tokenizer.objective.parameters())

def test_hooks_and_modes_are_as_before(tokenizer):
    modes = [m.training for m in tokenizer.objective.modules()]
    with pytest.raises(ZeroDivisionError): measured(Training('third', tokenizer.objective, Broken(), train()), steps=1)
    assert modes == [m.training for m in tokenizer.objective.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m, _ in forward_parts(tokenizer.objective))

class Broken:
    def __getitem__(self, k): return 1 / 0

def test_micro_batches_are_one_step():
    class Line(Objective):
        def __init__(self): super().__init__(); self.net = nn.Linear(32, 32)
        def weights(self, progress, player='model'): return dict(mse=1.)
        def terms(self, batch, weights, player='model'): return dict(mse=self.net(batch['image'][:, 0, 0, :32]).square().mean())
    whole, parted = (measured(Training('line', Line(), Pictures(), train(batch_size=4, accumulate=n, optimizer='adamw')), 2)[0] for n in (1, 2))
    assert whole['gflop']['other forward'] == parted['gflop']['other forward'] == 2 * 4 * 32 * 32 / 1e9

def test_the_plain_recipe_by_turns(tokenizer):
    before = state(tokenizer.objective)
    cases = beside_plain(tokenizer, steps=1, warm=0)
    assert [len(c['terms']) for c in cases] == [2, 3, 6] and all(c['draws'] == 1 and c['repetitions'] == 1 for c in cases)
    for c in cases: assert c['ratio'] == pytest.approx(c['plain_ms'][1] / c['ours_ms'][1]) == pytest.approx(c['pair_ratios'][1])
    after = tokenizer.objective.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items()) and plain_table(cases).count('\n') == 4
    assert 'terms' not in vars(tokenizer.objective) and type(tokenizer.objective.fakes) is dict

def test_a_record_of_a_unified_stage(unified, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, 'resolved', lambda *_: dict(validation=dict(n=2, seed=0), data=dict(dial='easy')))
    before = state(unified.objective)
    row = records.add_record('as it is', unified, 'tiny', target=1e9, every=1)
    assert row['accepted'] and row['steps'] == [1, 1] and min(row['minutes']) > 0
    assert row['losses'][0] != row['losses'][1], 'the second repetition has other noise and times'
    again = records.add_record('out of reach', unified, 'tiny', target=-9., every=10)
    assert again['minutes'] == [None, None] and again['steps'] == [10, 10] and not again['accepted']
    assert records.records('tiny') == [row, again] and unified.objective.seed == 0
    after = unified.objective.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())

@pytest.mark.slow
def test_the_command_in_a_copy_of_the_repository(tmp_path):
    from conftest import clone
    tree = clone(tmp_path)
    said = run([*SPAR, 'benchmark'], tree)
    assert said.returncode == 1 and '`spar stage prepare --profile smoke` makes it' in said.stderr
    made = run([*SPAR, 'stage', 'prepare', '--profile', 'smoke'], tree)
    assert made.returncode == 0, made.stderr[-2000:]
    said = run([*SPAR, 'benchmark', '--stage', 'unified_2_joint'], tree)
    assert said.returncode == 1 and 'spar stage tokenizer_3_encoder' in said.stderr
    said = run([*SPAR, 'benchmark', '--steps', '2', '--stage', 'tokenizer_1_init', 'sana_tuned', '--json', 'cost.json'], tree)
    assert said.returncode == 0, said.stderr[-2000:]
    cases = [c for r in json.loads((tree/'cost.json').read_text()) for c in r['cases']]
    assert {c['stage'] for c in cases} == {'tokenizer_1_init', 'sana_tuned'}
    assert all(f'| {p} |' in said.stdout for c in cases for p in c['ms']) and 'matmul peak' in said.stdout
    check(cases)
    assert {'text encoder', 'transformer'} <= cases[-1]['ms'].keys()
    assert [c['stage'] for c in json.loads((tree/'cost.json').read_text())[0]['plain']].count('sana_tuned') == 1 and 'plain / ours' in said.stdout
    said = run([*SPAR, 'benchmark', '--growth', '--steps', '3', '--stage', 'tokenizer_1_init', '--json', 'growth.json'], tree)
    assert said.returncode == 0, said.stderr[-2000:]
    grown, = json.loads((tree/'growth.json').read_text())['growth']
    assert list(grown['memory']) == ['1', '2', '3'] and grown['start'].keys() == {'imports', 'loading', 'first step'}
    assert not (tree/'artifacts/smoke/tokenizer_1_init').exists() and not (tree/'runs/smoke/tokenizer_1_init').exists()
