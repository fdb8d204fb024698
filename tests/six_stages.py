"""The stages from WebDataset shards under `accelerate-launch --num_processes 2`; one of them is killed after its first checkpoint and continued on one process.

    python tests/six_stages.py                                          all six, tokenizer stage III is killed (some minutes on two cores)
    python tests/six_stages.py --stages tokenizer_1_init --killed tokenizer_1_init     what the tests do

Random backbones of a few layers, ten steps a stage, fp32. What "within rounding" means here: two processes add the same gradients in another order, so they differ in the last bit.
AdamW divides a gradient by its own size, so where a gradient is itself rounding (a bias before a normalisation, a token that nobody reads) that last bit decides the sign of a whole step, and the
weight ends up to 2 x lr away for each such step. Everywhere else it stays in the last digits. So three numbers are printed for every stage, against the run that nobody killed: the largest
difference, the share of weights farther apart than 1e-5, and the norm of the difference against the norm of the weights; the largest has to be within two such steps, the share within SHARE."""
import argparse, json, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
import psutil, yaml
from safetensors.torch import load_file
from conftest import ROOT, clone, environment, run

STAGES = ('tokenizer_1_init', 'tokenizer_2_decoder', 'tokenizer_3_encoder', 'unified_1_connector', 'unified_2_joint', 'unified_3_sft')
STEPS = 10
CLOSE, SHARE = 4e-3, .01      # two steps of opposite sign at lr 1e-3; the share of weights that may be farther off than 1e-5
TWO = ['accelerate-launch', '--config_file', 'configs/accelerate/ddp.yaml', '--num_processes', '2', '--main_process_port', '0', '-m', 'spar.runner']

def sources(stage: str) -> dict:
    if stage.startswith('tokenizer'): return dict(pictures=dict(path='corpora/captions', task='image'))
    captions = dict(captions=dict(path='corpora/captions', task='caption', weight=.5))
    return captions if stage == 'unified_1_connector' else captions | dict(edits=dict(path='corpora/edits', task='edit', weight=.5))

def profile() -> dict:
    "The smoke profile from shards, in fp32 with AdamW, with a second pass of tokenizer stage III."
    p = yaml.safe_load((ROOT/'configs/smoke.yaml').read_text())
    for stage in STAGES:
        p[stage] |= dict(source=dict(side=64, sources=sources(stage)))
        p[stage]['train'] |= dict(steps=STEPS, save_every=2, precision='no', optimizer='adamw')      # Muon turns matrices in bf16
    p['tokenizer_3_encoder']['finer'] = dict(side=128, loss=dict(gan_start=0.), train=dict(steps=4))
    return p

def said(done) -> str:
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr

def killed(stage: str, tree: Path) -> int:       # the step whose checkpoint is left
    "Start a stage on two processes and kill every one of them at its first checkpoint."
    p = psutil.Popen(TWO + [stage, '--profile', 'shards'], cwd=tree, env=environment(tree), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = tree/'runs/shards'/stage/'checkpoint/state.json'
    while not state.is_file():
        assert p.poll() is None, f'{stage} ended with {p.poll()} before its first checkpoint'
        time.sleep(.01)
    all_of_them = [*p.children(recursive=True), p]
    for q in all_of_them:
        try: q.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess: pass
    psutil.wait_procs(all_of_them, 60); p.wait()
    step = json.loads(state.read_text())['step']
    assert 0 < step < STEPS and not (tree/'artifacts'/stage).exists(), f'{stage} was killed too late, at step {step}'
    return step

def difference(a: Path, b: Path) -> dict:        # largest: absolute; share: of weights farther apart than 1e-5; norm: |a - b| / |a|
    "How far two folders' weights are apart; other names are an error."
    names = sorted(p.relative_to(a) for p in a.rglob('*.safetensors')); assert names and names == sorted(p.relative_to(b) for p in b.rglob('*.safetensors'))
    most, far, n, d2, a2 = 0., 0, 0, 0., 0.
    for name in names:
        x, y = load_file(a/name), load_file(b/name); assert x.keys() == y.keys()
        for k in x:
            u = x[k].double(); d = (u - y[k].double()).abs()
            most = max(most, d.max().item()); far += (d > 1e-5).sum().item(); n += d.numel(); d2 += d.square().sum().item(); a2 += u.square().sum().item()
    return dict(largest=most, share=far/n, norm=(d2/a2)**.5)

def close(d: dict) -> bool: return d['largest'] <= CLOSE and d['share'] <= SHARE

def main(place: Path, stages=STAGES, victim='tokenizer_3_encoder') -> dict:      # stage -> `difference`
    whole, broken = place/'uninterrupted', place/'killed'
    clone(whole)
    (whole/'configs/shards.yaml').write_text(yaml.safe_dump(profile()))
    for what in ('captions', 'edits'): print(said(run(['spar_data', 'pack', f'world:{what}', f'corpora/{what}', '--count', '48', '--per-shard', '8'], whole)).strip().splitlines()[-1])
    said(run(['spar_stage', 'prepare', '--profile', 'shards'], whole))
    for stage in stages:
        if stage == victim: shutil.copytree(whole, broken, symlinks=True)
        began = time.time(); said(run([*TWO, stage, '--profile', 'shards'], whole)); print(f'{stage:20} two processes, {time.time() - began:.0f} s', flush=True)
    step = killed(victim, broken); out = said(run(['spar_stage', victim, '--profile', 'shards'], broken))
    assert f'Resumed at step {step} of {STEPS}' in out, out[-3000:]
    print(f'{victim:20} killed on two processes after the checkpoint of step {step}, continued on one', flush=True)
    for stage in stages[stages.index(victim) + 1:]: said(run([*TWO, stage, '--profile', 'shards'], broken))
    found = {stage: difference(whole/'artifacts'/stage, broken/'artifacts'/stage) for stage in stages}
    for stage, d in found.items(): print(f'{stage:20} largest difference of a weight {d["largest"]:.1e}   farther than 1e-5: {d["share"]:.2%}   |a - b| / |a| = {d["norm"]:.1e}')
    return found

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0]); p.add_argument('--stages', nargs='+', default=STAGES, choices=STAGES); p.add_argument('--killed', default='tokenizer_3_encoder', choices=STAGES)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d: found = main(Path(d), tuple(a.stages), a.killed)
    sys.exit(not all(map(close, found.values())))
