"""Two processes with one global batch give the loss curve and the weights of one process, with DDP and with FSDP2, through the notebook's own kernel too."""
import csv, json, os, shutil, subprocess, sys, time
from pathlib import Path
import psutil, pytest, torch
from safetensors.torch import load_file
from conftest import ROOT
from spar.training.checkpoints import checkpoint_steps

pytestmark = pytest.mark.slow

# Stage II of the unified model on random backbones of a few layers: both tasks, alignment, EMA, two micro-batches a step, from shards.
PROGRAM = '''
import os, sys, torch
from safetensors.torch import save_file
import spar.training.loop as training
import spar.training.run as state_of
from spar.core import is_first
from spar.backbones.dcae import load_dcae
from spar.backbones.mllm import load_mllm
from spar.backbones.sana import load_sana
from spar.scale.data.corpus import corpus_of
from spar.tokenizer.model import new_tokenizer
from spar.training.objective import TrainConfig
from spar.unified.model import Unified, UnifiedConfig
from spar.unified.training import StageConfig, UnifiedObjective
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
base, run, how = sys.argv[1], sys.argv[2], sys.argv[3:]
if 'fsdp' in how:           # accelerate itself takes FSDP2 on accelerators only; on the CPU it is asked for by hand
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import DistributedType
    def sharding(**kw):
        acc = Accelerator(**kw); acc.state.distributed_type = DistributedType.FSDP
        acc.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy='transformer_based_wrap',
            transformer_cls_names_to_wrap=['SanaTransformerBlock', 'Qwen2DecoderLayer'], cpu_ram_efficient_loading=False, state_dict_type='full_state_dict')
        return acc
    state_of.Accelerator = sharding
if 'dies' in how:           # after the checkpoint of step 4
    step = training.players_step
    def dying(r, micros, t):
        if t < 4: return step(r, micros, t)
        if 'fsdp' in how:
            assert all(isinstance(p, DTensor) for p in r.averaged + r.ema.shadow_params)
            assert sum(isinstance(m, FSDPModule) for m in r.objective.modules()) > 3
        print('DIED', flush=True); torch.distributed.barrier() if torch.distributed.is_initialized() else None; os._exit(3)
    training.players_step = dying
mllm, dcae = load_mllm(f'{base}/mllm'), load_dcae(f'{base}/dcae')
tokenizer = new_tokenizer(mllm, dcae, dict(layers=1, heads=2, blocks=1))
train = dict(steps=6, batch_size=4, accumulate=2, lr=1e-3, warmup=2, ema=.9, log_every=2, save_every=2, precision='no', checkpointing='forgets' in how)
source = dict(side=64, sources={n: dict(path=f'{base}/{n}', task=t, weight=.5) for n, t in (('captions', 'caption'), ('edits', 'edit'))})
corpus = corpus_of(source, train, 0)
tokenizer.measure(dcae, [corpus.batch([0, 1])])
settings = dict(condition=dict(queries=4, layers=1), alignment=dict(block=1, hidden=32))
unified = Unified(mllm, tokenizer, load_sana(f'{base}/sana').transformer, UnifiedConfig.from_dict(settings), dcae)
objective = UnifiedObjective(unified, StageConfig('joint'))
history = training.fit(objective, corpus, TrainConfig.from_dict(train), 0, run, 'f')
assert not any(isinstance(p, DTensor) for p in objective.parameters())
history.save(run + '/loss.csv')
if is_first(): save_file({k: v.contiguous().clone() for k, v in unified.state_dict().items() if not k.startswith('mllm')}, run + '/end.safetensors')
'''

ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': '1', 'PYTHONHASHSEED': '0'}
TWO = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
LAUNCH = [str(Path(sys.executable).with_name('accelerate-launch')), '--config_file', str(ROOT/'configs/accelerate/ddp.yaml'),
          '--num_processes', '2', '--main_process_port', '0']      # as documented; 0: any free port

def start(cmd, cwd=ROOT, env=ENV):
    done = subprocess.run(cmd, cwd=cwd, env={**env, 'PYTHONPATH': os.pathsep.join([str(cwd), str(ROOT)])}, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "Random backbones, shards of both tasks, the program, and what one process makes of them."
    from spar.mini.random import random_bases
    from spar.scale.data.check import world_samples, write_shards
    from spar.world.prompts import vocabulary
    base = tmp_path_factory.mktemp('base'); random_bases(base, vocabulary())
    for name in ('captions', 'edits'): write_shards(world_samples(name, count=24), base/name, 8)
    (base/'program.py').write_text(PROGRAM)
    code, out = start([sys.executable, str(base/'program.py'), str(base), str(base/'one')]); assert code == 0, out[-3000:]
    return base

def curve(run): return [{k: float(v) for k, v in r.items() if v} for r in csv.DictReader(open(run/'loss.csv'))]

def same(base, run):
    "Curve and weights of a run are those of the single process, within rounding."
    assert len(curve(run)) == 3
    for a, b in zip(curve(base/'one'), curve(run)): assert a.keys() == b.keys() and all(abs(a[k] - b[k]) <= 1e-4 * abs(a[k]) + 1e-6 for k in a), (a, b)
    one, other = load_file(base/'one/end.safetensors'), load_file(run/'end.safetensors')
    assert one.keys() == other.keys()
    for k in one: torch.testing.assert_close(other[k], one[k], atol=2e-4, rtol=0, msg=lambda m: f'{k}: {m}')     # six steps of Adam with rate 1e-3

def test_two_processes_end_as_one(base):
    code, out = start([*TWO, str(base/'program.py'), str(base), str(base/'two'), 'forgets']); assert code == 0, out[-3000:]
    same(base, base/'two')

@pytest.fixture(scope='module')
def killed(base):
    "A run of two sharded processes that ended after the checkpoint of step 4."
    code, out = start([*TWO, str(base/'program.py'), str(base), str(base/'killed'), 'fsdp', 'dies']); assert code and 'DIED' in out, out[-3000:]
    state = json.loads((base/'killed/checkpoints/step-00000004/state.json').read_text())
    assert state['step'] == 4 and state['data']['position'] == 16
    return base/'killed'

@pytest.mark.parametrize('who', ['one', 'two sharded'])
def test_killed_on_two_continues_on(base, killed, who):
    run = shutil.copytree(killed, base/f'on {who}')
    code, out = start([*TWO[:len(TWO) if who != 'one' else 1], str(base/'program.py'), str(base), str(run), *(['fsdp'] if who != 'one' else [])])
    assert code == 0 and 'Resumed at step 4' in out, out[-3000:]
    same(base, run)


CELLS = [('ill = False\nout = "artifacts/line"\ntrain = {"steps": 4, "batch_size": 4, "precision": "no"}', ['parameters']), ('''
import accelerate, os, torch
from pathlib import Path
from spar.core import atomic_path, read_json, write_json
from spar.figures import save_figure
from spar.training.loop import fit
from spar.training.objective import Objective, TrainConfig
from spar.training.stage import Stage
class Line(Objective):
    def __init__(self): super().__init__(); torch.manual_seed(0); self.net = torch.nn.Linear(1, 1)
    def weights(self, progress, player="model"): return {"mse": 1.}
    def terms(self, batch, weights, player="model"): return {"mse": (self.net(batch["x"]) - 1).square().mean()}
class Points:
    def __getitem__(self, k):
        if ill and k > 8 and os.environ["RANK"] == "1": raise RuntimeError("process 1 is ill")
        return dict(x=torch.tensor([k % 7 / 7.]), index=k)''', []), ('''
def look(objective, step): write_json(f"plots/line/{step}.json", dict(rank=int(os.environ["RANK"])))
stage = Stage.current("line"); line = Line()
print("built")
history = fit(line, Points(), TrainConfig.from_dict(train), 0, stage.run, stage.parts(train), look)
assert accelerate.PartialState().num_processes == 2
assert read_json("plots/line/4.json") == dict(rank=0)       # a later cell reads it in every process
history.save("plots/line/loss.csv"); save_figure(history.plot(), "plots/line/loss.png")
with atomic_path(out) as tmp: tmp.mkdir(); write_json(tmp/"weights.json", dict(rank=int(os.environ["RANK"]), w=line.net.weight.item()))''', [])]

@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    "A repository of one stage."
    toy = tmp_path_factory.mktemp('toy')
    for d in ('nbs/stages', 'configs', 'metrics'): (toy/d).mkdir(parents=True)
    os.symlink(ROOT/'spar', toy/'spar')
    cells = [dict(cell_type='code', source=s, id=f'c{i}', outputs=[], execution_count=None, metadata=dict(tags=t)) for i, (s, t) in enumerate(CELLS)]
    spec = dict(kernelspec=dict(name='python3', language='python', display_name='python3'))
    (toy/'nbs/stages/line.ipynb').write_text(json.dumps(dict(cells=cells, metadata=spec, nbformat=4, nbformat_minor=5)))
    (toy/'params.yaml').write_text('profile: well\n')
    for name, ill in (('well', 'false'), ('ill', 'true')): (toy/f'configs/{name}.yaml').write_text(f'line: {{ill: {ill}}}\n')
    return toy

def files(folder): return sorted(s for s in (str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file() and 'spar' not in p.relative_to(folder).parts[:1]) if 'checkpoints' not in s and not s.endswith('.lock'))

def test_every_process_runs_the_notebook_and_the_first_one_writes(toy):
    "Started as the documentation says, in an environment that says nothing of a CPU."
    plain = {k: v for k, v in ENV.items() if k != 'ACCELERATE_USE_CPU'}
    before = files(toy)
    code, out = start([*LAUNCH, '-m', 'spar.running.runner', 'line'], toy, plain)
    assert code == 0 and out.count('built') == 1, out[-3000:]
    assert sorted(set(files(toy)) - set(before)) == ['artifacts/line/weights.json', 'metrics/well/run.json',
                                                     'plots/line/4.json', 'plots/line/loss.csv', 'plots/line/loss.png',
                                                     'runs/well/line.ipynb', 'runs/well/line/rank1.ipynb']
    assert json.loads((toy/'artifacts/line/weights.json').read_text())['rank'] == 0

def test_one_process_that_fails_ends_all(toy):
    began = time.time(); code, out = start([*TWO, '-m', 'spar.running.runner', 'line', '--profile', 'ill'], toy)
    assert code and 'process 1 is ill' in out and 'runs/ill/line/rank1.ipynb' in out and time.time() - began < 60, out[-3000:]
    mine = lambda p: any('ipykernel' in a or 'spar.running.runner' in a for a in p.cmdline()) and p.cwd() == str(toy.resolve())
    def alive():
        found = []
        for p in psutil.process_iter():
            try: found += [p] if mine(p) else []
            except (psutil.Error, OSError): continue
        return found
    while alive() and time.time() - began < 60: time.sleep(.2)
    assert not alive()


def test_a_stage_from_shards_killed_on_two_processes_ends_on_one_as_if_nothing_had_happened(tmp_path):
    "The first of the six stages, through its notebook and `accelerate-launch`; tools/six_stages.py does all six."
    sys.path.insert(0, str(ROOT/'tools'))
    from six_stages import close, main
    assert close(found := main(tmp_path, stages=('tokenizer_1_init',))['tokenizer_1_init']), found


@pytest.mark.parametrize('how', ['--kills 3 --stages tokenizer_1_init --processes 2', '--faults --every 5', '--faults --every 13 --processes 2'])
def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path, how):
    "tools/killed.py: SIGKILL in the middle of random steps, and before and after fsyncs and renames of a save (all of them: without --every)."
    code, out = start([sys.executable, str(ROOT/'tools/killed.py'), *how.split()], tmp_path)
    assert code == 0 and 'same bytes' in out and 'OTHER' not in out, out[-3000:]

@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1'])
def test_a_signal_to_one_of_two_processes_ends_both_with_one_checkpoint(base, tmp_path, name):
    "The other process is told by the first: both save the same step."
    run = tmp_path/'signalled'; port = str(29000 + os.getpid() % 1000)
    here = lambda rank: {**ENV, 'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'PYTHONPATH': str(ROOT)}
    program = (base/'program.py').read_text().replace("train = dict(steps=6", "train = dict(steps=600").replace("if 'dies' in how:", "if 'signalled' in how:").replace(
        "if t < 4: return step(r, micros, t)", "if t == 4 and int(os.environ['RANK']) == 1: import signal; os.kill(os.getpid(), signal.%s)\n        return step(r, micros, t)" % name)
    (tmp_path/'program.py').write_text(program)
    pair = [subprocess.Popen([sys.executable, str(tmp_path/'program.py'), str(base), str(run), 'signalled'], env=here(rank), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in (0, 1)]
    outs = [p.communicate(timeout=200)[0] for p in pair]
    assert [p.returncode for p in pair] == [0, 0], outs[0][-3000:]
    assert max(checkpoint_steps(run/'checkpoints')) == 5
