"""One optimiser step of each of the six stages of a profile of the paper's scale, on the CPU: random checkpoints at real width and cut depth (the connector, too), the stages' own notebooks, pictures from shards.

    python tests/real_width.py spar-1b [--depth 6] [--place DIR]       some ten GB of disk; prints seconds and peak memory of every stage

The second pass of tokenizer stage III is left out: its measurement of the latent reads 64 pictures of 512 px at once, which is for a GPU."""
import argparse, json, os, sys, tempfile, time
from pathlib import Path
import yaml
from conftest import ROOT, clone, run
from six_stages import STAGES, said

GB, CONNECTOR = 20, 2      # layers of the connector, cut as everything else

def one_step(profile: str) -> dict:
    "The profile with one step of two samples, and next to nothing measured or drawn."
    p = yaml.safe_load((ROOT/f'configs/{profile}.yaml').read_text())
    for stage in STAGES:
        p[stage]['train'] |= dict(steps=1, batch_size=2, accumulate=1, warmup=0, workers=0, precision='no', log_every=1, save_every=100, look_every=100)
        p[stage] |= dict(pictures=2) if stage.startswith('tokenizer') else dict(prompts=p[stage]['prompts'][:1], validation=dict(n=2))
    p['tokenizer_3_encoder'] |= dict(measured=64, finer=dict(side=0)); p['tokenizer_3_encoder']['loss']['gan_start'] = 0.      # every term in the one step
    p['unified_1_connector']['model']['flow']['steps'] = 2; p['unified_1_connector']['model']['condition']['layers'] = CONNECTOR
    return p

def said_of(metrics: dict) -> str:
    "The terms of the step, or of the validation after it, in one line."
    flat = metrics.get('final') or {(f'{k}.{j}' if j else k): v for k, m in metrics.items() for j, v in (m.items() if isinstance(m, dict) else [('', m)])}
    return '  '.join(f'{k} {v:.3g}' for k, v in flat.items() if isinstance(v, (int, float)) and not k.startswith('lr'))

def main(profile: str, depth: int, place: Path) -> bool:
    clone(place); (place/'configs/step.yaml').write_text(yaml.safe_dump(one_step(profile)))
    print(said(run(['spar_models', '--random', f'checkpoints/{profile}', '--profile', profile, '--depth', str(depth)], place)))
    for what in ('captions', 'edits'): said(run(['spar_data', 'pack', f'world:{what}', f'corpora/{what}', '--count', '96', '--per-shard', '24'], place))
    for s in [s for stage in STAGES for s in one_step(profile)[stage]['source']['sources'].values()]:
        if not (to := place/s['path']).exists(): to.parent.mkdir(parents=True, exist_ok=True); os.symlink(place/'corpora'/('edits' if s['task'] == 'edit' else 'captions'), to)
    fine = True
    for stage in ('prepare', *STAGES):
        began = time.time(); said(run(['spar_stage', stage, '--profile', 'step'], place)); peak = json.loads((place/'metrics/run.json').read_text())[stage]['peak_memory_gb']; fine &= peak < GB
        metrics = place/f'metrics/stages/{stage}.json'; final = json.loads(metrics.read_text()) if metrics.is_file() else {}
        print(f'{profile} {stage:20} {time.time() - began:5.0f} s   peak {peak:5.1f} GB   {said_of(final)}', flush=True)
    return fine

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0]); a.add_argument('profile', choices=('spar-1b', 'spar-3b')); a.add_argument('--depth', type=int, default=6); a.add_argument('--place', type=Path)
    args = a.parse_args()
    with tempfile.TemporaryDirectory(dir=args.place) as d: sys.exit(not main(args.profile, args.depth, Path(d)))
