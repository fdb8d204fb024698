"""Splits are disjoint, samples depend on (seed, split, index) and on nothing else."""
import numpy as np
import pytest, torch
from spar.world import scenes as world
from spar.world.datasets import PhotoCrops, SceneImages
from spar.world.edits import edit, EDIT_KINDS
from spar.world.tasks import Edits, Questions, Riddles, SceneCaptions
from spar.core import seed_for

N = 400

def meanings(split, seed=0): return {world.meaning(world.scene(seed, split, k)) for k in range(N)}

@pytest.mark.parametrize('a,b', [('train', 'val'), ('train', 'test'), ('val', 'test')])
def test_scenes_of_two_splits_never_mean_the_same(a, b):
    assert not meanings(a) & meanings(b)
    assert not meanings(a, seed=1) & meanings(b, seed=2), 'whatever the seed'

def test_held_out_pairs_never_appear_in_training():
    seen = {(g.name, g.colour) for k in range(N) for g in world.scene(0, 'train', k).glyphs}
    assert len(seen) > 20 and not seen & set(world.HELD_OUT)

def test_edits_and_generation_prompts_do_not_train_on_test_scenes():
    test = meanings('test')
    for k in range(90):
        e = edit(EDIT_KINDS[k % 9], 0, 'train', k)
        assert world.meaning(e.source) not in test

DATASETS = [SceneImages, SceneCaptions, Questions, Riddles, Edits, PhotoCrops]

@pytest.mark.parametrize('kind', DATASETS, ids=lambda k: k.__name__)
def test_a_sample_is_a_function_of_its_index(kind):
    def same(a, b): return all(torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k] for k, v in a.items())
    one, two = kind(3, 'train'), kind(3, 'train')
    [two[k] for k in (9, 1, 4)]; np.random.rand(5); torch.rand(5)       # whatever was drawn before
    assert same(one[7], two[7])
    assert not same(one[7], {**one[8], 'index': 7}) and not same(one[7], kind(4, 'train')[7])

def test_photographs_are_split_by_photograph():
    crops = {s: torch.stack([PhotoCrops(0, s)[k]['image'] for k in range(12)]) for s in ('train', 'val', 'test')}
    assert not any(torch.equal(a, b) for a in crops['train'] for b in torch.cat([crops['val'], crops['test']]))

def test_purposes_do_not_share_random_numbers():
    assert len({seed_for(s, p, i) for s in range(3) for p in ('noise', 'sigma', 'drop') for i in range(50)}) == 450
