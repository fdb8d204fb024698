"""A run killed at any moment ends with the same weights, bit for bit; another run's past is never used; a NaN stops."""
import json, re, shutil, signal, subprocess, time
import pytest, torch
from safetensors.torch import load_file
from torch import nn
from conftest import ROOT
from spar.training.objective import Objective, TrainConfig
from spar.training.checkpoints import checkpoint_steps, DamagedCheckpoint
from spar.training.loop import fit
from toy import Child

def finish(p):
    assert p.wait() == 0, p.printed()
    return re.search(r'HASH (\w+)', p.printed())[1], p.printed()

@pytest.fixture(scope='module')
def whole(tmp_path_factory): return finish(Child(tmp_path_factory.mktemp('whole')))[0]

def test_killed_twice_and_continued_ends_with_the_same_bits(tmp_path, whole):
    for _ in range(2):
        before = [*checkpoint_steps(tmp_path/'killed/checkpoints')]; p = Child(tmp_path/'killed')
        while p.poll() is None and [*checkpoint_steps(tmp_path/'killed/checkpoints')] == before: time.sleep(.005)
        p.kill()
    again, out = finish(Child(tmp_path/'killed'))
    assert 'Resumed at step' in out, 'the test must really have continued'
    assert again == whole


class Line(Objective):
    def __init__(self, bad_at=None): super().__init__(); torch.manual_seed(0); self.net, self.bad_at = nn.Linear(2, 1), bad_at
    def weights(self, progress, player='model'): return {'mse': 1.}
    def terms(self, batch, weights, player='model'):
        loss = (self.net(batch['x']) - 1).square().mean()
        return {'mse': loss * float('nan') if self.bad_at in batch['index'].tolist() else loss}

class Points(torch.utils.data.Dataset):
    def __getitem__(self, k): return dict(x=torch.tensor([k % 3 - 1., k % 5 - 2.]), index=k)

CFG = dict(batch_size=2, log_every=1, save_every=2, precision='no', ema=0.)

def toy(folder, name='one', steps=6, **more): return fit(Line(), Points(), TrainConfig(steps=steps, **{**CFG, **more}), 0, folder, name)

def test_another_configuration_starts_afresh_and_destroys_nothing(tmp_path, capsys):
    toy(tmp_path/'r', dict(code={'spar/a.py': '1'}))
    old = {p.name: p.read_bytes() for p in (tmp_path/'r/checkpoints/step-00000006').iterdir()}
    toy(tmp_path/'r', dict(code={'spar/a.py': '2'}))
    said = capsys.readouterr().out
    assert 'Resumed' not in said and 'code spar/a.py' in said and 'aside/001-code-spar-a.py' in said
    assert {p.name: p.read_bytes() for p in (tmp_path/'r/aside/001-code-spar-a.py/step-00000006').iterdir()} == old
    toy(tmp_path/'r', dict(code={'spar/a.py': '2'}))
    assert 'Resumed at step 6' in capsys.readouterr().out

def test_an_error_names_what_differs_and_the_environment_has_the_last_word(tmp_path, monkeypatch, capsys):
    toy(tmp_path/'r', dict(settings={'train.lr': 1.}))
    with pytest.raises(ValueError, match=r'train.lr: 1.0 -> 2.0(.|\n)*SPAR_ON_MISMATCH=continue'): toy(tmp_path/'r', dict(settings={'train.lr': 2.}), on_mismatch='error')
    assert [*checkpoint_steps(tmp_path/'r/checkpoints')] == [6]
    monkeypatch.setenv('SPAR_ON_MISMATCH', 'continue')
    history = toy(tmp_path/'r', dict(settings={'train.lr': 2.}), 8, on_mismatch='error')
    assert 'Resumed at step 6' in capsys.readouterr().out
    assert history.continued == [dict(step=6, differences=['settings train.lr: 1.0 -> 2.0'])]
    monkeypatch.setenv('SPAR_ON_MISMATCH', 'go on')
    with pytest.raises(ValueError, match="unknown 'go on'.*aside, continue, error"): toy(tmp_path/'r', 'two')

def test_what_was_continued_is_in_run_json_and_is_not_released(tmp_path, monkeypatch):
    from spar.running.runner import training_notes
    toy(tmp_path/'r', 'one', 4); monkeypatch.setenv('SPAR_ON_MISMATCH', 'continue'); toy(tmp_path/'r', 'two', 6)
    notes = training_notes(tmp_path/'r')
    assert notes == dict(continued=[dict(step=4, differences=["settings name: 'one' -> 'two'"])])
    (tmp_path/'metrics/mini').mkdir(parents=True); (tmp_path/'metrics/mini/run.json').write_text(json.dumps(dict(unified_2_joint=notes)))
    shutil.copy(ROOT/'Makefile', tmp_path)
    done = subprocess.run(['make', 'uncontinued'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and 'unified_2_joint' in done.stderr
    (tmp_path/'metrics/mini/run.json').write_text(json.dumps(dict(unified_2_joint={})))
    assert subprocess.run(['make', 'uncontinued'], cwd=tmp_path, capture_output=True).returncode == 0

def test_settings_that_change_no_weight_and_such_as_only_round(tmp_path, capsys):
    from spar.training.checkpoints import stage_parts
    parts = lambda path='a', attention='auto': stage_parts(dict(source=dict(path=path, log='x', max_broken=.1), train=dict(attention=attention)))
    toy(tmp_path/'r', parts()); capsys.readouterr()
    toy(tmp_path/'r', parts('elsewhere')); assert 'rounding' not in (out := capsys.readouterr().out) and 'Resumed at step 6' in out
    toy(tmp_path/'r', parts(attention='sdpa')); assert "attention: 'auto' -> 'sdpa'" in (out := capsys.readouterr().out) and 'Resumed at step 6' in out

@pytest.mark.parametrize('damage', ['cut', 'changed', 'missing', 'state'])
def test_a_damaged_checkpoint_is_an_error_and_stays(tmp_path, damage):
    toy(tmp_path/'r', keep_last=2); at = tmp_path/'r/checkpoints/step-00000006'; file = at/('state.json' if damage == 'state' else 'model.safetensors')
    if damage == 'missing': file.unlink()
    elif damage == 'changed': file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    else: file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(DamagedCheckpoint, match=f'{file.name}.*move it away to continue from step 4'): toy(tmp_path/'r')
    assert at.exists()
    shutil.move(at, tmp_path/'away'); assert toy(tmp_path/'r').step == 6

def test_which_checkpoints_stay(tmp_path):
    toy(tmp_path/'r', steps=12, keep_last=2, keep_every=4)
    assert [*checkpoint_steps(tmp_path/'r/checkpoints')] == [4, 8, 10, 12]

def test_two_writers_exclude_each_other(tmp_path):
    a, b = Child(tmp_path/'r'), Child(tmp_path/'r')
    codes = sorted([a.wait(), b.wait()])
    assert codes[0] == 0 and codes[1] != 0

@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1'])
def test_a_signal_saves_and_ends_and_the_run_continues_to_the_same_bits(tmp_path, name, whole):
    p = Child(tmp_path/'r', save_every=1000)
    while p.poll() is None and not (tmp_path/'r/.lock').exists(): time.sleep(.01)
    p.send_signal(getattr(signal, name))
    assert p.wait(timeout=60) == 0 and (step := [*checkpoint_steps(tmp_path/'r/checkpoints')][0]) < 60
    again, out = finish(Child(tmp_path/'r')); assert f'Resumed at step {step}' in out and again == whole

def test_the_weights_of_a_checkpoint_without_training(tmp_path, monkeypatch):
    toy(tmp_path/'r', steps=8, keep_every=2)
    monkeypatch.setenv('SPAR_EXPORT', '4'); four = Line(bad_at=0); assert fit(four, None, TrainConfig(steps=8, **CFG), 0, tmp_path/'r', 'one').finished
    tensors = load_file(tmp_path/'r/checkpoints/step-00000004/model.safetensors')
    assert torch.equal(four.net.weight, tensors['net.weight']) and [*checkpoint_steps(tmp_path/'r/checkpoints')] == [2, 4, 6, 8]

def test_nan_stops_with_step_term_and_samples_and_keeps_the_last_good_checkpoint(tmp_path):
    obj = Line(bad_at=11)
    with pytest.raises(FloatingPointError, match=r'mse is nan at step 5, samples \[10, 11\]'):
        fit(obj, Points(), TrainConfig(steps=9, **CFG), 0, tmp_path/'r', 'one')
    assert all(p.isfinite().all() for p in obj.parameters())
    assert [*checkpoint_steps(tmp_path/'r/checkpoints')] == [4]

def test_a_number_that_is_not_finite_may_be_left_out_and_is_named(tmp_path, capsys):
    history = fit(Line(bad_at=11), Points(), TrainConfig(steps=9, skip_nonfinite=1, **CFG), 0, tmp_path/'r', 'one')
    assert [s['step'] for s in history.skipped] == [5] and [r['step'] for r in history.rows if r.get('skipped')] == [6]
    assert 'No update: mse is nan at step 5, samples [10, 11]' in capsys.readouterr().out
    from spar.running.runner import training_notes
    assert training_notes(tmp_path/'r') == dict(steps_without_update=1)

def test_too_many_in_a_row_stop_and_raising_the_limit_goes_on(tmp_path):
    class Bad(Points):
        def __getitem__(self, k): return dict(super().__getitem__(k), x=torch.tensor([1., float('inf') if 8 <= k < 14 else 0.]))
    go = lambda n: fit(Line(), Bad(), TrainConfig(steps=9, skip_nonfinite=n, **CFG), 0, tmp_path/'r', 'one')
    with pytest.raises(FloatingPointError, match='number 3 in a row, skip_nonfinite is 2'): go(2)
    assert [s['step'] for s in go(3).skipped] == [4, 5, 6]

def test_running_statistics_are_put_back_when_a_step_makes_no_update(tmp_path):
    class Norm(Line):
        def __init__(self): super().__init__(); self.norm = nn.BatchNorm1d(2)
        def terms(self, batch, weights, player='model'): return {'mse': (self.net(self.norm(batch['x'])) - 1).square().mean()}
    class Bad(Points):
        def __getitem__(self, k): return dict(x=torch.tensor([k % 3 - 1., float('nan') if k == 6 else 2. * (k % 5)]), index=k)
    obj = Norm(); history = fit(obj, Bad(), TrainConfig(steps=9, skip_nonfinite=1, **CFG), 0, tmp_path/'r', 'one')
    assert len(history.skipped) == 1 and all(v.isfinite().all() for v in obj.state_dict().values() if v.is_floating_point())

def test_only_buffers_that_a_step_moved_are_averaged():
    from types import SimpleNamespace
    from spar.training.loop import _copies_of_buffers, _mean_over_processes
    reduced = []
    class Two:      # this process, and another that moved nothing
        num_processes, device = 2, torch.device('cpu')
        def reduce(self, t, how): reduced.append(tuple(t.shape)); return t / 2 if how == 'mean' else t
    net = nn.Module(); net.register_buffer('table', torch.ones(1000)); net.register_buffer('mean', torch.ones(3))
    run = SimpleNamespace(objective=net, acc=Two(), cfg=SimpleNamespace(skip_nonfinite=0))
    before = _copies_of_buffers(run); net.mean += 1
    _mean_over_processes(run, {'mse': 2.}, before)
    assert reduced == [(2,), (3,), (1,)] and net.mean.tolist() == [1, 1, 1] and net.table.eq(1).all()

def test_a_tracker_that_is_not_installed_is_an_error(tmp_path):
    import importlib.util
    lacking = [n for n in ('wandb', 'tensorboard', 'dvclive') if not importlib.util.find_spec(n)]
    if not lacking: pytest.skip('every tracker is installed')
    class Mean(Objective):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=f'pip install {lacking[0]}'):
        fit(Mean(), [], TrainConfig(steps=1, tracker=lacking[0], precision='no'), 0, tmp_path, 'x')


def test_looking_at_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match='look_every 2 has no effect'): toy(tmp_path/'r', look_every=2)
