"""Training, validation and test are apart; choices are made on validation; intervals know what shares a source."""
import hashlib, json, re
import numpy as np
import pytest
from conftest import ROOT
from spar.evaluation import understanding
from spar.evaluation.editing import edits
from spar.evaluation.generation import first_noise, geneval_prompts, shared_asks, wise_prompts
from spar.evaluation.metrics import bootstrap, bootstrap_tasks, summary
from spar.evaluation.understanding import question_set
from spar.running import profiles
from spar.scale.benchmarks.imgedit import imgedit_result
from spar.world import scenes as world
from spar.world.captions import caption, colourless
from spar.world.datasets import PhotoCrops, SceneImages
from spar.world.edits import edit, EDIT_KINDS
from spar.world.pictures import shown_pictures, validation_pictures
from spar.world.photos import photograph, photograph_of, photographs
from spar.world.prompts import asks_shared, GENEVAL_TASKS, geneval_prompt, never_drawn, riddle, RIDDLE_KINDS, vocabulary
from spar.world.tasks import Edits, SceneCaptions

SPLITS = ('train', 'val', 'test')
APART = [('val', 'test'), ('train', 'val'), ('train', 'test')]
CHOOSE = ('val', 'test')


# photographs

def small(name):
    "A photograph as 256 numbers of mean 0 and length 1."
    x = np.asarray(photograph(name).resize((16, 16)).convert('L'), float).ravel(); x = x - x.mean()
    return x / np.linalg.norm(x)

def test_train_validation_and_test_are_different_photographs():
    names = {s: photographs(s) for s in SPLITS}
    assert sum(map(len, names.values())) >= 24 and min(map(len, names.values())) >= 4
    files = {n: hashlib.sha256((ROOT/'spar/world/photographs'/n).read_bytes()).hexdigest() for s in SPLITS for n in names[s]}
    assert len(set(files.values())) == len(files)
    every = list(files); like = np.array([small(n) for n in every]); like = like @ like.T - np.eye(len(every))
    a, b = np.unravel_index(like.argmax(), like.shape); assert like.max() < .95, f'{every[a]} and {every[b]} look alike'

def test_a_crop_names_its_photograph_and_photographs_take_turns():
    for split in SPLITS:
        data, n = PhotoCrops(0, split), len(photographs(split))
        assert {data.source(k) for k in range(n)} == set(photographs(split)) and all(data.source(k).startswith(split) for k in range(40))
        assert data.source(3) == photograph_of(split, 3) == photograph_of(split, 3 + n)

def test_every_photograph_has_a_licence_and_an_author():
    text = (ROOT/'spar/world/photographs/SOURCES.md').read_text()
    rows = {m[1]: m[0].split('|') for m in re.finditer(r'^\| `([^`]+)` \|.*$', text, re.M)}
    assert set(rows) == {n for s in SPLITS for n in photographs(s)}
    for name, row in rows.items(): assert row[3].strip() and re.match(r' (CC0-1.0|CC-BY(-SA)?-[234].0|public domain) ', row[4]) and row[5].strip(), name

def test_photographs_need_no_package_of_pictures():
    for path in [*ROOT.glob('spar/**/*.py'), *ROOT.glob('nbs/**/*.ipynb')]:
        assert not re.search(r'(from|import) (skimage|sklearn)\b', path.read_text(encoding='utf-8')), path

def test_what_training_shows_and_measures_is_validation():
    crops = PhotoCrops(0, 'val').batch(range(4))['image']
    assert (shown_pictures(0)[8:] == crops).all() and (validation_pictures(0, n=4)['photos'] == crops).all()
    assert (shown_pictures(0)[:8] == SceneImages(0, 'val').batch(range(8))['image']).all()


# held-out pairs in pixels

def read_as(scene):
    "(name, colour) of each thing as the easy dial's nearest colour to the ink on the picture."
    img, colours = world.render(scene).astype(float), world.DIALS['easy'].colours
    for g in scene.glyphs:
        ink = np.median(img[world.coverage(g) == 1], axis=0)
        yield g.name, min(colours, key=lambda c: np.abs(ink - world.COLOURS[c]).sum()), min(colours, key=lambda c: ((ink - world.COLOURS[c]) ** 2).sum())

def held_out_seen(scenes): return sum(any((n, c) in world.HELD_OUT for n, *cs in read_as(s) for c in cs) for s in scenes)

def test_no_training_scene_in_any_style_shows_a_held_out_pair():
    drawn = [world.scene(0, 'train', k, varied=True) for k in range(6000)]
    styled = [s for s in drawn if s.style in ('inverted', 'grey')]
    assert len(styled) > 100 and held_out_seen(styled) == 0 and not any(map(world.shows_held_out, drawn))

@pytest.mark.parametrize('kind', EDIT_KINDS)
def test_no_edit_shows_a_held_out_pair(kind):
    es = [edit(kind, 0, 'train', k) for k in range(200 if kind == 'style' else 60)]
    if kind == 'style': assert {e.target.style for e in es} == set(world.STYLES[1:])
    shown = [s for e in es for s in (e.source, e.target) if s.style != 'outline']    # a rim is drawn over the ground
    assert held_out_seen(shown) == 0 and not any(world.shows_held_out(s) for e in es for s in (e.source, e.target))

@pytest.mark.parametrize('style', world.STYLES)
def test_a_colour_is_read_from_the_same_pixels_that_are_drawn(style):
    for colour in world.COLOURS:
        s = world.Scene((world.Glyph('diamond', colour, 32, 32, 42),), world.Background('white' if colour != 'white' else 'black'), style)
        if style != 'outline': assert next(read_as(s))[2] in world.appearances(colour, style), colour

def test_held_out_pairs_come_when_asked_for():
    s = world.scene(0, 'test', 0, pairs='held_out'); assert world.shows_held_out(s)


# validation and test

def texts(split, **more):
    kinds = dict(geneval=geneval_prompts, wise=wise_prompts)
    out = {k: {p.text for seed in (0, 1) for p in f(seed, 32, split=split)} for k, f in kinds.items()}
    return out | dict(heldout={p.text for seed in (0, 1) for p in geneval_prompts(seed, 32, True, split=split)})

def test_no_prompt_is_in_validation_and_test_or_in_training():
    val, test = texts('val'), texts('test')
    for k in val: assert len(val[k]) > 50 and not val[k] & test[k], k
    captions = {f(world.scene(s, 'train', k), s, k) for s in (0, 1) for k in range(1500) for f in (caption, colourless)}
    assert not captions & (val['geneval'] | test['geneval'] | val['heldout'] | test['heldout'])

def asked_for(task, split, heldout, seed, n=200):
    prompts = [geneval_prompt(task, seed, split, k, heldout) for k in range(n)]
    def key(p):
        names = [(o['object'], o['colour'], o['count']) for o in p.expect['objects']]; r = p.expect['relation']
        if r in ('right of', 'below'): names, r = names[::-1], {'right of': 'left of', 'below': 'above'}[r]
        return (*(names if r else sorted(names, key=repr)), r)
    return {key(p) for p in prompts}, {p.text for p in prompts}

@pytest.mark.parametrize('task,heldout', [(t, False) for t in GENEVAL_TASKS] + [('colors', True), ('color_attr', True)])
def test_tasks_with_enough_to_ask_share_no_ask_and_the_others_no_ground(task, heldout):
    (val, said), (test, said_too) = (asked_for(task, s, heldout, seed) for s, seed in (('val', 3), ('test', 8)))
    assert bool(val & test) == asks_shared(task, heldout)
    assert asks_shared(task, heldout) == (task in ('single_object', 'counting') or (task, heldout) == ('colors', True))
    pattern = re.compile(r' (?:on|with) (?:a )?(\w+ (?:background|gradient|stripes|dots|checks))$')
    def grounds(said): return {m[1] for m in map(pattern.search, said) if m}
    assert not said & said_too and not grounds(said) & grounds(said_too)

def test_the_first_prompts_of_a_task_are_all_different():
    for split in CHOOSE:
        for task in GENEVAL_TASKS: assert len({geneval_prompt(task, 0, split, k).text for k in range(32)}) == 32

def test_riddles_of_three_splits_are_different_whatever_the_seed():
    asked = {s: {riddle(k, seed, s, i).prompt for k in RIDDLE_KINDS for i in range(100) for seed in (0, 7)} for s in SPLITS}
    for a, b in APART: assert not asked[a] & asked[b]
    assert min(len({riddle(k, 0, s, i).prompt for i in range(100)}) for k in RIDDLE_KINDS for s in SPLITS) >= 8

def test_questions_and_pairs_are_about_other_scenes():
    val, test = ({world.meaning(a.scene) for a in question_set(0, 20, 10, 0, split=s) if a.scene} for s in CHOOSE)
    assert not val & test

@pytest.mark.parametrize('a,b', APART)
def test_edits_of_two_splits_share_no_source_and_no_result_but_of_training(a, b):
    shown = {s: [{world.meaning(x) for x in pair} for pair in zip(*((e.source, e.target) for k in EDIT_KINDS for e in [edit(k, 0, s, i) for i in range(12)]))] for s in (a, b)}
    for s, sets in shown.items(): assert all({world.split_of(m) for m in p} <= {s, 'train'} and s in map(world.split_of, p) for p in sets)

def test_what_forgets_to_name_a_split_gets_validation():
    assert geneval_prompts(0, 2) == geneval_prompts(0, 2, split='val') and wise_prompts(0, 2) == wise_prompts(0, 2, split='val')
    assert edits(0, 1)[0].source == edits(0, 1, 'val')[0].source and question_set(0, 1, 1, 1) == question_set(0, 1, 1, 1, split='val')
    assert first_noise('val') != first_noise('test') and 'single_object' in shared_asks()
    for call in (geneval_prompts, wise_prompts, edits):
        with pytest.raises(ValueError, match="'train'.*val"): call(0, 1, split='train')

def cells(path): return '\n'.join(''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code')

def test_only_the_stages_that_evaluate_use_the_test():
    for path in [*(ROOT/'nbs/stages').glob('*.ipynb'), *(ROOT/'nbs/bases').glob('*.ipynb')]:
        named = bool(re.search(r'[\'"]test[\'"]', cells(path)))
        assert named == (path.stem.startswith('evaluate_') or path.stem in profiles.controls()), path
    for e in ('reconstruction', 'understanding', 'generation', 'editing'): assert profiles.complete(f'evaluate_{e}', 'mini')['split'] == 'test'

def test_prompts_that_training_looks_at_are_no_prompts_of_the_test():
    test = set().union(*texts('test').values())
    for stage in ('unified_1_connector', 'unified_2_joint', 'unified_3_sft'): assert not test & set(profiles.complete(stage, 'mini')['prompts'])

def test_a_new_number_draws_new_tests_and_nothing_else(monkeypatch):
    def drawn(split): return world.scene(0, split, 4), edit('add', 0, split, 0).instruction, [PhotoCrops(0, split)[0]['image'].sum()]
    before = {s: drawn(s) for s in SPLITS}
    monkeypatch.setattr(world, 'TEST_SET', world.TEST_SET + 1)
    assert drawn('train') == before['train'] and drawn('val') == before['val'] and drawn('test') != before['test']
    assert world.draw_name('test') == f'test {world.TEST_SET}'


# intervals

def test_values_of_one_source_are_drawn_together():
    values, photo = [24.] * 100 + [27.] * 100 + [29.] * 100, [k // 100 for k in range(300)]
    low, high = bootstrap(values, sources=photo)
    assert (low, high) == (24, 29) and np.diff(bootstrap(values))[0] < 1
    columns = dict(psnr=np.array(values)); assert summary(columns, sources=photo)['psnr_ci'] == [24, 29]

def test_single_sources_give_the_interval_of_before():
    tasks = dict(a=[0, 1, 1, 0, 1.], b=[1., 0])
    alone = bootstrap_tasks(tasks, sources={k: [(k, i) for i in range(len(v))] for k, v in tasks.items()})
    assert alone == bootstrap_tasks(tasks)

def test_a_source_in_several_tasks_is_drawn_as_one_and_no_task_runs_empty():
    tasks = dict(a=[0., 1.] * 20, b=[0., 1.] * 20); scene = dict(a=list(range(40)), b=list(range(40)))
    wide, narrow = np.diff(bootstrap_tasks(tasks, sources=scene))[0], np.diff(bootstrap_tasks(tasks))[0]
    assert wide > 1.2 * narrow                # two answers about a scene that agree are one piece of evidence
    assert np.isfinite(bootstrap_tasks(dict(a=[0.], b=[1., 0., 1.]), sources=dict(a=[1], b=[2, 2, 3]))).all()

def test_questions_about_one_scene_widen_the_interval():
    asked = question_set(0, 30, 10, 12)
    about = {}
    for a in asked: about.setdefault(a.scene, []).append(a.question)
    assert sum(len(q) > 1 for s, q in about.items() if s) > 10
    wrong = {s for k, s in enumerate(about) if s and k % 2}
    words = ['?' if a.scene in wrong else a.answer for a in asked]
    right, sources = understanding._right(asked, words), understanding._sources(asked)
    assert {k: len(v) for k, v in right.items()} == {k: len(v) for k, v in sources.items()}
    assert np.diff(bootstrap_tasks(right, sources=sources))[0] > np.diff(bootstrap_tasks(right))[0]

def test_edits_of_one_photograph_are_drawn_together():
    items = [dict(id=k, source=f'{k // 10}.jpg', kind='add') for k in range(60)]
    scores = {k: [1 + 4 * (k // 10 % 2)] * 3 for k in range(60)}
    alone = imgedit_result([i | dict(source=i['id']) for i in items], scores)
    assert np.diff(imgedit_result(items, scores)['overall_ci'])[0] > 2 * np.diff(alone['overall_ci'])[0]


# words that the generator never learned to draw

def test_never_drawn_names_the_words():
    assert never_drawn('An ORANGE anchor and two red hearts') == ['orange', 'anchor']
    assert never_drawn('three moons on a purple background') == ['moons', 'purple']
    assert never_drawn('an orange anchor', dial='hard') == [] == never_drawn('a red heart left of a blue star')
    with pytest.raises(ValueError, match="'odd'.*easy"): never_drawn('a heart', dial='odd')

@pytest.mark.parametrize('dial', ['easy', 'hard'])
def test_never_drawn_is_what_no_training_text_says(dial):
    captions, changes = SceneCaptions(1, 'train', dial=dial), Edits(1, 'train', dial=dial)
    said = {w for k in range(600) for w in captions[k]['text'].split()} | {w for k in range(120) for w in changes[k]['text'].split()}
    assert not never_drawn(' '.join(said), dial)
    missing = set(never_drawn(' '.join(vocabulary()), dial))
    assert missing == {w for w in vocabulary() if never_drawn(w, dial)} and ('anchor' in missing) == (dial == 'easy')
