"""What is saved in notebooks differs only where something changed: no bars, times, paths or addresses in outputs."""
import json
import re
import subprocess

import pytest
from conftest import ROOT

NOTEBOOKS = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '*.ipynb'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
FORBIDDEN = {
    'a progress bar': r'\d+%\s*\||\d(?:it/s|s/it)\b|\|\s*\d+/\d+ \[',
    'a path of this machine': r'(?<![\w.:/])/(?:Users|home|mnt|opt|private|root|tmp|usr|var|work)/\w',
    'a date or a time of day': r'\b20\d\d-\d\d-\d\d[ T]\d\d:\d\d|\b\d\d:\d\d:\d\d\b',
    'a duration': r'(?<![\w.])\d+(?:\.\d+)? ?(?:ms|s|secs?|seconds)(?![\w/])',
    'an address in memory': r'\b0x[0-9a-f]{8,}',
    'a warning': r'\b\w*Warning: ',
}


def texts(output: dict) -> str:
    "What a reader sees of an output, without its pictures."
    data = {k: v for k, v in output.get('data', {}).items() if k.startswith('text/')}
    return '\n'.join(''.join(part) for part in (output.get('text', []), *data.values()))


def faults(output: dict) -> list:
    found = [what for what, pattern in FORBIDDEN.items() if re.search(pattern, texts(output))]
    if output['output_type'] == 'error':
        found.append('an error')
    if any(k.startswith('application/vnd.jupyter.widget') for k in output.get('data', {})):
        found.append('a widget')
    return found


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_outputs_stay_the_same(name):
    notebook = json.loads((ROOT / name).read_text())
    assert 'widgets' not in notebook['metadata']
    for cell in notebook['cells']:
        for output in cell.get('outputs', []):
            assert not faults(output), f"{name}, cell {cell['id']}: {', '.join(faults(output))} in its output: {texts(output)[:300]}"


@pytest.mark.parametrize('what,text', [
    ('a progress bar', ' 45%|####      | 9/20 [00:01<00:02,  4.9it/s]'),
    ('a progress bar', '  0%|          | 0/79'),
    ('a path of this machine', "FileNotFoundError: '/home/someone/spar/x.png'"),
    ('a date or a time of day', 'saved at 2026-11-28 18:21'),
    ('a duration', 'trained in 12.3 s'),
    ('an address in memory', '<function f at 0x7ff9e6268fe0>'),
    ('a warning', 'UserWarning: old'),
])
def test_what_changes_is_seen(what, text):
    assert what in faults(dict(output_type='stream', text=[text]))


def test_what_may_stay_is_not_taken_for_it():
    kept = ['artifacts/mini/pipeline', 'https://x.org/tmp/a', '45 minutes on two cores', 'loss 0.3, 12 samples', 'z_s 3.2', '64x64']
    assert not faults(dict(output_type='stream', text=['\n'.join(kept)]))
