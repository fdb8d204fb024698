"""A run killed at any moment ends with the same weights, bit for bit; another run's past is never used; a NaN stops."""
import os, re, signal, subprocess, sys, time
import pytest, torch
from torch import nn
from conftest import ROOT
from spar.training.objective import Objective, TrainConfig
from spar.training.loop import fit

TOY = '''
import sys, time, torch, hashlib
from torch import nn
from spar.training.loop import fit
from spar.training.objective import Objective, TrainConfig
class Fit(Objective):
    def __init__(self):
        super().__init__(); torch.manual_seed(0)
        self.net, self.critic = nn.Sequential(nn.Linear(4, 8), nn.Dropout(.2), nn.Linear(8, 1)), nn.Linear(1, 1)
    def players(self): return {'model': [*self.net.parameters()], 'critic': [*self.critic.parameters()]}
    def weights(self, progress, player='model'): return {'mse': 1., 'fool': .1 * (progress > .3)} if player == 'model' else {'tell': float(progress > .3)}
    def terms(self, batch, weights, player='model'):
        y = self.net(batch['x']); d = self.critic(y if player == 'model' else y.detach())
        tell = lambda: d.square().mean() + (self.critic(batch['x'][:, :1]) - 1).square().mean()
        every = dict(mse=lambda: (y - 1).square().mean(), fool=lambda: -d.mean(), tell=tell)
        return {k: every[k]() for k in weights}
class Data:
    def __getitem__(self, k): time.sleep(.002); return dict(x=torch.randn(4, generator=torch.Generator().manual_seed(int(k))), index=k)
    def __len__(self): return 10 ** 9
obj = Fit()
fit(obj, Data(), TrainConfig(steps=60, batch_size=4, accumulate=2, warmup=5, ema=.9, log_every=7, save_every=4, precision='no'), 0, sys.argv[1], 'one')
print('HASH', hashlib.sha256(b''.join(v.numpy().tobytes() for v in obj.state_dict().values())).hexdigest())
'''

def start(folder):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, '-c', TOY, str(folder)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

def finish(p):
    out = p.communicate(timeout=240)[0]; assert p.returncode == 0, out
    return re.search(r'HASH (\w+)', out)[1], out

def test_killed_twice_and_continued_ends_with_the_same_bits(tmp_path):
    whole, _ = finish(start(tmp_path/'whole'))
    for _ in range(2):
        p = start(tmp_path/'killed'); state = tmp_path/'killed/checkpoint/state.json'
        before = state.stat().st_mtime_ns if state.exists() else 0
        while p.poll() is None and not (state.exists() and state.stat().st_mtime_ns > before): time.sleep(.005)
        p.send_signal(signal.SIGKILL); p.wait()
    again, out = finish(start(tmp_path/'killed'))
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

def test_another_fingerprint_starts_afresh(tmp_path, capsys):
    fit(Line(), Points(), TrainConfig(steps=6, **CFG), 0, tmp_path/'r', 'one')
    fit(Line(), Points(), TrainConfig(steps=6, **CFG), 0, tmp_path/'r', 'two')
    assert 'Resumed' not in capsys.readouterr().out
    fit(Line(), Points(), TrainConfig(steps=6, **CFG), 0, tmp_path/'r', 'two')
    assert 'Resumed at step 6' in capsys.readouterr().out

def test_a_damaged_checkpoint_is_not_used(tmp_path, capsys):
    fit(Line(), Points(), TrainConfig(steps=4, **CFG), 0, tmp_path/'r', 'one')
    for f in (tmp_path/'r/checkpoint').glob('*.safetensors'): f.write_bytes(f.read_bytes()[:20])
    fit(Line(), Points(), TrainConfig(steps=4, **CFG), 0, tmp_path/'r', 'one')
    assert 'damaged' in (out := capsys.readouterr().out) and 'Resumed' not in out

def test_nan_stops_with_step_term_and_samples_and_keeps_the_last_good_checkpoint(tmp_path):
    obj = Line(bad_at=11)
    with pytest.raises(FloatingPointError, match=r'mse is nan at step 5, samples \[10, 11\]'):
        fit(obj, Points(), TrainConfig(steps=9, **CFG), 0, tmp_path/'r', 'one')
    assert all(p.isfinite().all() for p in obj.parameters())
    import json
    assert json.loads((tmp_path/'r/checkpoint/state.json').read_text())['step'] == 4

def test_a_tracker_that_is_not_installed_is_an_error(tmp_path):
    import importlib.util
    lacking = [n for n in ('wandb', 'tensorboard', 'dvclive') if not importlib.util.find_spec(n)]
    if not lacking: pytest.skip('every tracker is installed')
    class Mean(Objective):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=f'pip install {lacking[0]}'):
        fit(Mean(), [], TrainConfig(steps=1, tracker=lacking[0], precision='no'), 0, tmp_path, 'x')
