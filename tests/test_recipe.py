"""The recipe's values in the miniature: explained, complete, and they run."""
import shutil

import pytest
import yaml

from conftest import SPAR, ROOT, clone, run
from spar.running import recipe
from spar.running.profiles import complete, leaves, overlaid, sections, ablations


@pytest.fixture(autouse=True)
def at_root(monkeypatch): monkeypatch.chdir(ROOT)


def test_every_difference_is_explained_and_every_reason_needed():
    assert recipe.unexplained(recipe.recipe_differences()) == []

@pytest.mark.parametrize('key', ['tokenizer_3_encoder.loss.logits', 'unified_2_joint.stage.lambda_a'])
def test_a_new_difference_is_seen(key):
    assert recipe.unexplained(recipe.recipe_differences() | {key: (1., 2.)}) == [key]

def test_an_old_reason_is_seen():
    changes = {k: v for k, v in recipe.recipe_differences().items() if 'lambda_s' not in k}
    assert recipe.unexplained(changes) == ['tokenizer_3_encoder.loss.lambda_s']

def test_the_table_follows_the_profile(monkeypatch):
    line = lambda: next(t for t in recipe.recipe_table().splitlines() if 'lambda_s' in t)
    assert '| 1 | paper | 0.1 |' in line()
    kept = recipe.complete
    def changed(name, profile, *kind):
        params = kept(name, profile, *kind)
        if (name, profile) == ('tokenizer_3_encoder', 'mini'): params['loss']['lambda_s'] = .25
        return params
    monkeypatch.setattr(recipe, 'complete', changed)
    assert '| 1 | paper | 0.25 |' in line()

def test_parts_are_named():
    table = recipe.recipe_table(groups=('parts',))
    assert '| none | published | sine and cosine |' in table and '| 0.500 | published | 1.000 |' in table and 'edits in 25% of the rows' in table

def test_the_row_sets_the_recipes_values_over_the_miniature(tmp_path, monkeypatch):
    row = ablations()['paper_recipe']
    shutil.copytree(ROOT/'configs', tmp_path/'configs'); (tmp_path/'nbs').symlink_to(ROOT/'nbs')
    (tmp_path/'configs/again.yaml').write_text(yaml.safe_dump(overlaid(sections('mini'), row)))
    monkeypatch.chdir(tmp_path)
    for stage, settings in row.items():
        got, wanted = dict(leaves(complete(stage, 'again'))), dict(leaves(complete(stage, 'spar-1b')))
        for key in dict(leaves(settings)): assert got[key] == wanted[key], f'{stage}.{key}'

@pytest.mark.slow
def test_the_recipe_takes_a_step_in_every_stage(tmp_path):
    tree = clone(tmp_path)
    profile = overlaid(sections('smoke'), ablations()['paper_recipe'])
    for section in profile.values():
        if 'train' in section: section['train'] |= dict(steps=1, warmup=0)
    (tree/'configs/again.yaml').write_text(yaml.safe_dump(profile))
    for stage in ('prepare', *ablations()['paper_recipe']):
        done = run([*SPAR, 'stage', stage, '--profile', 'again'], tree)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        if stage != 'prepare': assert (tree/f'plots/again/{stage}/loss.csv').read_text().splitlines()[-1].startswith('1,')
