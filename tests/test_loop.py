"""What the loop does with a loss that goes wrong once, with torch's generator, and with a checkpoint of version 0.1."""
import math, shutil
import pytest, torch
from safetensors.torch import load_file
from torch import nn
from conftest import ROOT
from spar.training.checkpoints import checkpoint_steps
from spar.training.loop import fit
from spar.training.objective import Objective, TrainConfig
from spar.training.order import micro_batches

STEPS, AT = 8, 3      # the step, counted from 0, at which something happens

class Points(torch.utils.data.Dataset):
    "Two numbers and what a line makes of them; moves no generator."
    def __getitem__(self, k): x = torch.tensor([math.sin(k), math.cos(3. * k)]); return dict(x=x, y=4 * x[:1] - 3 * x[1:] + 2, index=k)

class Line(Objective):
    "A line through points; at sample 4 * AT the loss is multiplied."
    def __init__(self, factor=1., size=1): super().__init__(); torch.manual_seed(0); self.net, self.factor, self.size = nn.Linear(2, 1), factor, size
    def weights(self, progress, player='model'): return {'mse': 1.}
    def terms(self, batch, weights, player='model'):
        factor = self.factor if batch['index'][0] == 4 * AT else 1.
        return {'mse': factor * self.size * (self.net(batch['x']) - batch['y']).square().mean()}

def train(**changes): return TrainConfig.from_dict(dict(steps=STEPS, batch_size=4, lr=.01, lr_end=.01, log_every=1, look_every=1, save_every=100, precision='no', ema=0.) | changes)

def moved(objective, folder, **changes):
    "(history, weights after each step [STEPS + 1, n], the initial ones first)."
    def flat(o): return torch.cat([p.detach().flatten() for p in o.parameters()])
    seen = [flat(objective)]
    history = fit(objective, Points(), train(**changes), 0, folder, 'one', lambda o, step: seen.append(flat(o)))
    return history, torch.stack(seen)

class NoGradient(Line):
    "The loss is finite, its gradient is not: the square root of 0."
    def terms(self, batch, weights, player='model'):
        y = self.net(batch['x'])
        return {'mse': (y - batch['y']).square().mean() + ((y - y).abs().sqrt().mean() if batch['index'][0] == 4 * AT else 0.)}

BAD = dict(nan=(lambda: Line(math.nan), f'mse is nan at step {AT}'), inf=(lambda: Line(math.inf), f'mse is inf at step {AT}'),
           gradient=(NoGradient, f'gradient norm of model is nan at step {AT}'))

@pytest.mark.parametrize('bad', BAD)
def test_what_is_not_finite_stops_before_it_reaches_a_weight(tmp_path, bad):
    make, says = BAD[bad]; objective, good = make(), Line()
    with pytest.raises(FloatingPointError, match=f'{says}, samples .12, 13, 14, 15.'): fit(objective, Points(), train(look_every=0), 0, tmp_path/'bad', 'one')
    _, weights = moved(good, tmp_path/'good')
    assert torch.equal(torch.cat([p.detach().flatten() for p in objective.parameters()]), weights[AT])
    assert not checkpoint_steps(tmp_path/'bad/checkpoints')

@pytest.mark.parametrize('bad', BAD)
def test_what_is_not_finite_is_left_out_as_if_the_step_were_not_there(tmp_path, bad):
    make, says = BAD[bad]
    history, weights = moved(make(), tmp_path/'bad', skip_nonfinite=1)
    _, good = moved(Line(), tmp_path/'good')
    assert torch.equal(weights[:AT + 1], good[:AT + 1]) and torch.equal(weights[AT + 1], weights[AT]) and weights.isfinite().all()
    assert not any(torch.equal(weights[i + 1], weights[i]) for i in range(STEPS) if i != AT)
    assert [s['step'] for s in history.skipped] == [AT] and says in history.skipped[0]['what'] and history.finished
    assert 'mse' not in history.rows[AT] and [r.get('skipped') for r in history.rows] == [1 if i == AT else None for i in range(STEPS)]
    moments = load_file(tmp_path/f'bad/checkpoints/step-{STEPS:08d}/optimizer_model.safetensors')
    assert moments['net.weight:step'] == STEPS - 1 and all(m.isfinite().all() for m in moments.values())


def test_clipped_a_spike_is_one_step_of_the_usual_size(tmp_path):
    "Every gradient here is longer than `clip`, so 100 times its length changes nothing; unclipped, the moments remember it."
    runs = {(spike, clip): moved(Line(spike, size=10), tmp_path/f'{spike}-{clip}', clip=clip) for spike in (1., 100.) for clip in (1., 0.)}
    usual, weights = runs[1., 1.][1], runs[100., 1.][1]
    assert min(r['grad_norm'] for r in runs[1., 1.][0].rows) > 1
    assert torch.allclose(weights, usual, rtol=0, atol=1e-6)
    apart = (runs[100., 0.][1] - runs[1., 0.][1]).abs().amax(1)
    assert not apart[:AT + 1].any() and apart[AT + 1:].min() > 1e-3, 'the test can fail'

def test_a_spike_is_seen_and_the_run_goes_on(tmp_path):
    (calm, _), (history, _) = (moved(Line(f), tmp_path/str(f), clip=1.) for f in (1., 100.))
    assert history.finished and not history.skipped and history.step == STEPS
    row, usual = history.rows[AT], calm.rows[AT]
    assert row['mse'] == pytest.approx(100 * usual['mse'], rel=1e-4) and row['grad_norm'] == pytest.approx(100 * usual['grad_norm'], rel=1e-4)
    assert max(r['mse'] for r in history.rows) == row['mse'] and history.rows[-1]['mse'] < history.rows[0]['mse']

class Square(Line):
    "A matrix that Muon turns."
    def __init__(self, factor): super().__init__(factor); self.net = nn.Linear(32, 32, bias=False)
    def terms(self, batch, weights, player='model'):
        x = torch.cat([batch['x'] * i for i in range(1, 17)], 1)
        return {'mse': (self.factor if batch['index'][0] == 4 * AT else 1.) * 1e-2 * (self.net(x) - x).square().mean()}

@pytest.mark.parametrize('clip', [0., 1., 1e-3])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_no_step_is_longer_than_the_rate_allows(tmp_path, optimizer, clip):
    """AdamW: at most lr (1 - b1) / sqrt(1 - b2) an entry, 3.16 lr; Muon: 0.2 lr sqrt(32) times a matrix whose 32
    singular values are at most 1.3. Also at the spike, and where the gradient is clipped."""
    _, weights = moved(Square(100.), tmp_path, optimizer=optimizer, clip=clip)
    step = weights.diff(dim=0)
    bound = .01 * .1 / math.sqrt(.001) if optimizer == 'adamw' else .01 * .2 * math.sqrt(32) * 1.3 * math.sqrt(32)
    most = step.abs().amax(1) if optimizer == 'adamw' else step.norm(dim=1)
    assert (most <= bound * (1 + 1e-4)).all() and (most > .01 * bound).all()


class Two(Line):
    "A critic whose loss is not finite at one step, after the model has made its own."
    def __init__(self, factor): super().__init__(); self.critic, self.at = nn.Linear(2, 1), factor
    def players(self): return {'model': [*self.net.parameters()], 'critic': [*self.critic.parameters()]}
    def weights(self, progress, player='model'): return {'mse' if player == 'model' else 'tell': 1.}
    def terms(self, batch, weights, player='model'):
        if player == 'model': return super().terms(batch, weights)
        return {'tell': (self.critic(batch['x']) - 1).square().mean() * (self.at if batch['index'][0] == 4 * AT else 1.)}

def test_the_step_of_the_player_before_stands(tmp_path):
    history, weights = moved(Two(math.nan), tmp_path/'bad', skip_nonfinite=1, ema=.5); _, good = moved(Two(1.), tmp_path/'good', ema=.5)
    assert [(s['step'], s['player']) for s in history.skipped] == [(AT, 'critic')] and 'tell is nan' in history.skipped[0]['what']
    model, critic = weights[:, :3], weights[:, 3:]
    assert torch.equal(model, good[:, :3]), 'the model and its average go on as if nothing had happened'
    assert torch.equal(critic[AT + 1], critic[AT]) and torch.equal(critic[:AT + 1], good[:AT + 1, 3:]) and not torch.equal(critic[AT + 2], critic[AT])


@pytest.mark.parametrize('workers', [0, 1])
def test_reading_neither_uses_nor_moves_the_global_generator(workers):
    cfg = train(workers=workers); read = lambda: [b['x'] for b in micro_batches(Points(), cfg, 2)]
    torch.manual_seed(1); state = torch.get_rng_state(); first = read()
    assert torch.equal(torch.get_rng_state(), state) and len(first) == STEPS - 2
    torch.manual_seed(2); assert all(torch.equal(a, b) for a, b in zip(first, read()))

class Noisy(Points):
    "What a dataset must not do, to see where the workers' seed comes from: it draws from torch's generator."
    def __getitem__(self, k): return dict(super().__getitem__(k), x=torch.rand(2))

def test_the_seed_of_a_worker_does_not_depend_on_the_global_generator():
    def drawn(seed): torch.manual_seed(seed); return next(iter(micro_batches(Noisy(), train(workers=1), 0)))['x']
    assert torch.equal(drawn(1), drawn(2))

@pytest.mark.parametrize('workers', [0, 1])
def test_continued_is_uninterrupted_with_noise_inside_the_step(tmp_path, workers):
    class Dropped(Line):
        def terms(self, batch, weights, player='model'): return {'mse': (self.net(nn.functional.dropout(batch['x'], .3)) - batch['y']).square().mean()}
    class Ends(Points):
        def __getitem__(self, k):
            if k >= 4 * 6: raise KeyboardInterrupt
            return super().__getitem__(k)
    whole, parts = Dropped(), Dropped()
    fit(whole, Points(), train(look_every=0), 0, tmp_path/'whole', 'one')
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt): fit(parts, Ends(), train(look_every=0, save_every=2), 0, tmp_path/'parts', 'one')      # in this process
    again = Dropped(); torch.manual_seed(6)
    assert fit(again, Points(), train(look_every=0, workers=workers), 0, tmp_path/'parts', 'one').finished
    assert not torch.equal(parts.net.weight, whole.net.weight) and torch.equal(again.net.weight, whole.net.weight) and torch.equal(again.net.bias, whole.net.bias)


OLD = ROOT/'tests/fixtures/checkpoint-0.1'      # six steps of `Linear(2, 1)` with an EMA, written by version 0.1's `fit`

@pytest.mark.parametrize('how', ['aside', 'error', 'continue'])
def test_a_checkpoint_of_version_01_is_moved_aside_and_not_read(tmp_path, monkeypatch, capsys, how):
    shutil.copytree(OLD, tmp_path/'run/checkpoint'); old = {p.name: p.read_bytes() for p in OLD.iterdir()}
    assert len(old) == 4 and load_file(OLD/'model.safetensors')['net.weight'].shape == (1, 2)
    fresh, beside = Line(), Line(); cfg = train(look_every=0, ema=.9, on_mismatch=how)
    history = fit(fresh, Points(), cfg, 0, tmp_path/'run', 'one'); said = capsys.readouterr().out
    fit(beside, Points(), cfg, 0, tmp_path/'elsewhere', 'one')
    assert torch.equal(fresh.net.weight, beside.net.weight) and len(history.rows) == STEPS and not history.continued, 'from the beginning'
    aside = tmp_path/'run/aside/001-version-0.1'
    assert f'Version 0.1 wrote {tmp_path}/run/checkpoint: moved to {aside}.' in said and 'Resumed' not in said
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == old | {'why.txt': b'version 0.1\n'} and not (tmp_path/'run/checkpoint').exists()
    fit(Line(), Points(), cfg, 0, tmp_path/'run', 'one')
    assert f'Resumed at step {STEPS}' in capsys.readouterr().out and len([*aside.parent.iterdir()]) == 1, 'once'
