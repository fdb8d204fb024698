"""A training that is killed anywhere ends with the same bytes.

    python tools/killed.py                        SIGKILL at 20 random steps of the smoke profile's training stages
    python tools/killed.py --processes 2          the same with two processes
    python tools/killed.py --faults               a small training that dies before and after every fsync and rename
    python tools/killed.py --kills 4 --stages tokenizer_1_init unified_2_joint

A stage runs once undisturbed; then its outputs and its run folder are removed, and it is started as often as it takes:
while there are kills left, every process ends itself by SIGKILL in the middle of the step that was drawn for this
start. Artifact, metrics and curves must be the same bytes. The code cells of the stage's notebook run in a fork of a process
that has imported everything, so that a start takes as long as the stage and not as long as the imports.
"""
import argparse
import hashlib
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tests'))
from conftest import clone

PROFILE = 'smoke'
STAGES = (
    'tokenizer_1_init', 'tokenizer_2_decoder', 'tokenizer_3_encoder', 'dcae_tuned',
    'unified_1_connector', 'unified_2_joint', 'unified_3_sft', 'sana_tuned',
)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def forked(work, processes: int, log: Path) -> bool:  # did all of them end well?
    "Run `work(rank)` in forks of this process; when one of them dies, the others are killed, as launchers do."
    port, children = free_port(), {}
    for rank in range(processes):
        if pid := os.fork():
            children[pid] = rank
            continue
        code = 1
        try:
            with open(log.with_suffix(f'.{rank}.log'), 'a') as f:
                os.dup2(f.fileno(), 1)
                os.dup2(f.fileno(), 2)
            if processes > 1:
                who = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
                os.environ.update({k: str(v) for k, v in who.items()}, ACCELERATE_USE_CPU='true')
            work(rank)
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    well = True
    while children:
        pid, status = os.wait()
        children.pop(pid, None)
        if status:
            well = False
            for other in children: os.kill(other, signal.SIGKILL)
    return well


def run_cells(name: str, dies_at: int | None = None):
    "The code cells of a stage's notebook, with the parameters of the profile."
    from spar.running.profiles import notebook_of, resolved
    from spar.training.notebook import code_cells, python_of
    if dies_at is not None: dying_in_step(dies_at)
    os.environ['SPAR_RUN'] = f'runs/{PROFILE}/{name}'
    params, names = resolved(name, PROFILE), dict(__name__='__main__')
    for path in ('plots', ): Path(params[path]).mkdir(parents=True, exist_ok=True)
    for cell in code_cells(notebook_of(name)):
        exec(compile(python_of(cell['source']), name, 'exec'), names)
        if 'parameters' in cell.get('metadata', {}).get('tags', []): names.update(params)


def dying_in_step(step: int):
    "From now on, this process ends itself in the middle of that step: gradients are there, weights have not moved."
    import spar.training.loop as loop
    norm = loop._clipped_norm
    def dying(run, opt):
        found = norm(run, opt)
        if run.step == step: os.kill(os.getpid(), signal.SIGKILL)
        return found
    loop._clipped_norm = dying


def outputs(name: str) -> list[Path]:
    paths = f'artifacts/{PROFILE}/{name}', f'metrics/{PROFILE}/stages/{name}.json', f'plots/{PROFILE}/{name}'
    return [Path(p) for p in paths]


def digest(paths) -> dict[str, str]:
    files = [q for p in paths for q in ([p] if p.is_file() else sorted(p.rglob('*'))) if q.is_file()]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def removed(paths):
    for p in paths: shutil.rmtree(p) if p.is_dir() else p.unlink(missing_ok=True)


def undisturbed(name: str, processes: int, log: Path):
    "Run a stage to its end, or stop everything."
    if not forked(lambda rank: run_cells(name), processes, log):
        raise SystemExit(f'{name} failed: see {log.resolve()}.*.log')


def stage_killed(name: str, kills: list[float], processes: int) -> tuple[int, bool, float]:
    "(how often it was killed, are the bytes the same, seconds)"
    from spar.running.profiles import complete
    steps, began, run = complete(name, PROFILE)['train']['steps'], time.monotonic(), Path(f'runs/{PROFILE}/{name}')
    log = Path(f'runs/{PROFILE}/{name}.undisturbed')
    log.parent.mkdir(parents=True, exist_ok=True)
    undisturbed(name, processes, log)
    whole = digest(outputs(name))
    removed([*outputs(name), run])
    done, log = 0, log.with_suffix('.killed')
    for share in kills:
        step = int(share * steps)
        if forked(lambda rank: run_cells(name, step), processes, log): break      # its checkpoint was beyond that step
        done += 1
    undisturbed(name, processes, log)
    return done, digest(outputs(name)) == whole, time.monotonic() - began


def smoke(kills: int, processes: int, stages, seed: int, tree: Path) -> bool:
    os.chdir(clone(tree, PROFILE))
    sys.path.insert(0, str(tree))
    os.environ.update(PYTHONHASHSEED='0', OMP_NUM_THREADS='1', MPLBACKEND='agg')
    import_everything()
    draw, chosen = random.Random(seed), [s for s in STAGES if s in stages]
    number = {s: kills * (i + 1) // len(chosen) - kills * i // len(chosen) for i, s in enumerate(chosen)}
    share = {s: sorted(draw.random() for _ in range(n)) for s, n in number.items()}
    prepare()
    total, well = 0, True
    for name in STAGES[:STAGES.index(chosen[-1]) + 1]:
        done, same, seconds = stage_killed(name, share.get(name, []), processes)
        total, well = total + done, well and same
        same = 'same bytes' if same else 'OTHER BYTES'
        print(f'{name:22}{processes} process(es), killed {done} times, {same}, {seconds:.0f} s', flush=True)
    print(f'killed {total} times in all: {"same bytes everywhere" if well else "OTHER BYTES"}')
    return well and total > 0


def import_everything():
    "What the stages import, without any computation: a fork must not inherit threads."
    import spar.core, spar.training.loop, spar.training.stage, spar.running.profiles      # noqa: E401, F401
    import spar.tokenizer.training, spar.unified.training, spar.world.pictures, spar.scale.data.corpus      # noqa: E401, F401
    import matplotlib.pyplot, IPython.display      # noqa: E401, F401


def prepare():
    "The stage before the first: random backbones."
    def work(rank):
        from spar.running.profiles import notebook_of, resolved
        from spar.training.notebook import code_cells, python_of
        params, names = resolved('prepare', PROFILE), dict(__name__='__main__')
        for cell in code_cells(notebook_of('prepare')):
            exec(compile(python_of(cell['source']), 'prepare', 'exec'), names)
            if 'parameters' in cell.get('metadata', {}).get('tags', []): names.update(params)
    log = Path(f'runs/{PROFILE}/prepare')
    log.parent.mkdir(parents=True, exist_ok=True)
    if not forked(work, 1, log): raise SystemExit(f'prepare failed: see {log.resolve()}.0.log')


# ---- faults at every fsync and rename of a save

CALLS = ('fsync', 'rename', 'replace')


def toy(folder: Path) -> str:  # digest of the trained weights
    "A small training with a critic, dropout and an average, five checkpoints, two of which stay."
    import torch
    from torch import nn
    from spar.training.loop import fit
    from spar.training.objective import Objective, TrainConfig

    class Toy(Objective):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.critic = nn.Sequential(nn.Linear(4, 8), nn.Dropout(.2), nn.Linear(8, 1)), nn.Linear(1, 1)

        def players(self): return {'model': [*self.net.parameters()], 'critic': [*self.critic.parameters()]}

        def weights(self, progress, player='model'):
            return {'mse': 1., 'fool': .1} if player == 'model' else {'tell': 1.}

        def terms(self, batch, weights, player='model'):
            y = self.net(batch['x'])
            if player == 'critic': return {'tell': self.critic(y.detach()).square().mean()}
            return {'mse': (y - 1).square().mean(), 'fool': -self.critic(y).mean()}

    class Data:
        def __getitem__(self, k):
            return dict(x=torch.randn(4, generator=torch.Generator().manual_seed(int(k))), index=k)

    objective = Toy()
    train = TrainConfig(steps=5, batch_size=4, ema=.9, log_every=2, save_every=1, keep_last=2, precision='no')
    history = fit(objective, Data(), train, 0, folder, 'toy')
    tensors = b''.join(v.numpy().tobytes() for v in objective.state_dict().values())
    return hashlib.sha256(tensors + repr(history.rows).encode()).hexdigest()


def dying_at_call(number: int, after: bool) -> list:
    "From now on, this process ends itself before (or after) the Nth call of fsync, rename, replace or exchange."
    import spar.core as core
    counted = []
    def dying(function):
        def called(*a, **k):
            counted.append(function.__name__)
            if len(counted) == number and not after: os._exit(9)
            try: return function(*a, **k)
            finally:
                if len(counted) == number and after: os._exit(9)
        return called
    for name in CALLS: setattr(os, name, dying(getattr(os, name)))
    core._exchange = dying(core._exchange)
    return counted


def faults(processes: int, every: int, tree: Path) -> bool:
    os.environ.update(OMP_NUM_THREADS='1')
    import spar.training.loop      # noqa: F401
    log = tree/'toy'
    def trained(folder: Path, number: int = 0, after: bool = False):
        def work(rank):
            calls = dying_at_call(number, after) if rank == 0 else []
            found = toy(folder)
            if rank == 0: (tree/'found').write_text(f'{found} {len(calls)}')
        return forked(work, processes, log) and (tree/'found').read_text().split()
    whole, calls = trained(tree/'whole')
    began = time.monotonic()
    for number in range(1, int(calls) + 1, every):
        for after in (False, True):
            folder = tree/f'run{number}{after}'
            assert not trained(folder, number, after), f'call {number} was not reached'
            if (found := trained(folder)[0]) != whole:
                print(f'died {"after" if after else "before"} call {number}: OTHER BYTES')
                return False
    where = 'each' if every == 1 else f'every {every}th'
    print(f'{processes} process(es): died before and after {where} of {calls} calls of fsync, rename and exchange, '
          f'always the same bytes, {time.monotonic() - began:.0f} s')
    return True


def replaced(tree: Path) -> bool:
    "A saved folder takes the place of an earlier one: at every instant one of the two can be read."
    import spar.core as core
    log, calls, target = tree/'replaced', tree/'calls', tree/'model'
    def saved(n: int, number: int, after: bool, exchange: bool):
        def work(rank):
            if not exchange: core._exchange = lambda a, b: False
            counted = dying_at_call(number, after)
            with core.atomic_path(target) as tmp:
                tmp.mkdir()
                core.write_config(tmp/'config.json', dict(n=n))
            calls.write_text(str(len(counted)))
        return forked(work, 1, log)
    for exchange in (True, False):
        shutil.rmtree(target, ignore_errors=True)
        assert saved(0, 0, False, exchange) and saved(0, 0, False, exchange)
        for number in range(1, int(calls.read_text()) + 1):
            for after in (False, True):
                assert not saved(number, number, after, exchange), f'call {number} was not reached'
                found = core.read_config(target/'config.json')['n']
                if found not in (0, number):
                    print(f'died {"after" if after else "before"} call {number}: neither of the two')
                    return False
                assert saved(0, 0, False, exchange)
    print(f'a folder that replaces a folder: always one of the two, {calls.read_text()} calls, with exchange and without')
    return True


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--kills', type=int, default=20)
    p.add_argument('--processes', type=int, default=1)
    p.add_argument('--stages', nargs='+', default=STAGES, choices=STAGES)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--faults', action='store_true')
    p.add_argument('--every', type=int, default=1, help='with --faults: at every Nth call only')
    a = p.parse_args(argv)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        tree = Path(folder)
        if a.faults: return 0 if faults(a.processes, a.every, tree) and replaced(tree) else 1
        return 0 if smoke(a.kills, a.processes, a.stages, a.seed, tree) else 1


if __name__ == '__main__': sys.exit(main())
