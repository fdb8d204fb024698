"Situations that users reported, about machines, tokenizers, masks and templates: each was wrong once."
import subprocess
from unittest import mock
import pytest
import torch
from spar.core import has_fast_bf16, instructions, pick_precision, provenance, read_json
from spar.running.runner import record


# --- which machine ---

CPU = torch.device('cpu')
MACHINES = {      # what torch knows of a CPU -> (instructions, is bf16 fast)
    'AVX2 alone': (['avx2'], 'avx2', False),
    'AVX-512 without bf16': (['avx2', 'avx512_f', 'avx512_bw', 'avx512_vl', 'avx512_vnni'], 'avx512', False),
    'AVX512_BF16': (['avx2', 'avx512_f', 'avx512_bf16'], 'avx512_bf16', True),
    'AMX_BF16': (['avx2', 'avx512_f', 'avx512_bf16', 'amx_tile', 'amx_bf16'], 'avx512_bf16 amx', True),
    'AMX without bf16': (['avx2', 'avx512_f', 'amx_tile', 'amx_int8'], 'avx512', False),
}


@pytest.mark.parametrize('machine', MACHINES)
def test_bf16_follows_the_instruction_itself(machine):
    known, names, fast = MACHINES[machine]
    with mock.patch('torch.cpu.get_capabilities', lambda: dict.fromkeys(known, True)):
        assert has_fast_bf16(CPU) is fast and instructions() == names
        assert pick_precision('auto', CPU) == ('bf16' if fast else 'no')
        assert provenance()['instructions'] == names


@pytest.mark.parametrize('error', [FileNotFoundError('git'), subprocess.TimeoutExpired('git', 10)], ids=['no git', 'git hangs'])
def test_a_record_is_written_without_git(tmp_path, error):
    with mock.patch('subprocess.run', side_effect=error):
        record('stage', dict(seed=3, train=dict(precision='no')), 1.5, tmp_path/'run.json')
    written = read_json(tmp_path/'run.json')['stage']
    assert written['commit'] is None and written['seed'] == 3
    assert written['precision'] == 'no', 'the precision of the numbers, not what this machine would choose'
    assert written['instructions'] and written['processor']


def test_no_git_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert provenance()['commit'] is None
