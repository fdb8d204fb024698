"""The first losses of every training stage: those that the repository has, and those that the code gives now.

    python tools/golden.py --check                        compute them and print what differs from the file
    python tools/golden.py --check --profile smoke --stage unified_1_connector
                                                          the same for some of them
    python tools/golden.py                                compute them and write tests/golden_losses.json

Whoever means to change no number runs `--check`: it says "the same bit for bit", or what differs first in each stage.
Whoever means to change some writes the file and commits it with the change; `git diff` shows which stages moved.
`make test` compares within TOLERANCE: another processor adds in another order.

What is computed: `fit`, on one thread of the CPU, in fp32 whatever the machine can do (Muon too, which would turn
matrices in bf16 where the processor has it). Ten steps from the beginning of the stage (smoke: all it has), then three
steps from the beginning of every later phase (pixels, the critic). Every row holds the step, the learning rate, each
term of the loss and the gradient norm of each player.

What a stage starts from: a fresh clone has the backbones and no trained stage. So the parts of the tokenizer and of the
unified model are as their first notebooks make them, seeded and untrained, and every stage passes them on untouched, as
with `train.steps: 0`. (Smoke has random backbones.) A stage's numbers therefore never depend on another stage's.

What differs from the profile: fewer samples a step (SMALLER, below), so that ten steps take seconds. And smoke's stages
that compare pictures have a learning rate of 1e-6: where thousands of pixels are alike, as in a flat background, the
last bit decides which one a maximum takes, and AdamW's first steps move every weight by the rate whatever its gradient.
On random networks four steps of 1e-3 made 1e-7 into a tenth. Sizes, schedule, optimiser, terms and samples are the
profile's, in mini the rates too.

TOLERANCE: kernels for SSE4 in place of those for AVX2 changed losses by 1e-4 at most, gradient norms by 3e-3.

bf16 is untried: no machine with bf16 has recorded it. `--precision bf16` does, on one that has it.
"""
import argparse
import contextlib
import json
import math
import os
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import yaml

from spar.backbones.dcae import load_dcae
from spar.backbones.sana import latent_stats
from spar.core import has_fast_bf16, instructions, one_of, write_json
from spar.mini.random import random_bases
from spar.running.benchmark import training_of, training_stages
from spar.running.profiles import notebook_of, yaml_file
from spar.running.step_cost import phases, Training
from spar.training import loop
from spar.training.notebook import parameters
from spar.training.run import Run
from spar.world.prompts import vocabulary

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT/'tests/golden_losses.json'
WRITES = '`python tools/golden.py`'
PROFILES = ('smoke', 'mini')
STEPS, LATER = 10, 3       # from the beginning of a stage; from the beginning of each later phase
SMALLER = dict(pictures=8, scenes=64, batch_size=4)      # at most; the rest is no part of a step, or would take minutes
TOLERANCE = dict(           # precision -> relative difference of a loss and of a gradient's norm
    no=dict(loss=1e-3, norm=2e-2),
    bf16=dict(loss=5e-2, norm=3e-1),      # untried
)
ABSOLUTE = 1e-6            # below it two losses are the same
CPU = torch.device('cpu')


def backbones(profile: str) -> dict:      # name -> folder
    "Those of the profile, in a tree made by `tree_of`."
    if profile == 'smoke': return random_bases(f'artifacts/{profile}/prepared', vocabulary())
    paths = {name: f'data/bases/{name}' for name in ('mllm', 'dcae', 'sana', 'lpips')}
    absent = [p for p in paths.values() if not Path(p).is_dir()]
    if absent: raise FileNotFoundError(f'{", ".join(absent)}: not there. `dvc pull -q -r store data.dvc` fetches them.')
    return paths


def smaller(section: dict, name: str, profile: str) -> dict:
    "A stage's section of the profile with less to compute, and in smoke with a rate that keeps rounding small."
    defaults = parameters(notebook_of(name))
    section |= {k: SMALLER[k] for k in SMALLER.keys() & defaults.keys()}
    section['train']['batch_size'] = min(SMALLER['batch_size'], section['train']['batch_size'])
    if profile == 'smoke' and 'pictures' in defaults: section['train'] |= dict(lr=1e-6, lr_end=1e-7)
    return section


@contextlib.contextmanager
def tree_of(profile: str):
    "Inside, the working folder is a tree with the profile's notebooks and backbones, and nothing trained."
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for name in ('nbs', 'data'): Path(name).symlink_to(ROOT/name)
            file = yaml_file(ROOT/f'configs/{profile}.yaml')
            Path('configs').mkdir()
            for name in training_stages(): file[name] = smaller(file[name], name, profile)
            Path(f'configs/{profile}.yaml').write_text(yaml.safe_dump(file))
            write_json(f'artifacts/{profile}/prepared/backbones.json', backbones(profile))
            yield
        finally: os.chdir(before)


def pass_on(t: Training, folder: str, paths: dict):
    "Write what the stages after this one read, untrained."
    if t.stage.startswith('unified'): t.objective.model.save_pretrained(folder)
    if not t.stage.startswith('tokenizer'): return
    if t.stage == 'tokenizer_3_encoder':      # the unified model needs to know the latent's size
        native, pictures = latent_stats(paths['sana']), [t.data.batch(range(64))]
        scale = 1 / torch.as_tensor(native['std'])
        t.objective.tokenizer.measure(load_dcae(paths['dcae']), pictures, native['mean'], scale)
    t.objective.tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def one_way_to_compute(precision: str):
    "Inside, one thread of the CPU, and fp32 in Muon too unless the precision is bf16."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            mock.patch.dict(os.environ, ACCELERATE_USE_CPU='true'),
            mock.patch('spar.training.stage.pick_device', lambda: CPU),
            mock.patch('spar.training.optimizers.has_fast_bf16', lambda device: precision == 'bf16'),
        ): yield
    finally: torch.set_num_threads(threads)


def rows_of(t: Training, first: int, steps: int, precision: str) -> list[dict]:
    "What `fit` enters into the history in each of `steps` steps from step `first` on."
    def begin(run): run.step = first
    def enough(run, *_): return run.step >= first + steps
    train = replace(t.train, precision=precision, log_every=1, look_every=0, minutes=0., workers=0, tracker='none')
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(Run, 'restore', begin), mock.patch.object(Run, 'save', lambda run: None),
        mock.patch.object(loop, '_must_stop', enough),
    ): return loop.fit(t.objective, t.data, train, t.seed, folder).rows


def first_rows(t: Training, precision: str = 'no') -> list[dict]:
    "The first steps of a stage, and of each later phase that they do not reach."
    rows = []
    for phase in phases(t):
        if rows and phase.first < rows[-1]['step']: continue
        steps = min(LATER if rows else STEPS, t.train.steps - phase.first)
        rows += rows_of(t, phase.first, steps, precision)
    return [{k: float(f'{v:.9g}') if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def losses(profile: str, stages=(), precision: str = 'no') -> dict[str, list[dict]]:
    "Stage -> its rows; all training stages, or some."
    found = {}
    with tree_of(profile), one_way_to_compute(precision):
        paths = json.loads(Path(f'artifacts/{profile}/prepared/backbones.json').read_text())
        for name in training_stages():
            t = training_of(name, profile)
            pass_on(t, f'artifacts/{profile}/{name}', paths)
            if stages and name not in stages: continue
            with contextlib.redirect_stdout(sys.stderr): found[name] = first_rows(t, precision)
    return found


def apart(a: dict, b: dict, allowed: dict | None) -> list[str]:
    "What differs between two rows by more than is allowed; None: in any bit."
    if a.keys() != b.keys(): return [f'has {", ".join(b)}; the file has {", ".join(a)}']
    def far(k):
        if allowed is None or k in ('step', 'lr'): return a[k] != b[k]
        return not abs(a[k] - b[k]) <= allowed['norm' if k.startswith('grad_norm') else 'loss'] * abs(a[k]) + ABSOLUTE
    def relative(k): return abs(a[k] - b[k]) / (abs(a[k]) or math.inf)
    return [f'{k} is {b[k]:.9g}, the file has {a[k]:.9g} (relative {relative(k):.0e})' for k in a if far(k)]


def differences(known: dict, found: dict, allowed: dict | None) -> list[str]:
    "Of each stage, where the rows of `found` first leave those of `known`."
    out = []
    for name in sorted(known.keys() | found.keys()):
        a, b = known.get(name), found.get(name)
        if a is None or b is None: out.append(f'{name}: only in {"the file" if b is None else "what was computed"}')
        elif len(a) != len(b): out.append(f'{name}: {len(b)} rows, the file has {len(a)}')
        else:
            far = [f'step {x["step"]}: {"; ".join(d)}' for x, y in zip(a, b) if (d := apart(x, y, allowed))]
            if far: out.append(f'{name}: {len(far)} of {len(a)} rows differ, the first at {far[0]}')
    return out


def read() -> dict: return json.loads(FILE.read_text()) if FILE.exists() else {}


def write(profile: str, precision: str, stages: dict):
    "Enter a profile's rows into the file, one line a row."
    content, made = read(), dict(torch=torch.__version__, threads=1, instructions=instructions())
    content.setdefault(precision, {})[profile] = dict(made=made, stages=stages)
    def line(m): return '{' + re.sub(r'\s+', ' ', m[1]) + '}'
    FILE.write_text(re.sub(r'\{\s+("step[^{}]*?)\s+\}', line, json.dumps(content, indent=1)) + '\n')


def recorded(profile: str, precision: str = 'no') -> dict:      # 'made': with what, 'stages'
    "What the file has; a `FileNotFoundError` if nothing."
    found = read().get(precision, {}).get(profile)
    if found is None: raise FileNotFoundError(f'{FILE} has no {profile} in {precision}: {WRITES} writes it.')
    return found


def checked(profile: str, precision: str = 'no', stages=()) -> tuple[list[str], list[str]]:
    "What differs from the file in any bit, and by more than the tolerance; all training stages, or some."
    known, found = recorded(profile, precision)['stages'], losses(profile, stages, precision)
    if stages: known = {k: v for k, v in known.items() if k in stages}
    return differences(known, found, None), differences(known, found, TOLERANCE[precision])


def said(profile: str, precision: str, bits: list[str], far: list[str]) -> str:
    "The result of `checked` in words."
    if not bits: return f'{profile}, {precision}: the same bit for bit.'
    within = f'within {TOLERANCE[precision]}: rounding, if the file is of another machine.'
    verdict = within if not far else f'not the same. If it is meant, {WRITES} writes the file anew.'
    lines = [f'{profile}, {precision}: {verdict} The file: {recorded(profile, precision)["made"]}.', *(far or bits)]
    return '\n  '.join(lines)


def main() -> bool:      # did a check fail?
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--check', action='store_true', help='write nothing; exit with 1 if something exceeds the tolerance')
    p.add_argument('--profile', nargs='+', default=PROFILES, choices=PROFILES)
    p.add_argument('--stage', nargs='+', default=[], help='only with --check: some of the training stages')
    p.add_argument('--precision', default='no', choices=tuple(TOLERANCE), help='no: fp32 (default)')
    a = p.parse_args()
    if a.precision == 'bf16' and not has_fast_bf16(CPU): p.error('this processor has no bf16')
    if a.stage and not a.check: p.error('--stage without --check would write half a profile')
    os.chdir(ROOT)
    for name in a.stage: one_of(name, training_stages(), 'training stage')
    failed = False
    for profile in a.profile:
        if not a.check: write(profile, a.precision, losses(profile, precision=a.precision))
        else:
            bits, far = checked(profile, a.precision, a.stage)
            failed |= bool(far)
            print(said(profile, a.precision, bits, far), flush=True)
    return failed


if __name__ == '__main__':
    try: sys.exit(main())
    except FileNotFoundError as e: sys.exit(str(e))
