"""The six stages from shards on two processes; each is killed after its first checkpoint and continued on one process.

    python tools/six_stages.py        the miniature, on its own backbones, ten steps a stage (some minutes on two cores)
    python tools/six_stages.py --profile smoke --stages tokenizer_1_init
                                      what the tests do: random backbones of a few layers

What differs from the profile: ten steps, fp32, AdamW at a rate of 1e-4 (Muon turns matrices in bf16; AdamW's first
steps move every weight by the rate, whatever its gradient, and at the miniature's rates ten such steps drive a trained
decoder off, where rounding is amplified as in every chaos). Both runs of a stage start from the same result of the
stage before.

What "within rounding" means here: two processes add the same gradients in another order, so they differ in the last
bit. AdamW divides a gradient by its own size, so where a gradient is itself rounding (a bias before a normalisation, a
token that nobody reads) that last bit decides the sign of a whole step, and such a weight ends up to 2 x lr away a
step; everywhere else the difference stays in the last digits. So three numbers are printed for every stage, against
the run that nobody killed: the largest difference, the share of weights farther apart than 1e-5, and the norm of the
difference against that of the weights.
"""
import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tests'))
from conftest import ROOT, clone, environment, run
from spar.training.checkpoints import checkpoint_steps

STAGES = (
    'tokenizer_1_init', 'tokenizer_2_decoder', 'tokenizer_3_encoder',
    'unified_1_connector', 'unified_2_joint', 'unified_3_sft',
)
PROFILE = 'shards'            # the name of the profile made here
STEPS = 10
LR = 1e-4
CLOSE, SHARE = 4 * LR, .01    # two steps of opposite sign; the share of weights that may be farther off than 1e-5
TWO = [
    'accelerate-launch', '--config_file', 'configs/accelerate/ddp.yaml', '--num_processes', '2',
    '--main_process_port', '0', '-m', 'spar.running.runner',
]


def sources(stage: str) -> dict:
    if stage.startswith('tokenizer'): return dict(pictures=dict(path='corpora/captions', task='image'))
    captions = dict(captions=dict(path='corpora/captions', task='caption', weight=.5))
    if stage == 'unified_1_connector': return captions
    return captions | dict(edits=dict(path='corpora/edits', task='edit', weight=.5))


def shards_profile(base: str) -> dict:
    "A profile from shards, in fp32 with AdamW and few steps, with a second pass of tokenizer stage III."
    p = yaml.safe_load((ROOT/f'configs/{base}.yaml').read_text())
    train = dict(
        steps=STEPS, save_every=2, log_every=2, lr=LR, lr_end=LR / 10, warmup=2, precision='no', optimizer='adamw',
    )
    for stage in STAGES:
        p[stage] |= dict(source=dict(side=64, sources=sources(stage)))
        p[stage]['train'] |= train
    p['tokenizer_3_encoder']['finer'] = dict(side=128, loss=dict(gan_start=0.), train=dict(steps=4))
    return p


def output_of(done) -> str:
    "What a command printed; an error of the command is an error here."
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


def kill_all(p: psutil.Popen):
    "A process and everything it started."
    processes = [*p.children(recursive=True), p]
    for q in processes:
        try: q.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess: pass
    psutil.wait_procs(processes, 60)
    p.wait()


def killed(stage: str, tree: Path) -> int:       # the step whose checkpoint is left
    "Start a stage on two processes and kill every one of them at its first checkpoint."
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    p = psutil.Popen(TWO + [stage, '--profile', PROFILE], cwd=tree, env=environment(tree), **quiet)
    checkpoints = tree/'runs'/PROFILE/stage/'checkpoints'
    while not checkpoint_steps(checkpoints):
        assert p.poll() is None, f'{stage} ended with {p.poll()} before its first checkpoint'
        time.sleep(.01)
    kill_all(p)
    step = max(checkpoint_steps(checkpoints))
    late = (tree/'artifacts'/PROFILE/stage).exists()
    assert 0 < step < STEPS and not late, f'{stage} was killed too late, at step {step}'
    return step


def difference(a: Path, b: Path) -> dict:  # largest: absolute; share: farther apart than 1e-5; norm: |a - b| / |a|
    "How far two folders' weights are apart; other names are an error."
    names = sorted(p.relative_to(a) for p in a.rglob('*.safetensors'))
    assert names and names == sorted(p.relative_to(b) for p in b.rglob('*.safetensors'))
    most, far, n, d2, a2 = 0., 0, 0, 0., 0.
    for name in names:
        x, y = load_file(a/name), load_file(b/name)
        assert x.keys() == y.keys()
        for k in x:
            u = x[k].double()
            d = (u - y[k].double()).abs()
            most = max(most, d.max().item())
            far += (d > 1e-5).sum().item()
            n += d.numel()
            d2 += d.square().sum().item()
            a2 += u.square().sum().item()
    return dict(largest=most, share=far/n, norm=(d2/a2)**.5)


def close(d: dict) -> bool: return d['largest'] <= CLOSE and d['share'] <= SHARE


def prepared(tree: Path, base: str):
    "A copy of the repository with the profile, shards of the miniature's world, and the stage `prepare` done."
    clone(tree)
    if base != 'smoke':
        if not (ROOT/'data/bases/mllm').is_dir():
            raise SystemExit('The backbones of the miniature are not here: `dvc pull data.dvc` fetches them.')
        shutil.copytree(ROOT/'data/bases', tree/'data/bases', dirs_exist_ok=True)
    (tree/f'configs/{PROFILE}.yaml').write_text(yaml.safe_dump(shards_profile(base)))
    for what in ('captions', 'edits'):
        size = ['--count', '48', '--per-shard', '8']
        out = output_of(run(['spar_data', 'pack', f'world:{what}', f'corpora/{what}', *size], tree))
        print(out.strip().splitlines()[-1])
    output_of(run(['spar_stage', 'prepare', '--profile', PROFILE], tree))


def compared(stage: str, whole: Path, broken: Path) -> dict:      # `difference`
    "One stage without a kill in one tree, with one in the other; afterwards both hold the result of the first."
    began = time.time()
    output_of(run([*TWO, stage, '--profile', PROFILE], whole))
    seconds, step = time.time() - began, killed(stage, broken)
    out = output_of(run(['spar_stage', stage, '--profile', PROFILE], broken))
    assert f'Resumed at step {step} of {STEPS}' in out, out[-3000:]
    result = Path('artifacts', PROFILE, stage)
    d = difference(whole/result, broken/result)
    shutil.rmtree(broken/result)
    shutil.copytree(whole/result, broken/result)
    print(f'{stage:20} two processes, {seconds:3.0f} s; killed after step {step}, continued on one: '
          f'largest difference of a weight {d["largest"]:.1e}, farther than 1e-5 {d["share"]:.3%}, '
          f'|a - b| / |a| {d["norm"]:.1e}', flush=True)
    return d


def main(folder: Path, base='smoke', stages=STAGES) -> dict:      # stage -> `difference`
    whole, broken = folder/'uninterrupted', folder/'killed'
    prepared(whole, base)
    shutil.copytree(whole, broken, symlinks=True)
    return {stage: compared(stage, whole, broken) for stage in stages}


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--profile', default='mini', choices=('mini', 'smoke'))
    p.add_argument('--stages', nargs='+', default=STAGES, choices=STAGES)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d: found = main(Path(d), a.profile, tuple(a.stages))
    sys.exit(not all(map(close, found.values())))
