"""Data at scale: every defect is named and survived, nothing outside a source is read, the order depends on k alone."""
import io, itertools, json, os, pickle, struct, sys, tarfile, zlib
from collections import Counter
from configparser import ConfigParser
from pathlib import Path
import pytest, torch
from PIL import Image
from webdataset import TarWriter, WebDataset
from conftest import ROOT
from spar.core import to_uint8
from spar.training.checkpoints import checkpoint_steps
from spar.scale.data.check import examine, world_samples, write_shards
from spar.command import main
from spar.scale.data.corpus import Corpus, corpus_of, Stream, TooManyBroken
from spar.scale.data.exclude import Exclude
from spar.scale.data.files import stamp
from spar.scale.data.order import Blend
from spar.scale.data.sample import as_tensor, Broken, picture, TASKS
from spar.scale.data.sources import COUNTS, open_source, raw_sample, scan, Shards, SourceConfig, Table
from spar.world.tasks import Edits, SceneCaptions
from spar.world.datasets import PhotoCrops, SceneImages
from spar.running.profiles import resolved
from spar.training.objective import Objective, TrainConfig
from spar.training.loop import fit
from spar.training.order import micro_batches


def jpg(colour=(200, 30, 30), size=(48, 40)):
    f = io.BytesIO(); Image.blend(Image.effect_noise(size, 60).convert('RGB'), Image.new('RGB', size, colour), .7).save(f, 'JPEG'); return f.getvalue()

def bomb(side=30000):
    chunk = lambda tag, body: struct.pack('>I', len(body)) + tag + body + struct.pack('>I', zlib.crc32(tag + body))
    z = zlib.compressobj(1); line = b'\0' + bytes(side // 8)
    data = b''.join(z.compress(line) for _ in range(side)) + z.flush()
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 1, 0, 0, 0, 0)) + chunk(b'IDAT', data) + chunk(b'IEND', b'')

def shard(path, samples, first=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path), mtime=0) as w:
        for i, s in enumerate(samples): w.write({'__key__': f'{first + i:06d}', **s})
    return path

def numbered(root, files=4, each=10, first=0):
    "Shards whose captions are the running numbers of their samples."
    data = jpg()
    for f in range(files): shard(root/f'{f:03d}.tar', [dict(jpg=data, txt=f'number {first + f * each + i}') for i in range(each)])
    return root

def corpus(root, unit=8, seed=0, **options):
    task = options.pop('task', 'caption')
    return Corpus(dict(side=8, max_broken=1., sources=dict(a=dict(path=str(root), task=task))) | options, unit, seed)

def nr(text): return int(text.split()[-1])
def texts(c, n, start=0): return [c[k]['text'] for k in range(start, start + n)]

OPENED = []
sys.addaudithook(lambda event, args: OPENED.append(os.path.realpath(os.fsdecode(args[0]))) if event == 'open' and isinstance(args[0], (str, bytes)) else None)


# ---- defects ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def bad_folder(tmp_path_factory):
    "A folder with one of each defect and 40 good pictures; the only red picture lies outside."
    top = tmp_path_factory.mktemp('top'); root, out = top/'data', top/'outside'
    root.mkdir(); out.mkdir(); (out/'secret.jpg').write_bytes(jpg((255, 0, 0)))
    for i in range(40): (root/f'{i}.jpg').write_bytes(jpg((10, 20, 200)))
    (root/'cut.jpg').write_bytes(jpg()[:700]); (root/'bomb.png').write_bytes(bomb()); (root/'nothing.jpg').write_bytes(b'')
    (root/'vector.jpg').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'); (root/'link.jpg').symlink_to(out/'secret.jpg')
    rows = [dict(image=f'{i}.jpg', caption=f'number {i}') for i in range(40)]
    rows += [dict(image=p, caption='defect') for p in ('cut.jpg', 'bomb.png', 'nothing.jpg', 'vector.jpg', 'link.jpg', '../outside/secret.jpg',
        str(out/'secret.jpg'), 'gone.jpg')]
    rows += [dict(image='1.jpg', caption='  '), dict(image='2.jpg'), dict(caption='no picture'), dict(image='3.jpg', caption=7)]
    (root/'captions.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n{"image": "4.jpg", "capti')
    return root

KINDS = {'broken image': 3, 'too many pixels': 1, 'outside the folder': 3, 'missing file': 1, 'empty text': 1, 'missing field': 2, 'broken text': 1,
    'broken row': 1}

def test_check_names_every_defect_of_a_folder(bad_folder):
    report = examine(SourceConfig(path=str(bad_folder)), 0)
    assert report['broken'] == KINDS and report['good'] == 40 and report['rows'] == 53
    for what in ('captions.jsonl:41 image: broken image', 'captions.jsonl:42 image: too many pixels', 'captions.jsonl:45: outside the folder (link.jpg',
                 'captions.jsonl:46: outside the folder (../outside', 'captions.jsonl:49: empty text', 'captions.jsonl:53: broken row'):
        assert any(what in n for n in report['named']), what

def test_training_goes_on_counts_names_and_loads_nothing_from_outside(bad_folder, caplog, tmp_path):
    c = corpus(bad_folder, log=str(tmp_path/'log.jsonl')); OPENED.clear()
    seen = [c[k] for k in range(2 * 53)]
    assert {nr(s['text']) for s in seen} == set(range(40)) and all(s['image'].shape == (3, 8, 8) for s in seen)
    assert all(s['image'][2].mean() > s['image'][0].mean() for s in seen), 'the red picture outside was never shown'
    assert any(p.endswith('/data/5.jpg') for p in OPENED) and not [p for p in OPENED if '/outside/' in p]
    total = c.counts.total()
    assert total['read'] == 106 and total['broken'] >= 2 * 13, 'each of 13 defects came up once a round, and perhaps as a stand-in'
    named = [json.loads(line) for line in (tmp_path/'log.jsonl').read_text().splitlines()]
    assert Counter(n['kind'] for n in named) == KINDS, 'each is named once'
    assert 'too many pixels' in caplog.text

def test_the_bomb_is_refused_before_it_is_decoded(bad_folder):
    import tracemalloc
    data = (bad_folder/'bomb.png').read_bytes(); tracemalloc.start()
    with pytest.raises(Broken, match='too many pixels'): picture(data, 'bomb.png')
    assert tracemalloc.get_traced_memory()[1] < 20e6; tracemalloc.stop()

@pytest.mark.parametrize('side', [9000, 12000])
def test_pictures_that_pillow_would_still_open_are_refused_too(side):
    with pytest.raises(Broken, match=f'too many pixels .{side} x {side}'): picture(bomb(side), 'large.png')

def test_shards_with_defects_are_survived(tmp_path, caplog):
    root, good = tmp_path/'s', jpg((10, 20, 200)); (tmp_path/'secret.jpg').write_bytes(jpg())
    shard(root/'a.tar', [dict(jpg=good, txt=f'number {i}') for i in range(20)])
    shard(root/'b.tar', [dict(jpg=good[:600], txt='cut'), dict(jpg=good, txt=' '), dict(txt='no picture'), dict(jpg=good),
        dict(png=bomb(), txt='bomb'), dict(jpg=good, txt=b'\xff\xfe')])
    data = shard(tmp_path/'whole.tar', [dict(jpg=good, txt=f'number {i + 20}') for i in range(10)]).read_bytes()
    (root/'c.tar').write_bytes(data[:scan(tmp_path/'whole.tar')[0][4] + 300]); (root/'d.tar').write_bytes(b'not a tar' * 200); (root/'e.tar').write_bytes(b'')
    with tarfile.open(root/'f.tar', 'w') as t:
        def add(name, body=b'', **kw):
            m = tarfile.TarInfo(name); m.size = len(body); [setattr(m, k, v) for k, v in kw.items()]; t.addfile(m, io.BytesIO(body))
        add('../../secret.jpg', good); add('../../secret.txt', b'climbs'); add('/abs/olute.jpg', good); add('/abs/olute.txt', b'absolute')
        add('soft.jpg', type=tarfile.SYMTYPE, linkname='../secret.jpg')
        add('soft.txt', b'soft')
        add('hard.jpg', type=tarfile.LNKTYPE, linkname='/etc/hostname')
        add('hard.txt', b'hard')
        add('fifo.jpg', type=tarfile.FIFOTYPE); add('twice.jpg', good); add('twice.jpg', good); add('fine.jpg', good); add('fine.txt', b'number 99')
    report = examine(SourceConfig(path=str(root)), 0)
    assert [f.split(':')[0] for f in report['faults']] == ['c.tar', 'd.tar', 'e.tar'] and 'cut off after 4 whole samples' in report['faults'][0]
    assert report['good'] == 20 + 4 + 1
    assert report['broken'] == {'broken image': 1, 'empty text': 1, 'missing field': 2, 'too many pixels': 1, 'broken text': 1,
        'outside the folder': 5, 'broken row': 1}
    c = corpus(root); OPENED.clear(); seen = {nr(t) for t in texts(c, 120)}
    assert seen == set(range(24)) | {99} and not [p for p in OPENED if p.endswith(('secret.jpg', 'hostname'))]
    assert 'c.tar: cut off' in caplog.text and 'climb' not in ' '.join(texts(c, 120))

@pytest.mark.parametrize('at', ['header', 'data', 'second member', 'end mark'])
def test_a_shard_cut_anywhere_gives_its_whole_samples(tmp_path, at):
    data = shard(tmp_path/'w.tar', [dict(jpg=jpg(), txt=f'number {i}') for i in range(6)]).read_bytes(); starts, fault = scan(tmp_path/'w.tar')
    assert not fault and len(starts) == 7
    size = starts[4] - starts[3]; cut = dict(header=starts[4] + 100, data=starts[4] + 900, **{'second member': starts[5] - 900, 'end mark': starts[6]})[at]
    (tmp_path/'x').mkdir(); (tmp_path/'x/x.tar').write_bytes(data[:cut]); s = Shards(tmp_path/'x')
    assert len(s) == (6 if at == 'end mark' else 4) and 'cut off' in s.faults[0] and size > 900
    assert [s.row(i)[1]['txt'].decode() for i in range(len(s))] == [f'number {i}' for i in range(len(s))]

def test_a_header_that_lies_about_sizes_costs_no_memory(tmp_path):
    m = tarfile.TarInfo('a.jpg'); m.size = 1 << 40; (tmp_path/'s').mkdir()
    (tmp_path/'s/a.tar').write_bytes(m.tobuf(tarfile.GNU_FORMAT) + bytes(4096)); numbered(tmp_path/'s', 1, 3)
    assert len(Shards(tmp_path/'s')) == 3
    sparse = tarfile.TarInfo('b.jpg'); sparse.size = 512; sparse.type = tarfile.GNUTYPE_SPARSE
    head = bytearray(sparse.tobuf(tarfile.GNU_FORMAT)); head[386:410] = b'00000000000\0' + b'00000001000\0'; head[483:495] = b'77777777777\0'
    head[148:156] = b' ' * 8; head[148:156] = f'{sum(head):06o}\0 '.encode()
    (tmp_path/'t').mkdir(); (tmp_path/'t/b.tar').write_bytes(bytes(head) + bytes(512) + bytes(1024))
    with pytest.raises(Broken, match='no plain file|bytes'): Shards(tmp_path/'t').row(0)

def test_long_names_and_folders_in_shards(tmp_path):
    with tarfile.open(tmp_path/'a.tar', 'w', format=tarfile.PAX_FORMAT) as t:
        for i in range(3):
            d = tarfile.TarInfo(f'part{i}'); d.type = tarfile.DIRTYPE; t.addfile(d)
            for ext, body in (('jpg', jpg()), ('txt', f'number {i}'.encode())):
                m = tarfile.TarInfo(f'part{i}/' + 'lång-' * 60 + f'{i}.{ext}'); m.size = len(body); t.addfile(m, io.BytesIO(body))
    s = Shards(tmp_path); assert [s.row(i)[1]['txt'] for i in range(3)] == [b'number 0', b'number 1', b'number 2'] and not s.faults

def test_a_dataset_folder_that_points_outside_is_refused(tmp_path):
    import datasets
    datasets.Dataset.from_dict(dict(caption=['a'])).save_to_disk(tmp_path/'d'); datasets.Dataset.from_dict(dict(caption=['secret'])).save_to_disk(tmp_path/'o')
    state = json.loads((tmp_path/'d/state.json').read_text())
    state['_data_files'] = [dict(filename='../o/data-00000-of-00001.arrow')]
    (tmp_path/'d/state.json').write_text(json.dumps(state))
    with pytest.raises(Broken, match='outside the folder'): Table(tmp_path/'d')

def test_paths_in_a_dataset_stay_inside(tmp_path):
    import datasets
    (tmp_path/'secret.jpg').write_bytes(jpg())
    rows = dict(image=[dict(bytes=None, path=p) for p in ('../secret.jpg', str(tmp_path/'secret.jpg'), 'https://example.org/x.jpg')], caption=['a', 'b', 'c'])
    datasets.Dataset.from_dict(rows, features=datasets.Features(image=dict(bytes=datasets.Value('binary'), path=datasets.Value('string')),
        caption=datasets.Value('string'))).save_to_disk(tmp_path/'d')
    assert examine(SourceConfig(path=str(tmp_path/'d')), 0)['broken'] == {'outside the folder': 2, 'missing file': 1}

@pytest.mark.parametrize('workers', [0, 2])
def test_too_many_broken_samples_stop_the_run(tmp_path, workers):
    good = jpg(); shard(tmp_path/'a.tar', [dict(jpg=good if i % 4 else good[:300], txt=f'number {i}') for i in range(200)])
    loader = Stream(corpus(tmp_path, max_broken=.1), workers=workers)
    with pytest.raises(TooManyBroken, match=r'of \d+ samples are broken, more than max_broken = 0.1.*broken image'): [*itertools.islice(loader, 60)]
    fine = corpus(tmp_path, max_broken=.4); list(itertools.islice(Stream(fine, workers=workers), 30))
    assert fine.counts.total()['read'] >= 240 and fine.counts.total()['broken'] >= 50

def test_a_source_without_one_good_sample_stops(tmp_path):
    shard(tmp_path/'a.tar', [dict(jpg=b'x', txt='number') for _ in range(9)])
    with pytest.raises(TooManyBroken, match='in a row'): corpus(tmp_path)[0]


# ---- order -----------------------------------------------------------------------------------------------------------

def test_a_round_shows_every_sample_once_and_the_next_in_another_order(tmp_path):
    c = corpus(numbered(tmp_path, 16, 16), slots=8, groups=2)
    a, b = ([nr(t) for t in texts(c, 256, s)] for s in (0, 256))
    assert sorted(a) == sorted(b) == list(range(256)) and a != b and a != sorted(a)
    assert [nr(t) for t in texts(corpus(tmp_path, slots=8, groups=2, seed=1), 256)] != a
    assert [nr(t) for t in texts(corpus(tmp_path, slots=8, groups=2), 5, 100)] == a[100:105], 'asked out of order'

@pytest.mark.parametrize('world,workers', [(2, 1), (2, 2), (4, 4), (8, 1), (1, 8)])
def test_processes_and_workers_read_files_of_their_own(tmp_path, world, workers):
    c = corpus(numbered(tmp_path, 64, 4), slots=8, groups=8)
    source, read = c.sources['a'], {}
    for rank in range(world):
        for i, ks in enumerate(itertools.islice(Stream(c, rank, world).units(0), 32)):
            for k in ks:
                _, name, lane, n = c.locate(k); read.setdefault((rank, i % workers), []).append(source.locate(c.orders[name](lane, n)))
    assert len(read) == world * workers and sorted(r for rows in read.values() for r in rows) == [(f, i) for f in range(64) for i in range(4)]
    files = [{f for f, _ in rows} for rows in read.values()]
    assert sum(map(len, files)) == 64, 'no file is read by two'

def test_with_few_files_samples_are_still_disjoint(tmp_path):
    c = corpus(numbered(tmp_path, 1, 64))
    parts = [[nr(t) for b in itertools.islice(Stream(c, r, 4), 8) for t in b['text']] for r in range(4)]
    assert sorted(sum(parts, [])) == list(range(64))

def test_the_order_does_not_depend_on_processes_or_workers(tmp_path):
    c = corpus(numbered(tmp_path)); cfg = lambda w: TrainConfig(steps=5, batch_size=8, workers=w)
    one = [b['text'] for b in micro_batches(c, cfg(0), 0)]
    assert [b['text'] for b in micro_batches(c, cfg(2), 0)] == one
    two = [[b['text'] for b in micro_batches(c, cfg(w), 0, r, 2)] for r, w in ((0, 2), (1, 0))]
    assert [[t for pair in zip(*b) for t in pair] for b in zip(*two)] == one
    assert c.counts.rows[1:3].sum() > 0, 'workers decoded, and the counters of this process know'

def test_workers_started_afresh_read_the_same(tmp_path):
    c = corpus(numbered(tmp_path)); c[0]
    again = pickle.loads(pickle.dumps(c)); assert texts(again, 16) == texts(c, 16)

def test_pictures_are_decoded_off_the_training_process(tmp_path, monkeypatch):
    c = corpus(numbered(tmp_path)); here = os.getpid(); real = picture
    def watched(*args): assert os.getpid() != here, 'decoded in the training process'; return real(*args)
    monkeypatch.setattr('spar.scale.data.corpus.picture', watched)
    assert len([*itertools.islice(Stream(c, workers=1), 3)]) == 3
    with pytest.raises(AssertionError): next(iter(Stream(c, workers=0)))

def test_weights_of_the_mix(tmp_path):
    for n, (name, w) in enumerate((('x', 1), ('y', 2), ('z', 3))): numbered(tmp_path/name, 2, 8, 1000 * n)
    c = Corpus(dict(side=8, sources={n: dict(path=str(tmp_path/n), weight=w) for n, w in (('x', .2), ('y', .6), ('z', .2))}), unit=8)
    got = Counter(c.locate(k)[1] for k in range(8000))
    assert all(abs(got[n] / 8000 - w) < .02 for n, w in (('x', .2), ('y', .6), ('z', .2))), got
    small = Counter(c.locate(k)[1] for k in range(640)); assert abs(small['y'] / 640 - .6) < .08
    read = Counter('xyz'[nr(c[k]['text']) // 1000] for k in range(200))
    assert read == Counter(c.locate(k)[1] for k in range(200)), 'what is read is what was drawn'

def test_a_blend_keeps_its_shares_exactly_and_leaves_no_gap():
    b = Blend([1, 2, 7], 3, 'x'); seen = [b(n) for n in range(3000)]
    for i, w in enumerate((300, 600, 2100)): assert [r for j, r in seen if j == i] == list(range(w))
    for lo in range(0, 3000, 100): assert abs(sum(j == 2 for j, _ in seen[lo:lo + 100]) - 70) <= 4
    with pytest.raises(ValueError, match='less than 1/1000'): Blend([1, 1e-6], 0, 'x')

def test_repeats_are_passes(tmp_path):
    numbered(tmp_path/'g', 2, 50); numbered(tmp_path/'e', 1, 10, 500)
    c = Corpus(dict(side=8, sources=dict(g=dict(path=str(tmp_path/'g')), e=dict(path=str(tmp_path/'e'), repeat=10))), unit=8)
    got = Counter(c.locate(k)[1] for k in range(3200)); assert abs(got['e'] / 3200 - .5) < .02
    p = c.passes(200); assert p == dict(g=pytest.approx(1), e=pytest.approx(10))
    with pytest.raises(ValueError, match='give all of them a weight, or none'): Corpus(dict(sources=dict(g=dict(path=str(tmp_path/'g'), weight=1),
        e=dict(path=str(tmp_path/'e'), repeat=3))), 8)

def two_tasks(root, **options):
    write_shards(world_samples('captions', count=24), root/'c', 6); write_shards(world_samples('edits', count=18), root/'e', 6)
    return Corpus(dict(side=64, sources=dict(c=dict(path=str(root/'c'), weight=.5), e=dict(path=str(root/'e'), task='edit', weight=.5))) | options, unit=4)

def test_one_task_a_micro_batch_on_every_number_of_processes(tmp_path):
    c = two_tasks(tmp_path); tasks = []
    for m in range(40):
        found = {t for r in (0, 1) for t in c.batch(range(4 * m, 4 * m + 4)[r::2])['task']}; assert len(found) == 1; tasks += found
    assert abs(tasks.count('edit') - 20) <= 4
    with pytest.raises(ValueError, match='batch_size / accumulate'): [c.batch(range(4 * m + 2, 4 * m + 6)) for m in range(8)]

@pytest.mark.parametrize('world', [1, 2])
def test_fit_asks_for_whole_units_when_it_accumulates(tmp_path, world):
    two_tasks(tmp_path)
    cfg = TrainConfig(steps=6, batch_size=8, accumulate=2)
    c = two_tasks_again(tmp_path)
    assert c.unit == cfg.batch_size // cfg.accumulate
    ranks = [[(set(b['task']), b['index'].tolist()) for b in micro_batches(c, cfg, 0, r, world)] for r in range(world)]
    assert all(len(t) == 1 for rank in ranks for t, _ in rank) and {t for rank in ranks for ts, _ in rank for t in ts} == {'caption', 'edit'}
    assert (sorted(k for rank in ranks for _, ks in rank for k in ks) == list(range(48))
            and all(len({str(t) for t, _ in same}) == 1 for same in zip(*ranks))), 'the same task on every process'

def test_a_damaged_or_lying_table_of_counts_changes_nothing(tmp_path):
    numbered(tmp_path, 2, 5)
    for text in ('{"000.tar": [1', '[]', '{"000.tar": "x", "001.tar": [10240, -5]}'): (tmp_path/COUNTS).write_text(text); assert len(Shards(tmp_path)) == 10
    (tmp_path/COUNTS).write_text(json.dumps({'000.tar': [(tmp_path/'000.tar').stat().st_size, 8]})); assert len(Shards(tmp_path)) == 10, 'the old form'
    (tmp_path/COUNTS).write_text(json.dumps({'000.tar': [8, *stamp(tmp_path/'000.tar')]})); c = corpus(tmp_path)
    assert len(c.sources['a']) == 13 and {nr(t) for t in texts(c, 60)} == set(range(10)) and c.counts.total()['broken'] > 0

def test_a_source_switched_off_is_not_even_opened(tmp_path):
    numbered(tmp_path/'g'); c = Corpus(dict(side=8, sources=dict(g=dict(path=str(tmp_path/'g'), weight=1), no=dict(path='/nowhere', weight=0))), 8)
    assert set(c.sources) == {'g'}


# ---- position --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('workers', [0, 2])
def test_a_stream_continues_where_it_was(tmp_path, workers):
    numbered(tmp_path); first = Stream(corpus(tmp_path), workers=workers); it = iter(first)
    for _ in range(3): next(it)
    state = json.loads(json.dumps(first.state_dict())); wanted = [next(it)['index'].tolist() for _ in range(4)], [texts(first.corpus, 32, 24)]
    second = Stream(corpus(tmp_path), workers=0); second.load_state_dict(state)
    got = [*itertools.islice(second, 4)]
    assert [b['index'].tolist() for b in got] == wanted[0] and [t for b in got for t in b['text']] == wanted[1][0]
    assert state['position'] == 24 and second.corpus.counts.total()['read'] == state['counts']['read'] + 32

def test_other_data_or_settings_are_noticed(tmp_path):
    state = corpus(numbered(tmp_path)).state_dict(16)
    with pytest.raises(ValueError, match='seed was 0, is 5'): corpus(tmp_path, seed=5).load_state_dict(state)
    shard(tmp_path/'zzz.tar', [dict(jpg=jpg(), txt='number 7')])
    with pytest.raises(ValueError, match="rows was {'a': 40}, is {'a': 41}"): corpus(tmp_path).load_state_dict(state)

class Seen(Objective):
    def __init__(self, stop=None): super().__init__(); self.w, self.seen, self.stop = torch.nn.Parameter(torch.zeros(3)), [], stop
    def weights(self, progress, player='model'): return {'mse': 1.}
    def terms(self, batch, weights, player='model'):
        if len(self.seen) == self.stop: raise KeyboardInterrupt
        self.seen.append(batch['text']); return {'mse': (batch['image'].mean((2, 3)) - self.w).square().mean()}

def test_fit_from_shards_killed_and_resumed_sees_the_same_samples(tmp_path):
    c = two_tasks(tmp_path); cfg = TrainConfig(steps=8, batch_size=4, precision='no', save_every=2, log_every=4)
    whole, killed, rest = Seen(), Seen(stop=5), Seen()
    fit(whole, c, cfg, 0, tmp_path/'whole', 'x')
    with pytest.raises(KeyboardInterrupt): fit(killed, c, cfg, 0, tmp_path/'part', 'x')
    fit(rest, two_tasks_again(tmp_path), cfg, 0, tmp_path/'part', 'x')
    assert killed.seen == whole.seen[:5] and rest.seen == whole.seen[4:] and torch.equal(rest.w, whole.w)

def two_tasks_again(root):
    sources = dict(c=dict(path=str(root/'c'), weight=.5), e=dict(path=str(root/'e'), task='edit', weight=.5))
    return Corpus(dict(side=64, sources=sources), unit=4)


# ---- contamination ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name,text', [('p.jsonl', '{"tag": "x", "prompt": "Number 3!"}\n{"prompt": "number 11"}'),
    ('p.json', '[{"Prompt": "number 3"}, {"Prompt": "number 11"}]'),
                                       ('q.json', '{"7": {"prompt": "number 3"}, "8": {"prompt": "number 11"}}'), ('p.txt', 'number 3\n\nnumber 11\n')])
def test_prompts_of_evaluations_are_dropped_and_counted(tmp_path, name, text):
    (tmp_path/name).write_text(text); numbered(tmp_path/'s')
    with_them, without = corpus(tmp_path/'s'), corpus(tmp_path/'s', exclude=[str(tmp_path/name)])
    assert {nr(t) for t in texts(with_them, 160)} == set(range(40)) and with_them.counts.total()['excluded'] == 0
    assert {nr(t) for t in texts(without, 160)} == set(range(40)) - {3, 11}
    total = without.counts.total()
    assert total['excluded'] >= 8 and total['broken'] == 0 and total['read'] == 160, 'twice in each of four rounds, and perhaps as a stand-in'
    assert examine(SourceConfig(path=str(tmp_path/'s')), 0, Exclude([tmp_path/name]))['excluded'] == 2

def test_of_several_instructions_only_the_clean_ones_remain(tmp_path):
    (tmp_path/'p.txt').write_text('a photo of a bench\n'); data = jpg()
    rows = [['make it blue', 'turn it blue'], ['a photo of a bench, please', 'sit here'], ['A photo of a bench']]
    shard(tmp_path/'s/a.tar', [{'source.jpg': data, 'target.jpg': data, 'json': json.dumps(dict(instructions=r))} for r in rows])
    every = {t for t in texts(corpus(tmp_path/'s', task='edit'), 60)}; assert every == {t for r in rows for t in r}, 'all are drawn'
    clean = corpus(tmp_path/'s', task='edit', exclude=[str(tmp_path/'p.txt')], match='contains')
    assert {t for t in texts(clean, 60)} == {'make it blue', 'turn it blue', 'sit here'}


# ---- sources, pack, check --------------------------------------------------------------------------------------------

def test_three_kinds_of_sources_give_the_same_samples(tmp_path):
    import datasets
    folder = tmp_path/'f'; folder.mkdir(); bodies = [jpg((20 * i, 90, 30)) for i in range(6)]
    for i, b in enumerate(bodies): (folder/f'{i}.jpg').write_bytes(b)
    (folder/'captions.csv').write_text('image,caption\n' + ''.join(f'{i}.jpg,"number, {i}"\n' for i in range(6)))
    ds = datasets.Dataset.from_dict(dict(image=[dict(bytes=b, path=None) for b in bodies], caption=[f'number, {i}' for i in range(6)]),
        features=datasets.Features(image=datasets.Image(), caption=datasets.Value('string')))
    datasets.DatasetDict(train=ds, test=ds.select([0])).save_to_disk(tmp_path/'a'); (tmp_path/'p').mkdir(); ds.to_parquet(tmp_path/'p/x.parquet', batch_size=4)
    for n in 'fap': main(['data', 'pack', str(tmp_path/n), str(tmp_path/f'{n}-shards'), '--per-shard', '4'])
    for path in ('f', 'a', 'p', 'f-shards', 'a-shards', 'p-shards'):
        cfg = SourceConfig(path=str(tmp_path/path)); s = open_source(cfg)
        assert [raw_sample(s, cfg, r)[1] for r in range(6)] == [dict(image=b, text=[f'number, {i}']) for i, b in enumerate(bodies)], path
    assert len(Table(tmp_path/'a', 'test')) == 1
    with pytest.raises(ValueError, match='Allowed: test, train'): Table(tmp_path/'a', 'val')
    assert (tmp_path/'f-shards/000000.tar').read_bytes() == (tmp_path/'a-shards/000000.tar').read_bytes(), 'packing is reproducible'

@pytest.mark.parametrize('what,dataset,task', [('captions', SceneCaptions, 'caption'), ('edits', Edits, 'edit'), ('scenes', SceneImages, 'image'),
    ('photos', PhotoCrops, 'image')])
def test_the_miniature_world_from_shards_is_the_miniature_world(tmp_path, what, dataset, task):
    main(['data', 'pack', f'world:{what}', str(tmp_path/'s'), '--count', '20', '--per-shard', '7', '--seed', '3'])
    key = lambda s: (s.get('text'), *(to_uint8(s[f]).numpy().tobytes() for f in ('source', 'image') if f in s))
    c = Corpus(dict(side=64, sources=dict(w=dict(path=str(tmp_path/'s'), task=task))), unit=4)
    assert sorted((key(c[k]) for k in range(20)), key=str) == sorted((key(dataset(3)[k]) for k in range(20)), key=str)
    assert sorted(map(str, c.batch(range(4)))) == sorted(map(str, {*TASKS[task], 'index'}))
    assert len([*WebDataset(sorted(map(str, (tmp_path/'s').glob('*.tar'))), shardshuffle=False)]) == 20

def test_counts_are_believed_only_while_the_shard_is_the_same(tmp_path, monkeypatch):
    numbered(tmp_path, 3, 5); s = Shards(tmp_path); s.write_counts(); scans, real = [], scan
    monkeypatch.setattr('spar.scale.data.sources.scan', lambda p: scans.append(p.name) or real(p))
    assert len(Shards(tmp_path)) == 15 and not scans
    shard(tmp_path/'001.tar', [dict(jpg=jpg(), txt='number 1')]); assert len(Shards(tmp_path)) == 11 and scans == ['001.tar']
    data = (tmp_path/'002.tar').read_bytes(); (tmp_path/'002.tar').write_bytes(data[:len(data) // 2]); s = Shards(tmp_path); s.write_counts()
    assert '002.tar' not in json.loads((tmp_path/COUNTS).read_text()) and Shards(tmp_path).faults, 'a cut shard is named every time'

def test_random_crops_are_the_centre_and_the_side_is_met(tmp_path):
    im = Image.new('RGB', (90, 30), 'white'); im.paste((255, 0, 0), (30, 0, 60, 30)); f = io.BytesIO(); im.save(f, 'PNG')
    x = as_tensor(picture(f.getvalue(), 'x'), 16)
    assert x.shape == (3, 16, 16) and torch.allclose(x, torch.tensor([1., -1, -1])[:, None, None].expand(3, 16, 16))
    with pytest.raises(Broken, match='at least 64'): picture(f.getvalue(), 'x', 64)

def test_texts_are_cut_and_special_tokens_refused(tmp_path):
    shard(tmp_path/'a.tar', [dict(jpg=jpg(), txt=t) for t in ('one two three four', 'five <IMG_CONTEXT> six')])
    assert {t for t in texts(corpus(tmp_path, max_words=3), 9)} == {'one two three'}
    assert examine(SourceConfig(path=str(tmp_path)), 0)['broken'] == {'special token': 1}

@pytest.mark.parametrize('wrong,says', [(dict(groups=0), 'groups: expected a whole number, at least 1'), (dict(max_broken=5), 'max_broken: .* at most 1'),
    (dict(match='near'), 'Allowed: contains, exact'), (dict(slot=4), "Did you mean 'slots'"), (dict(slots=3), 'must divide')])
def test_settings_are_strict(tmp_path, wrong, says):
    with pytest.raises(ValueError, match=says): corpus(numbered(tmp_path), **wrong)

def test_a_shard_that_vanishes_while_training_is_a_broken_sample(tmp_path):
    c = corpus(numbered(tmp_path, 2, 10)); (tmp_path/'001.tar').unlink()
    assert {nr(t) for t in texts(c, 40)} == set(range(10)) and c.counts.total()['broken'] > 0

def test_check_prints_a_table_and_json(bad_folder, tmp_path, capsys):
    main(['data', 'check', str(bad_folder), '--json', str(tmp_path/'r.json'), '--names', '2']); out = capsys.readouterr().out
    assert 'too many pixels' in out and '... and 11 more' in out and '40 of 53' in out
    assert json.loads((tmp_path/'r.json').read_text())['data']['broken'] == KINDS
    main(['data', 'check', str(bad_folder), '--json', '-']); assert json.loads(capsys.readouterr().out)['data']['words'] == dict(min=2, median=2, max=2)
    assert main(['data', 'check', str(bad_folder), '--strict']) == 2

SOURCED = [(p, s) for p in ('spar-1b', 'spar-3b') for s in ('tokenizer_1_init', 'tokenizer_2_decoder', 'tokenizer_3_encoder', 'dcae_tuned',
    'unified_1_connector', 'unified_2_joint', 'unified_3_sft')]

@pytest.mark.parametrize('profile,stage', SOURCED)
def test_the_paper_s_corpora_need_nothing_but_their_folders(profile, stage, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT); p = resolved(stage, profile); train = dict(p['train'], accumulate=p['train']['batch_size'] // 8)      # units of 8 samples
    sections = [p['source'], *([p['source'] | p['finer']['source']] if p.get('finer') else [])]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='^corpora/[a-z0-9/-]+: no such folder'): corpus_of(sections[0], train)
    for s in sections[0]['sources'].values():
        if not Path(s['path']).exists(): write_shards(world_samples('edits' if s['task'] == 'edit' else 'captions', count=24), s['path'], 12)
    for section in sections:
        c = corpus_of(section, train); assert c[0]['image'].shape == (3, section['side'], section['side']) and list(c.sources) == list(section['sources'])
    if stage == 'unified_2_joint': assert c.weights['edits'] == 10 * c.weights['long']

def test_check_reads_a_profile(tmp_path, capsys):
    numbered(tmp_path/'s'); (tmp_path/'p.txt').write_text('number 4\n')
    (tmp_path/'c.yaml').write_text(f'unified_3_sft:\n  source: {{exclude: [{tmp_path}/p.txt], sources: {{sft: {{path: {tmp_path}/s, weight: 1}}}}}}\n')
    main(['data', 'check', '--config', str(tmp_path/'c.yaml'), '--section', 'unified_3_sft', '--json', '-'])
    r = json.loads(capsys.readouterr().out); assert r['sft']['rows'] == 40 and r['sft']['excluded'] == 1
    with pytest.raises(SystemExit, match='Did you mean .unified_3_sft'): main(['data', 'check', '--config', str(tmp_path/'c.yaml'), '--section',
        'unified_3_stf'])

def test_duplicates_and_unlike_pairs_are_counted(tmp_path):
    a, b = jpg(size=(48, 40)), jpg(size=(40, 48))
    shard(tmp_path/'a.tar', [{'source.jpg': s, 'target.jpg': t, 'txt': x} for s, t, x in ((a, a, 'one'), (a, a, 'One.'), (a, b, 'two'))])
    r = examine(SourceConfig(path=str(tmp_path), task='edit'), 0); assert (r['duplicate_pictures'], r['duplicate_texts'], r['unlike_pairs']) == (1, 1, 1)

@pytest.mark.parametrize('argv,says', [(['pack', 'nowhere', 'x'], 'no such folder'),
    (['pack', 'world:trees', 'x'], 'Allowed: captions, edits, photos, scenes'), (['check'], 'Nothing to check'),
    (['pack', 'world:edits', 'full'], 'not empty'), (['pack', 'full', 'full/out'], 'lies within'),
    (['check', 'full', '--field', 'text'], 'FIELD=WHERE'), (['check', 'full', '--task', 'captoin'], "Did you mean 'caption'"),
    (['check', 'full', '--match', 'some'], 'Allowed: contains, exact'), (['check', 'empty'], 'not one sample')])
def test_mistakes_are_one_line(tmp_path, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path); numbered(tmp_path/'full', 1, 2); (tmp_path/'empty').mkdir()
    with pytest.raises(SystemExit, match=says) as e: main(['data', *argv])
    assert '\n' not in str(e.value)

def test_the_command_is_installed_and_teaches(capsys):
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini')
    assert ini['DEFAULT']['console_scripts'].strip() == 'spar=spar.command:main'
    for argv in (['--help'], ['check', '--help'], ['pack', '--help']):
        with pytest.raises(SystemExit) as e: main(['data', *argv])
        assert e.value.code == 0 and capsys.readouterr().out.count('spar data') >= 2


# ---- the real objective, real processes ------------------------------------------------------------------------------

def test_the_unified_objective_trains_from_shards(tmp_path):
    from spar.backbones.dcae import DCAE, mini_dcae
    from spar.backbones.mllm import mini_mllm, MLLM
    from spar.backbones.sana import mini_sana
    from spar.core import freeze
    from spar.tokenizer.model import new_tokenizer
    from spar.unified.training import StageConfig, UnifiedObjective
    from spar.unified.model import Unified, UnifiedConfig
    from spar.world.prompts import vocabulary
    torch.manual_seed(0)
    mllm = MLLM(*mini_mllm([' '.join(vocabulary())], dim=32, layers=4, heads=4, ffn=64, vision_dim=32, vision_layers=1))
    dcae = freeze(DCAE(mini_dcae(channels=(16, 16, 32, 32), enc_layers=(0, 1, 1, 1), dec_layers=(0, 1, 1, 1))))
    tok = new_tokenizer(mllm, dcae, dict(layers=1, heads=4, blocks=1)); tok.measure(dcae, [dict(image=torch.randn(4, 3, 64, 64))])
    cfg = UnifiedConfig.from_dict(dict(condition=dict(queries=3, layers=1), alignment=dict(block=1, hidden=16), flow=dict(steps=3)))
    obj = UnifiedObjective(Unified(mllm, tok, mini_sana(text_dim=24, layers=2, heads=2, head_dim=16), cfg, dcae), StageConfig('joint'))
    c = two_tasks(tmp_path); assert {c.locate(4 * m)[0] for m in range(4)} == {'caption', 'edit'}
    h = fit(obj, c, TrainConfig(steps=4, batch_size=4, precision='no', log_every=1, attention='sdpa'), 0, tmp_path/'run', 'x')
    assert mllm.hf.config._attn_implementation == mllm.lm.config._attn_implementation == 'sdpa'      # it was eager, as on every CPU
    assert [set(r) >= {'L_fm', 'L_align'} for r in h.rows] == [True] * 4 and c.counts.total()['read'] >= 16

RUN = '''
import sys, time, torch, hashlib
from spar.scale.data.corpus import Corpus
from spar.training.loop import fit
from spar.training.objective import Objective, TrainConfig
class Mean(Objective):
    def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.zeros(3))
    def weights(self, progress, player='model'): return {'mse': 1.}
    def terms(self, batch, weights, player='model'):
        print('SHARE', len(batch['index']), flush=True)
        time.sleep(float(sys.argv[4]))
        return {'mse': (batch['image'].mean((2, 3)) - self.w).square().mean()}
root = sys.argv[1]
c = Corpus(dict(side=16, sources=dict(c=dict(path=root + '/c', weight=.5), e=dict(path=root + '/e', task='edit', weight=.5))), unit=4)
o = Mean(); fit(o, c, TrainConfig(steps=24, batch_size=8, accumulate=2, lr=.02, precision='no', save_every=4, workers=int(sys.argv[3])), 0, sys.argv[2], 'x')
print('WEIGHTS', *o.w.tolist())
'''

@pytest.mark.slow
def test_killed_on_two_processes_and_resumed_on_one_ends_within_rounding(tmp_path):
    import re, socket, subprocess, time
    two_tasks(tmp_path); (tmp_path/'run.py').write_text(RUN)
    with socket.socket() as free: free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]
    def start(folder, workers, wait=0, rank=0, world=1):
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'ACCELERATE_USE_CPU': 'true'}
        if world > 1: env |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world))
        with open(tmp_path/f'{folder}{rank}.log', 'w') as log:
            return subprocess.Popen([sys.executable, str(tmp_path/'run.py'), str(tmp_path), str(tmp_path/folder), str(workers), str(wait)], cwd=ROOT,
                env=env, stdout=log, stderr=log)
    def ended(p, folder):
        code, out = p.wait(200), (tmp_path/f'{folder}0.log').read_text(); assert code == 0, out[-3000:]
        return out, torch.tensor([float(v) for v in re.search(r'WEIGHTS (.*)', out)[1].split()])
    whole, pair, state = start('one', 0), [start('two', 1, .2, r, 2) for r in (0, 1)], tmp_path/'two/checkpoints'
    try:
        while all(p.poll() is None for p in pair) and not any(n >= 4 for n in checkpoint_steps(state)): time.sleep(.05)
        assert all(p.poll() is None for p in pair), (tmp_path/'two0.log').read_text()[-3000:]
    finally: [(p.kill(), p.wait()) for p in pair]
    assert 4 <= max(checkpoint_steps(state)) < 24 and 'SHARE 2' in (tmp_path/'two1.log').read_text(), 'two processes really shared a micro-batch'
    out, resumed = ended(start('two', 2), 'two'); one = ended(whole, 'one')[1]
    assert 'Resumed at step' in out and torch.allclose(resumed, one, atol=1e-6) and not torch.equal(one, torch.zeros(3))
