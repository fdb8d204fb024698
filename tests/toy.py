"""A training of a second, in a process of its own that can be killed: a server that has imported torch forks it."""
import hashlib, multiprocessing, os, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from spar.training.loop import fit
from spar.training.objective import Objective, TrainConfig

class Fit(Objective):
    "A model with dropout and a critic that begins later."
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

def main(folder: str, save_every: int, out: str):
    "What the process does; it prints into the file `out`."
    sys.stdout, sys.stderr = open(out, 'w', buffering=1), open(os.devnull, 'w')
    torch.set_num_threads(1)
    obj = Fit(); print('begins')
    fit(obj, Data(), TrainConfig(steps=60, batch_size=4, accumulate=2, warmup=5, ema=.9, log_every=7, save_every=save_every, precision='no'), 0, folder, 'one')
    print('HASH', hashlib.sha256(b''.join(v.numpy().tobytes() for v in obj.state_dict().values())).hexdigest())

class Child:
    "A process that trains in `folder`."
    def __init__(self, folder, save_every: int = 4):
        context = multiprocessing.get_context('forkserver'); context.set_forkserver_preload(['spar.training.loop'])
        Path(folder).mkdir(parents=True, exist_ok=True); self.out = Path(folder)/f'{time.monotonic_ns()}.txt'
        self.process = context.Process(target=main, args=(str(folder), save_every, str(self.out)))
        self.process.start()
    def poll(self): return self.process.exitcode
    def wait(self, timeout: float = 240) -> int:
        self.process.join(timeout); assert self.poll() is not None, f'still running after {timeout} s'
        return self.poll()
    def kill(self): self.send_signal(signal.SIGKILL); assert self.wait() == -signal.SIGKILL
    def send_signal(self, number): os.kill(self.process.pid, number)
    def printed(self) -> str: return self.out.read_text() if self.out.exists() else ''
