"""One optimiser step of each of the six stages of a profile of the paper's scale, on the CPU.

    python tools/real_width.py spar-1b [--depth 6] [--folder DIR]

Random checkpoints at real width and cut depth (the connector, too), the stages' own notebooks, pictures from shards.
It needs some ten GB of disk and prints seconds and peak memory of every stage.

The second pass of tokenizer stage III is left out: its measurement of the latent reads 64 pictures of 512 px at once,
which is for a GPU.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import yaml

from six_stages import STAGES, ROOT, clone, output_of, run

GB = 20            # no stage may need more memory
CONNECTOR = 2      # layers of the connector, cut as everything else
PROFILE = 'step'   # the name of the profile made here


def one_step(profile: str) -> dict:
    "The profile with one step of two samples, and next to nothing measured or drawn."
    p = yaml.safe_load((ROOT/f'configs/{profile}.yaml').read_text())
    step = dict(
        steps=1, batch_size=2, accumulate=1, warmup=0, workers=0, precision='no', log_every=1, save_every=100,
        look_every=100,
    )
    for stage in STAGES:
        p[stage]['train'] |= step
        if stage.startswith('tokenizer'): p[stage] |= dict(pictures=2)
        else: p[stage] |= dict(prompts=p[stage]['prompts'][:1], validation=dict(n=2))
    p['tokenizer_3_encoder'] |= dict(measured=64, finer=dict(side=0))
    p['tokenizer_3_encoder']['loss']['gan_start'] = 0.      # every term in the one step
    model = p['unified_1_connector']['model']
    model['flow']['steps'] = 2
    model['condition']['layers'] = CONNECTOR
    return p


def terms_of(metrics: dict) -> str:
    "The terms of the step, or of the validation after it, in one line."
    flat = metrics.get('final')
    if not flat:
        pairs = [(k, m.items() if isinstance(m, dict) else [('', m)]) for k, m in metrics.items()]
        flat = {(f'{k}.{j}' if j else k): v for k, inner in pairs for j, v in inner}
    numbers = {k: v for k, v in flat.items() if isinstance(v, (int, float)) and not k.startswith('lr')}
    return '  '.join(f'{k} {v:.3g}' for k, v in numbers.items())


def prepare(profile: str, depth: int, tree: Path):
    "A copy of the repository with the profile, random checkpoints, and shards where the profile's sources lie."
    clone(tree)
    settings = one_step(profile)
    (tree/f'configs/{PROFILE}.yaml').write_text(yaml.safe_dump(settings))
    random = ['--random', f'checkpoints/{profile}', '--profile', profile, '--depth', str(depth)]
    print(output_of(run(['spar', 'models', *random], tree)))
    for what in ('captions', 'edits'):
        size = ['--count', '96', '--per-shard', '24']
        output_of(run(['spar', 'data', 'pack', f'world:{what}', f'corpora/{what}', *size], tree))
    for source in (s for stage in STAGES for s in settings[stage]['source']['sources'].values()):
        to = tree/source['path']
        if to.exists(): continue
        to.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(tree/'corpora'/('edits' if source['task'] == 'edit' else 'captions'), to)


def main(profile: str, depth: int, tree: Path) -> bool:
    prepare(profile, depth, tree)
    fine, results = True, tree/'metrics'/PROFILE
    for stage in ('prepare', *STAGES):
        began = time.time()
        output_of(run(['spar', 'stage', stage, '--profile', PROFILE], tree))
        peak = json.loads((results/'run.json').read_text())[stage]['peak_memory_gb']
        fine &= peak < GB
        metrics = results/f'stages/{stage}.json'
        terms = terms_of(json.loads(metrics.read_text()) if metrics.is_file() else {})
        print(f'{profile} {stage:20} {time.time() - began:5.0f} s   peak {peak:5.1f} GB   {terms}', flush=True)
    return fine


if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('profile', choices=('spar-1b', 'spar-3b'))
    a.add_argument('--depth', type=int, default=6)
    a.add_argument('--folder', type=Path, help='where the temporary folder is made')
    args = a.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as d: sys.exit(not main(args.profile, args.depth, Path(d)))
