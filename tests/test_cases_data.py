"""Training data as people have it: splits side by side, odd encodings, links, phones' pictures, names that cannot be printed."""
import gzip, io, json, os, shutil, subprocess, sys, tarfile
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from webdataset import TarWriter
from conftest import ROOT
from spar.images import read_image, squared
from spar.scale.data.check import examine
from spar.scale.data.cli import data_command
from spar.scale.data.corpus import Corpus, CorpusConfig, corpus_of, Stream
from spar.scale.data.exclude import Exclude
from spar.scale.data.sample import as_tensor, Broken, picture
from spar.scale.data.sources import COUNTS, open_source, raw_sample, Shards, SourceConfig


def png(im=None, form='PNG', **options):
    f = io.BytesIO()
    (im or Image.new('RGB', (48, 40), (200, 30, 30))).save(f, form, **options)
    return f.getvalue()

def shard(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path), mtime=0) as w:
        for i, s in enumerate(samples): w.write({'__key__': f'{i:06d}', **s})
    return path

def three(path, n=3): return shard(path, [dict(png=png(), txt=f'{path.stem} {i}') for i in range(n)])

def parquet(path, rows, column='caption', values=None):
    import pyarrow as pa, pyarrow.parquet as pq
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(image=[png()] * rows, **{column: values or [f'{path.stem} {i}' for i in range(rows)]})), path)

def corpus(root, unit=4, seed=0, **options):
    task, split = options.pop('task', 'caption'), options.pop('split', '')
    return Corpus(dict(side=16, max_broken=1., sources=dict(a=dict(path=str(root), task=task, split=split))) | options, unit, seed)

def rows(path, **settings): return len(open_source(SourceConfig(path=str(path), **settings)))

def check(path, *options, capsys=None):
    data_command(['check', str(path), '--json', '-', '--n', '0', *options])
    return next(iter(json.loads(capsys.readouterr().out).values()))


# ---- an option taken and ignored -------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def splits(tmp_path_factory):
    root = tmp_path_factory.mktemp('splits')
    for name, n in (('train-00000-of-00002', 4), ('train-00001-of-00002', 2), ('test-00000-of-00001', 3), ('validation-00000-of-00001', 2)):
        parquet(root/f'data/{name}.parquet', n)
    return root

@pytest.mark.parametrize('split,n', [('', 6), ('train', 6), ('test', 3), ('validation', 2), ('val', 2), ('all', 11)])
def test_rows_of_a_split_of_parquet_files(splits, split, n): assert rows(splits, split=split) == n

def test_an_unknown_split_is_an_error_with_the_list(splits):
    with pytest.raises(ValueError, match='nonsense.*Allowed: all, test, train, validation'): rows(splits, split='nonsense')

@pytest.mark.parametrize('names', [('train/0.parquet', 'test/0.parquet'), ('train.parquet', 'test.parquet'), ('x_train_0.parquet', 'x_eval_0.parquet'),
                                   ('en/training/0.PARQUET', 'en/testing/0.PARQUET')])
def test_the_names_that_the_datasets_library_knows(tmp_path, names):
    for name, n in zip(names, (5, 2)): parquet(tmp_path/name, n)
    assert (rows(tmp_path), rows(tmp_path, split='train'), rows(tmp_path, split='test')) == (5, 5, 2)

def test_shards_have_splits_too(tmp_path):
    for name, n in (('train-0.tar', 4), ('val-0.tar', 2)): three(tmp_path/name, n)
    assert (rows(tmp_path), rows(tmp_path, split='validation'), rows(tmp_path, split='all')) == (4, 2, 6)
    with pytest.raises(ValueError, match='Allowed: all, train, validation'): rows(tmp_path, split='test')

def test_folders_of_pictures_have_splits_and_trains_are_no_split(tmp_path):
    for name in ('train/a.png', 'train/b.png', 'test/c.png'):
        (tmp_path/'f'/name).parent.mkdir(parents=True, exist_ok=True); (tmp_path/'f'/name).write_bytes(png())
    assert (rows(tmp_path/'f', task='image'), rows(tmp_path/'f', task='image', split='test')) == (2, 1)
    (tmp_path/'g').mkdir()
    for name in ('train_1.png', 'cat.png'): (tmp_path/'g'/name).write_bytes(png())
    assert rows(tmp_path/'g', task='image') == 2

def a_folder(path, captions='captions.jsonl'):
    path.mkdir(parents=True); (path/'0.png').write_bytes(png())
    (path/captions).write_text('{"image": "0.png", "caption": "a dog"}\n' if captions.lower().endswith('jsonl') else 'image,caption\n0.png,a dog\n')
    return path

def test_a_source_without_splits_refuses_one(tmp_path):
    import datasets
    parquet(tmp_path/'p/0.parquet', 2); three(tmp_path/'s/0.tar'); a_folder(tmp_path/'f')
    datasets.Dataset.from_dict(dict(caption=['a'])).save_to_disk(tmp_path/'a')
    for name in 'psfa':
        for split in ('train', 'test'):
            with pytest.raises(ValueError, match=f'split .{split}.*Leave `split` empty'): rows(tmp_path/name, split=split)
        assert rows(tmp_path/name)

def test_a_saved_dataset_knows_its_splits(tmp_path):
    import datasets
    ds = datasets.Dataset.from_dict(dict(caption=list('abcde')))
    datasets.DatasetDict(train=ds, validation=ds.select([0, 1])).save_to_disk(tmp_path/'d')
    assert [rows(tmp_path/'d', split=s) for s in ('', 'train', 'validation', 'val')] == [5, 5, 2, 2]
    with pytest.raises(ValueError, match='Allowed: train, validation'): rows(tmp_path/'d', split='test')

def test_files_that_name_no_split_are_named_or_asked_about(tmp_path):
    parquet(tmp_path/'a/train-0.parquet', 2); parquet(tmp_path/'a/more.parquet', 1)
    s = open_source(SourceConfig(path=str(tmp_path/'a'))); assert len(s) == 2 and [f for f in s.faults if f.startswith('more.parquet')]
    three(tmp_path/'b/test.tar'); three(tmp_path/'b/0.tar')
    with pytest.raises(ValueError, match='0.tar does not.*split: all'): rows(tmp_path/'b')
    assert rows(tmp_path/'b', split='all') == 6

@pytest.mark.parametrize('argv,says', [(['check', 'f', '--split', 'test'], 'cannot be split by name'), (['pack', 'f', 'o', '--seed', '3'], '--seed is for a world'),
    (['pack', 'f', 'o', '--dial', 'hard'], '--dial is for a world'), (['pack', 'world:edits', 'o', '--exclude', 'p.txt'], '--exclude is for folders'),
    (['pack', 'world:edits', 'o', '--field', 'text=x'], '--field is for folders'), (['check', 'f', '--section', 'x'], '--section is a section'),
    (['check', 'f', '--counts'], '--counts is for shards'), (['check', 'f', '--match', 'contains'], '--match says how'),
    (['check', '--config', 'c.yaml', '--split', 'test'], '--split is for folders named')])
def test_no_option_of_the_command_is_ignored(tmp_path, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path); a_folder(tmp_path/'f'); (tmp_path/'p.txt').write_text('a dog')
    (tmp_path/'c.yaml').write_text('sources: {a: {path: f}}')
    with pytest.raises(SystemExit, match=says): data_command(argv)

def test_captions_of_shards_are_refused(tmp_path):
    three(tmp_path/'0.tar')
    with pytest.raises(ValueError, match='captions .x.csv. is for a folder of pictures'): rows(tmp_path, captions='x.csv')

def test_check_compares_as_the_profile_says(tmp_path, capsys):
    shard(tmp_path/'s/0.tar', [dict(png=png(), txt='here a photo of a bench in snow')]); (tmp_path/'p.txt').write_text('a photo of a bench')
    (tmp_path/'c.yaml').write_text(json.dumps(dict(exclude=[str(tmp_path/'p.txt')], match='contains', sources=dict(a=dict(path=str(tmp_path/'s'))))))
    data_command(['check', '--config', str(tmp_path/'c.yaml'), '--json', '-'])
    assert json.loads(capsys.readouterr().out)['a']['excluded'] == 1


# ---- files passed over -----------------------------------------------------------------------------------------------

def test_compressed_archives_beside_a_shard_are_named(tmp_path, capsys, caplog):
    data = three(tmp_path/'000.tar', 1).read_bytes()
    names = ['001.tar.gz', '002.tgz', '003.tar.bz2', '004.tar.xz', '005.tar.zst', '006.TAR.GZ', 'x.jsonl.gz', '007.zip']
    for n in names: (tmp_path/n).write_bytes(gzip.compress(data))
    report = check(tmp_path, capsys=capsys)
    assert report['rows'] == 1 and sorted(f.split(':')[0] for f in report['faults']) == sorted(names)
    assert all('compressed; unpack it' in f for f in report['faults'])
    corpus(tmp_path); assert '002.tgz: is not read' in caplog.text
    with pytest.raises(SystemExit) as e: data_command(['check', str(tmp_path), '--strict'])
    assert e.value.code == 2

def test_a_folder_of_compressed_archives_alone_says_so(tmp_path):
    (tmp_path/'0.tar.gz').write_bytes(b'x')
    with pytest.raises(ValueError, match='not one sample found. 0.tar.gz: is not read: it is compressed'): rows(tmp_path)

@pytest.mark.parametrize('name', ['0.TAR', 'sub/1.Tar'])
def test_large_letters_in_endings_are_read(tmp_path, name):
    three(tmp_path/name); assert rows(tmp_path) == 3

@pytest.mark.parametrize('name', ['captions.JSONL', 'METADATA.CSV'])
def test_large_letters_in_captions_files_are_read(tmp_path, name):
    assert rows(a_folder(tmp_path/'f', name)) == 1
    cfg = SourceConfig(path=str(tmp_path/'f')); assert raw_sample(open_source(cfg), cfg, 0)[1]['text'] == ['a dog']

def test_other_data_in_the_folder_are_named(tmp_path):
    three(tmp_path/'s/0.tar'); parquet(tmp_path/'s/0.parquet', 1); parquet(tmp_path/'s/9.parquet', 1)
    assert [f.split(':')[0] for f in open_source(SourceConfig(path=str(tmp_path/'s'))).faults] == ['9.parquet'], 'img2dataset writes 0.parquet beside 0.tar'
    f = a_folder(tmp_path/'f'); (f/'metadata.csv').write_text('image,caption\n'); (f/'captions.jsonl.gz').write_bytes(b'x')
    assert sorted(x.split(':')[0] for x in open_source(SourceConfig(path=str(f))).faults) == ['captions.jsonl.gz', 'metadata.csv']
    (tmp_path/'g').mkdir()
    for n in ('0.png', '0.txt', '1.tif', '2.HEIC'): (tmp_path/'g'/n).write_bytes(png())
    assert sorted(x.split(':')[0] for x in open_source(SourceConfig(path=str(tmp_path/'g'), task='image')).faults) == ['0.txt', '1.tif', '2.HEIC']

def test_pictures_of_phones_with_other_endings_are_read(tmp_path):
    for n in ('a.jfif', 'b.JPE', 'c.mpo'): (tmp_path/n).write_bytes(png(form='JPEG'))
    assert rows(tmp_path, task='image') == 3


# ---- bytes that are not UTF-8 ----------------------------------------------------------------------------------------

CAFE = 'a café'.encode('cp1252')

def named(root, **settings):
    r = examine(SourceConfig(path=str(root), **settings), 0)
    assert '\ufffd' not in json.dumps(r, ensure_ascii=False)
    return r

def test_lines_of_jsonl_that_are_not_utf8_are_named(tmp_path):
    f = a_folder(tmp_path/'f'); good = '\ufeff{"image": "0.png", "caption": "a café"}\n\n'.encode()
    (f/'captions.jsonl').write_bytes(good + b'{"image": "0.png", "caption": "' + CAFE + b'"}\n{"image": "0.png", "caption": "a cat"}\n')
    r = named(f); assert r['good'] == 2 and len(r['named']) == 1
    assert r['named'][0].startswith('captions.jsonl:3') and 'byte 0xe9' in r['named'][0] and 'Windows-1252' in r['named'][0]
    assert {corpus(f)[k]['text'] for k in range(9)} == {'a café', 'a cat'}

def test_lines_of_csv_that_are_not_utf8_are_named(tmp_path):
    f = a_folder(tmp_path/'f', 'captions.csv')
    (f/'captions.csv').write_bytes('image,caption\n0.png,"a\ncafé"\n'.encode() + b'0.png,' + CAFE + b'\n0.png,a cat\n')
    r = named(f); assert r['good'] == 2 and len(r['named']) == 1
    assert r['named'][0].startswith('captions.csv:4') and 'Windows-1252' in r['named'][0]
    (f/'captions.csv').write_bytes(b'image,l\xe9gende\n0.png,x\n')
    with pytest.raises(ValueError, match='captions.csv: line 1 is not UTF-8.*Windows-1252'): rows(f)

def test_members_of_shards_that_are_not_utf8_are_named(tmp_path):
    shard(tmp_path/'0.tar', [dict(png=png(), txt=CAFE), dict(png=png(), json=b'{"caption": "' + CAFE + b'"}'),
        dict(png=png(), txt='a café'.encode('utf-16')), dict(png=png(), txt='a caf\ufffd'), dict(png=png(), json=b'{"caption": "a \\ud83d"}'),
        dict(png=png(), txt='\ufeffa café')])
    r = named(tmp_path); assert r['good'] == 1 and r['broken'] == {'broken text': 5}
    for i, says in enumerate(('Windows-1252', 'Windows-1252', 'UTF-16', 'U+FFFD', 'U+D83D')):
        assert f'0.tar/00000{i}: ' in r['named'][i] and says in r['named'][i]
    assert {corpus(tmp_path)[k]['text'] for k in range(6)} == {'a café'}

def test_strings_of_parquet_files_that_are_not_utf8_are_named(tmp_path):
    import pyarrow as pa
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([CAFE, b'a cat']).buffers())
    parquet(tmp_path/'p/0.parquet', 2, values=bad); parquet(tmp_path/'b/0.parquet', 2, values=[CAFE, b'a cat'])
    for n in 'pb':
        r = named(tmp_path/n); assert r['good'] == 1 and len(r['named']) == 1 and '0.parquet:0 row 0' in r['named'][0] and '0xe9' in r['named'][0], r['named']

def test_lists_of_texts_and_names_of_members(tmp_path):
    bad = 'caf\udce9'
    with tarfile.open(tmp_path/'0.tar', 'w', encoding='utf-8', errors='surrogateescape') as t:
        for ext, body in (('png', png()), ('txt', b'a dog')):
            m = tarfile.TarInfo(f'{bad}.{ext}'); m.size = len(body); t.addfile(m, io.BytesIO(body))
        for ext, body in (('png', png()[:60]), ('txt', b'a dog')):
            m = tarfile.TarInfo(f'{bad}2.{ext}'); m.size = len(body); t.addfile(m, io.BytesIO(body))
    r = named(tmp_path); assert r['good'] == 1 and r['named'][0].startswith('0.tar/caf\\udce92 image: broken image')

def test_prompt_files_that_are_not_utf8_are_named(tmp_path):
    (tmp_path/'p.txt').write_bytes(b'a dog\n' + CAFE)
    with pytest.raises(ValueError, match=r'p.txt cannot be read: line 2 is not UTF-8 \(byte 0xe9\); it looks like Windows-1252'): Exclude([tmp_path/'p.txt'])


# ---- comparing without normalising -----------------------------------------------------------------------------------

PROMPT = "A close-up photo of the dog's \"red\" bowl"
@pytest.mark.parametrize('text', ['A close-up photo of the dog’s “red” bowl', 'a close‑up photo of the dogʼs «red» bowl.', 'A CLOSE–UP PHOTO OF THE DOG`S ‘RED’ BOWL!',
    'A\u00a0close-up\u2009photo  of\tthe dog\u2032s "red"\u3000bowl', 'A close-\u200bup pho\u00adto of the\ufeff dog\u2019s red bowl …', 'Ａ ｃｌｏｓｅ－ｕｐ photo of the dog＇s red bowl',
    'a closeup photo of the dogs red bowl', 'A close_up photo of the dog&#39;s &quot;red&quot; bowl'])
def test_an_evaluation_prompt_is_found_however_it_is_typed(tmp_path, text):
    (tmp_path/'p.txt').write_text(PROMPT)
    exact, contains = Exclude([tmp_path/'p.txt']), Exclude([tmp_path/'p.txt'], 'contains')
    assert exact(text) and contains(text) and contains(f'Look: “{text}” , in snow') and not exact(f'Look: {text}, in snow')
    (tmp_path/'q.jsonl').write_text(json.dumps(dict(prompt=text)))
    assert Exclude([tmp_path/'q.jsonl'])(PROMPT) and Exclude([tmp_path/'q.jsonl'], 'contains')(f'see {PROMPT} here')

def test_other_texts_are_not_found(tmp_path):
    (tmp_path/'p.txt').write_text('a photo of a bench\na dog\n'); c = Exclude([tmp_path/'p.txt'], 'contains')
    for text in ('a photo of a benchmark', 'papa photo of a bench', 'a dog on a lawn', 'a photo of two benches', '', '!'): assert not c(text), text

def test_every_prompt_of_a_benchmark_is_found_in_other_typing(tmp_path):
    (tmp_path/'e.jsonl').write_text('\n'.join(json.dumps(dict(prompt=f"a photo of {n} person's cups")) for n in 'one two three'.split()))
    shard(tmp_path/'s/0.tar', [dict(png=png(), txt=f'A photo of\u00a0{n} person’s cups.') for n in ('one', 'two', 'four')])
    c = corpus(tmp_path/'s', exclude=[str(tmp_path/'e.jsonl')])
    assert {c[k]['text'] for k in range(9)} == {'A photo of\u00a0four person’s cups.'} and c.counts.total()['excluded'] >= 2

def test_prompts_of_a_table_are_its_column(tmp_path):
    (tmp_path/'p.csv').write_text('Category,Prompt\nanimals,"a dog, asleep"\n'); assert Exclude([tmp_path/'p.csv'])('A dog asleep')
    (tmp_path/'p.tsv').write_text('Category\tText\nanimals\ta dog\n')
    with pytest.raises(ValueError, match='no prompt found'): Exclude([tmp_path/'p.tsv'])


# ---- a cache keyed by size -------------------------------------------------------------------------------------------

def test_a_shard_written_anew_with_the_same_size_is_counted_anew(tmp_path):
    two = shard(tmp_path/'0.tar', [dict(png=png(), txt='number 9')] * 2); size, before = two.stat().st_size, two.stat()
    Shards(tmp_path).write_counts(); assert len(Shards(tmp_path)) == 2
    shard(two, [dict(png=png(), txt=f'number {i}') for i in range(4)]); assert two.stat().st_size == size
    assert len(Shards(tmp_path)) == 4
    os.utime(two, ns=(before.st_atime_ns, before.st_mtime_ns)); assert len(Shards(tmp_path)) == 4, 'the same time, too'
    assert {corpus(tmp_path)[k]['text'] for k in range(16)} == {f'number {i}' for i in range(4)}

def test_a_count_that_is_wrong_after_all_is_reported(tmp_path, caplog):
    from spar.scale.data.files import stamp
    p = shard(tmp_path/'0.tar', [dict(png=png(), txt=f'number {i}') for i in range(4)]); (tmp_path/COUNTS).write_text(json.dumps({'0.tar': [2, *stamp(p)]}))
    s = Shards(tmp_path); assert len(s) == 2; s.row(0); assert '0.tar: 2 samples were counted, it holds 4' in caplog.text

def test_packed_counts_are_believed(tmp_path, monkeypatch):
    a_folder(tmp_path/'f'); data_command(['pack', str(tmp_path/'f'), str(tmp_path/'s')])
    monkeypatch.setattr('spar.scale.data.sources.scan', lambda p: pytest.fail('scanned')); assert len(Shards(tmp_path/'s')) == 1

def test_files_written_anew_while_they_are_open_are_noticed(tmp_path):
    three(tmp_path/'s/0.tar'); s = Shards(tmp_path/'s'); s.row(0); path = tmp_path/'s/0.tar'
    data = path.read_bytes(); path.write_bytes(data); os.utime(path, (1, 1))
    with pytest.raises(Broken, match='has changed since it was opened'): s.row(1)
    parquet(tmp_path/'p/0.parquet', 3); t = open_source(SourceConfig(path=str(tmp_path/'p'))); parquet(tmp_path/'p/0.parquet', 3, values=['other'] * 3)
    os.utime(tmp_path/'p/0.parquet', (1, 1))
    with pytest.raises(Broken, match='has changed since it was opened'): t.row(0)


# ---- writer and reader, two readers ----------------------------------------------------------------------------------

def zoo():
    "Name -> bytes of every kind of picture that is read, and some that surprise."
    noise = Image.effect_noise((60, 44), 80); rgb = Image.merge('RGB', [noise, noise.rotate(90), noise.rotate(180)])
    alpha = rgb.copy(); alpha.putalpha(noise); turned = Image.Exif(); turned[0x0112] = 6
    grey16 = Image.fromarray((np.asarray(noise).astype(np.uint16) * 257))
    frames = dict(save_all=True, append_images=[rgb.rotate(180)])
    return {'jpg': png(rgb, 'JPEG'), 'phone': png(rgb, 'MPO', **frames), 'cmyk': png(rgb.convert('CMYK'), 'JPEG'), 'turned': png(rgb, 'JPEG', exif=turned),
        'grey jpeg': png(noise, 'JPEG'), 'progressive': png(rgb, 'JPEG', progressive=True), 'png': png(rgb), 'grey16': png(grey16), 'alpha': png(alpha),
        'grey alpha': png(alpha.convert('LA')), 'palette': png(rgb.convert('P')), 'palette alpha': png(rgb.convert('P'), transparency=3), 'bit': png(noise.convert('1')),
        'apng': png(rgb, **frames), 'webp': png(rgb, 'WEBP'), 'webp alpha': png(alpha, 'WEBP'), 'webp moving': png(rgb, 'WEBP', **frames), 'bmp': png(rgb, 'BMP'),
        'bmp grey': png(noise, 'BMP'), 'gif': png(rgb, 'GIF', **frames)}

ZOO = zoo()

@pytest.mark.parametrize('kind', ZOO)
def test_every_reader_of_a_picture_gives_the_same_pixels(tmp_path, kind):
    path = tmp_path/f'{kind}.bin'; path.write_bytes(ZOO[kind]); ours = read_image(path).image
    assert np.array_equal(np.asarray(picture(ZOO[kind], kind)), np.asarray(ours))
    (tmp_path/'f').mkdir(); (tmp_path/'f/0.jpg').write_bytes(ZOO[kind]); (tmp_path/'f/captions.jsonl').write_text('{"image": "0.jpg", "caption": "a dog"}')
    shown = corpus(tmp_path/'f')[0]['image']
    assert torch.equal(shown, as_tensor(ours, 16)) and squared(ours, 16).image.size == (16, 16)

@pytest.mark.parametrize('task', ['image', 'caption', 'edit'])
def test_packed_is_good_after_check_for_every_kind_of_picture(tmp_path, capsys, task):
    f = tmp_path/'f'; f.mkdir(); lines = []
    for i, data in enumerate(ZOO.values()):
        (f/f'{i}.jpg').write_bytes(data)
        lines.append(json.dumps(dict(image=dict(image=f'{i}.jpg'), caption=dict(image=f'{i}.jpg', captions=['a "dog"\n…', 'ein Hund ❄']),
            edit=dict(source=f'{i}.jpg', target=f'{i}.jpg', instruction='make it blue'))[task]))
    (f/'captions.jsonl').write_text('\n'.join(lines))
    data_command(['pack', str(f), str(tmp_path/'s'), '--task', task]); out = capsys.readouterr().out
    assert f'{len(ZOO)} samples' in out and '; 0 left out' in out
    r = check(tmp_path/'s', capsys=capsys); assert (r['task'], r['good'], r['named'], r['faults']) == (task, len(ZOO), [], [])
    a, b = (SourceConfig(path=str(tmp_path/n), task=task) for n in 'fs'); sa, sb = open_source(a), open_source(b)
    assert all(raw_sample(sa, a, i)[1] == raw_sample(sb, b, i)[1] for i in range(len(ZOO)))

def test_shards_that_were_packed_with_another_ending_are_read(tmp_path):
    shard(tmp_path/'0.tar', [dict(mpo=ZOO['phone'], txt='a dog')]); assert named(tmp_path)['good'] == 1

@pytest.mark.parametrize('kind', ['jpg', 'png', 'webp', 'gif', 'bmp', 'phone'])
def test_a_cut_picture_is_named(tmp_path, kind):
    f = a_folder(tmp_path/'f'); (f/'0.png').write_bytes(ZOO[kind][:len(ZOO[kind]) // 3])
    r = named(f); assert r['good'] == 0 and r['named'][0].startswith('captions.jsonl:1 image: broken image')

def test_a_text_that_cannot_be_written_is_left_out_by_name(tmp_path, capsys):
    f = a_folder(tmp_path/'f'); (f/'captions.jsonl').write_text('{"image": "0.png", "caption": "half \\ud83d"}\n{"image": "0.png", "caption": "a dog"}\n')
    data_command(['pack', str(f), str(tmp_path/'s')]); assert '1 samples in 1 shards' in capsys.readouterr().out


# ---- links -----------------------------------------------------------------------------------------------------------

def snapshot(top, files: dict):
    "The layout of a Hugging Face cache: names are links into blobs."
    root = top/'hub/datasets--x--y/snapshots/1f2e3d'
    (top/'hub/datasets--x--y/blobs').mkdir(parents=True)
    for i, (name, data) in enumerate(files.items()):
        blob = top/f'hub/datasets--x--y/blobs/{i:040d}'; blob.write_bytes(data); link = root/name; link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return root

@pytest.mark.parametrize('what', ['shards', 'table', 'folder'])
def test_a_hugging_face_cache_is_read(tmp_path, what):
    three(tmp_path/'0.tar'); parquet(tmp_path/'train-0.parquet', 3); a_folder(tmp_path/'f')
    files = dict(shards={'data/0.tar': tmp_path/'0.tar'}, table={'data/train-0.parquet': tmp_path/'train-0.parquet'},
        folder={'0.png': tmp_path/'f/0.png', 'captions.jsonl': tmp_path/'f/captions.jsonl'})[what]
    root = snapshot(tmp_path, {n: p.read_bytes() for n, p in files.items()}); r = named(root)
    assert (r['good'], r['named'], r['faults']) == ({'shards': 3, 'table': 3, 'folder': 1}[what], [], [])
    (tmp_path/'linked').symlink_to(root); assert named(tmp_path/'linked')['good'] == r['good']
    if what != 'folder': assert named(root/'data')['good'] == 3
    assert corpus(root)[0]['image'].shape == (3, 16, 16)

def test_a_snapshot_does_not_open_the_rest_of_the_disk(tmp_path):
    (tmp_path/'secret.png').write_bytes(png()); f = a_folder(tmp_path/'f')
    lines = [json.dumps(dict(image=p, caption='a dog')) for p in ('l.png', '../../blobs/' + '0' * 40, '../../../../secret.png', str(tmp_path/'secret.png'))]
    root = snapshot(tmp_path, {'captions.jsonl': '\n'.join(lines).encode()}); (root/'l.png').symlink_to(tmp_path/'secret.png')
    assert named(root)['broken'] == {'outside the folder': 4}

def test_links_are_followed_where_the_settings_say_so(tmp_path, capsys):
    three(tmp_path/'other/0.tar'); (tmp_path/'s').mkdir(); (tmp_path/'s/a.tar').symlink_to(tmp_path/'other/0.tar'); three(tmp_path/'s/b.tar')
    (tmp_path/'more').mkdir(); three(tmp_path/'more/c.tar'); (tmp_path/'s/more').symlink_to(tmp_path/'more')
    s = open_source(SourceConfig(path=str(tmp_path/'s')))
    assert len(s) == 3 and any('a.tar' in f and '`links: follow`' in f for f in s.faults) and any(f.startswith('more: a link to a folder') for f in s.faults)
    assert rows(tmp_path/'s', links='follow') == 9 and check(tmp_path/'s', '--links', 'follow', capsys=capsys)['good'] == 9
    with pytest.raises(ValueError, match='Allowed: follow, inside'): SourceConfig(links='yes')
    (tmp_path/'s/loop').symlink_to(tmp_path/'s'); assert rows(tmp_path/'s', links='follow') == 9

def test_archives_and_paths_never_lead_out_even_then(tmp_path):
    (tmp_path/'secret.png').write_bytes(png()); (tmp_path/'s').mkdir()
    with tarfile.open(tmp_path/'s/0.tar', 'w') as t:
        m = tarfile.TarInfo('a.png'); m.type, m.linkname = tarfile.SYMTYPE, '../secret.png'; t.addfile(m)
        m = tarfile.TarInfo('../b.png'); m.size = len(png()); t.addfile(m, io.BytesIO(png()))
    assert examine(SourceConfig(path=str(tmp_path/'s'), task='image', links='follow'), 0)['broken'] == {'outside the folder': 2}
    f = a_folder(tmp_path/'f'); (f/'captions.jsonl').write_text('\n'.join(json.dumps(dict(image=p, caption='x')) for p in ('../secret.png', str(tmp_path/'secret.png'))))
    assert examine(SourceConfig(path=str(f), links='follow'), 0)['broken'] == {'outside the folder': 2}


# ---- output that cannot be printed -----------------------------------------------------------------------------------

def odd_names(tmp_path):
    root = tmp_path/'d'; root.mkdir()
    for i in range(3): (root/f'{i}.png').write_bytes(png())
    with open(os.path.join(os.fsencode(root), b'caf\xe9\n\x1b[31m.png'), 'wb') as f: f.write(png()[:60])
    return root

@pytest.mark.parametrize('encoding', ['utf-8', 'ascii', 'latin-1'])
def test_a_name_that_is_no_utf8_loses_no_report(tmp_path, encoding):
    root = odd_names(tmp_path); env = {**os.environ, 'PYTHONIOENCODING': encoding, 'PYTHONPATH': str(ROOT)}
    for options in (['--json', str(tmp_path/'r.json')], ['--json', '-']):
        call = [sys.executable, '-c', 'from spar.scale.data.cli import data_command; data_command()', 'check', str(root), '--task', 'image', *options]
        done = subprocess.run(call, env=env, cwd=ROOT, capture_output=True); out = done.stdout.decode(encoding)
        assert done.returncode == 0, done.stderr.decode('utf-8', 'replace')[-500:]
        if options[1] == '-': report = json.loads(out)
        else: assert '3 of 4' in out and 'caf\\udce9\\n\\x1b[31m.png image: broken image' in out
    assert report == json.loads((tmp_path/'r.json').read_text()) and report['d']['good'] == 3

def test_logs_and_left_out_names_are_escaped(tmp_path, capsys, caplog):
    root = odd_names(tmp_path); data_command(['pack', str(root), str(tmp_path/'s'), '--task', 'image']); said = capsys.readouterr()
    assert '3 samples' in said.out and 'left out  caf\\udce9\\n\\x1b[31m.png' in said.err and len(said.err.splitlines()) == 1
    c = corpus(root, task='image', log=str(tmp_path/'log.jsonl')); [c[k] for k in range(12)]
    lines = (tmp_path/'log.jsonl').read_bytes().decode().splitlines()
    assert len(lines) == 1 and 'caf\\udce9' in json.loads(lines[0])['what'] and 'caf\\udce9' in caplog.text

def test_odd_names_of_shards_and_folders(tmp_path, capsys):
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b'/d\xe9')); root.mkdir()
    three(tmp_path/'0.tar'); shutil.copy(tmp_path/'0.tar', Path(os.fsdecode(os.fsencode(root) + b'/g\xe9.tar'))); (root/'h.tar').write_bytes(b'x' * 2000)
    parquet(tmp_path/'0.parquet', 2); os.mkdir(tmp_path/'p'); shutil.copy(tmp_path/'0.parquet', Path(os.fsdecode(os.fsencode(tmp_path) + b'/p/p\xe9.parquet')))
    data_command(['check', str(root), str(tmp_path/'p'), '--counts', '--json', str(tmp_path/'r.json')])
    out = capsys.readouterr().out.encode().decode(); assert 'd\\udce9' in out and 'h.tar: no tar file' in out
    r = json.loads((tmp_path/'r.json').read_bytes()); assert r['d\\udce9']['good'] == 3 and r['p']['good'] == 2
    assert len(Shards(root)) == 3
    with pytest.raises(SystemExit, match=r'n\\udce9: no such folder'): data_command(['check', os.fsdecode(b'n\xe9')])


# ---- the length of texts ---------------------------------------------------------------------------------------------

def subwords():
    from tokenizers import decoders, models, pre_tokenizers, Tokenizer
    from transformers import PreTrainedTokenizerFast
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    t = Tokenizer(models.BPE(vocab=letters, merges=[])); t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False); t.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=t)

@pytest.mark.parametrize('tokenizer', [None, subwords()], ids=['stand-in', 'bytes'])
@pytest.mark.parametrize('text', ['dog ' * 5000, 'x' * 50_000, '雪' * 5000, '😀' * 3000, 'word, ' * 2000, '. ' * 9000, ' '.join(map(str, range(9000)))])
def test_a_long_text_is_cut_counted_and_named(tmp_path, caplog, tokenizer, text):
    shard(tmp_path/'s/0.tar', [dict(png=png(), txt=text), dict(png=png(), txt='a dog')])
    c = corpus_of(dict(side=16, log=str(tmp_path/'log.jsonl'), sources=dict(a=dict(path=str(tmp_path/'s')))), dict(batch_size=4), 0, tokenizer)
    seen = {c[k]['text'] for k in range(8)}; short = max(seen, key=len)
    assert len(seen) == 2 and text.startswith(short) and 0 < len(c.limit.ends(short)) <= 1024 < len(c.limit.ends(text))
    assert len(c.limit.ends(short)) > 900, 'no more is lost than the word that does not fit'
    assert c.counts.total()['cut'] == 4 and caplog.text.count('was cut to the first') == 1 and '0.tar/000000' in caplog.text
    c.state_dict(8); assert 'samples so far: 8 read, 0 broken, 0 excluded, 4 cut' in caplog.text
    assert [json.loads(line)['kind'] for line in (tmp_path/'log.jsonl').read_text().splitlines()] == ['cut', 'counts']

def test_a_text_is_cut_after_a_whole_word(tmp_path):
    shard(tmp_path/'0.tar', [dict(png=png(), txt='one two three four')])
    assert corpus(tmp_path, max_tokens=3)[0]['text'] == 'one two three'
    assert corpus_of(dict(side=16, max_tokens=10, sources=dict(a=dict(path=str(tmp_path)))), dict(batch_size=1), 0, subwords())[0]['text'] == 'one two'

@pytest.mark.parametrize('wrong', [dict(max_tokens=0), dict(max_tokens=-1), dict(max_tokens=10**6), dict(max_words=-2), dict(flip=1.5), dict(flip=-.1),
    dict(flip=float('nan')), dict(crop='corner'), dict(min_side=-1), dict(slots=-2), dict(max_broken=float('nan'))])
def test_numbers_outside_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): CorpusConfig(**wrong)

@pytest.mark.parametrize('wrong', [dict(weight=float('nan')), dict(weight=-1.), dict(repeat=0.), dict(repeat=float('inf')), dict(weight=float('inf'))])
def test_weights_outside_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r'SourceConfig\.(weight|repeat): expected a number'): SourceConfig(**wrong)

def test_check_reports_texts_that_are_cut(tmp_path, capsys):
    shard(tmp_path/'s/0.tar', [dict(png=png(), txt=t) for t in ('dog ' * 3000, 'a dog', 'a b c d')]); subwords().save_pretrained(tmp_path/'t')
    r = check(tmp_path/'s', capsys=capsys); assert (r['cut_texts'], r['max_tokens'], r['counted_by'], r['tokens']['max']) == (1, 1024, 'stand-in', 3000)
    r = check(tmp_path/'s', '--max-tokens', '3', capsys=capsys); assert r['cut_texts'] == 2
    r = check(tmp_path/'s', '--tokenizer', str(tmp_path/'t'), capsys=capsys); assert (r['counted_by'], r['tokens']['min'], r['cut_texts']) == ('tokenizer', 5, 1)
    data_command(['check', str(tmp_path/'s')]); assert '1 (max_tokens 1,024)' in capsys.readouterr().out
    (tmp_path/'c.yaml').write_text(json.dumps(dict(max_tokens=2, sources=dict(a=dict(path=str(tmp_path/'s'))))))
    data_command(['check', '--config', str(tmp_path/'c.yaml'), '--json', '-']); assert json.loads(capsys.readouterr().out)['a']['cut_texts'] == 2

def test_workers_count_cut_texts_too(tmp_path):
    shard(tmp_path/'0.tar', [dict(png=png(), txt='dog ' * 2000)] * 4); s = Stream(corpus(tmp_path), workers=1); next(iter(s))
    assert s.corpus.counts.total()['cut'] >= 4


# ---- crops and flips -------------------------------------------------------------------------------------------------

def ramp(w=90, h=30):
    "Red grows to the right, green downwards."
    x, y = np.meshgrid(np.linspace(0, 255, w), np.linspace(0, 255, h))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))

def is_flipped(x): return bool(x[0, :, 0].mean() > x[0, :, -1].mean())
def place(x): return float(x[0].mean())

def pictures(root, texts, **options):
    shard(root/'0.tar', [dict(png=png(ramp()), txt=t) for t in texts]); return corpus(root, crop='random', flip=.5, **options)

def test_training_pictures_are_cropped_and_flipped_at_random(tmp_path):
    c = pictures(tmp_path, ['a dog'] * 8); xs = [c[k]['image'] for k in range(200)]
    flipped = sum(map(is_flipped, xs)); places = [place(x) for x in xs]
    assert 70 < flipped < 130 and min(places) < -.55 and max(places) > .55 and abs(np.mean(places)) < .1
    assert all(torch.equal(c[k]['image'], xs[k]) for k in (3, 77)) and torch.equal(corpus(tmp_path, crop='random', flip=.5)[77]['image'], xs[77])
    assert not torch.equal(pictures(tmp_path, ['a dog'] * 8, seed=1)[77]['image'], xs[77])

def test_crops_do_not_depend_on_workers_or_processes(tmp_path):
    c = pictures(tmp_path, ['a dog'] * 8); one = [c[k]['image'] for k in range(8)]
    two = [b['image'] for r in (0, 1) for b in [next(iter(Stream(c, r, 2, workers=r)))]]
    assert torch.equal(torch.stack(one[:4]), torch.stack([two[0][0], two[1][0], two[0][1], two[1][1]]))

@pytest.mark.parametrize('text', ['a dog left of a cat', 'the RIGHT hand', 'turn it clockwise', 'rotate counter-clockwise', 'a sign that reads “stop”', 'the leftmost cup',
    'l\u200beft arm', 'a poster with the word "sale"', 'links ein Hund', '左边的猫'])
def test_texts_that_know_their_sides_are_never_flipped(tmp_path, text):
    c = pictures(tmp_path, [text] * 8); xs = [c[k]['image'] for k in range(40)]
    assert not any(map(is_flipped, xs)) and len({place(x) for x in xs}) > 10, 'the crop is still random'

@pytest.mark.parametrize('text', ['a bright dog', 'leftover pizza', 'a copyrighted cat', 'an upright bear'])
def test_other_texts_are_flipped(tmp_path, text):
    c = pictures(tmp_path, [text] * 8); assert 5 < sum(is_flipped(c[k]['image']) for k in range(40)) < 35

@pytest.mark.parametrize('scale', [1, 2])
def test_source_and_target_of_an_edit_get_the_same_crop_and_flip(tmp_path, scale):
    large = ramp().resize((90 * scale, 30 * scale))
    shard(tmp_path/'0.tar', [{'source.png': png(ramp()), 'target.png': png(large), 'txt': t} for t in ('make it blue', 'raise the left arm')])
    c = corpus(tmp_path, task='edit', crop='random', flip=.5); seen = set()
    for s in (c[k] for k in range(60)):
        assert (s['source'] - s['image']).abs().mean() < .03 and is_flipped(s['source']) == is_flipped(s['image']); seen.add((s['text'], is_flipped(s['image'])))
    assert seen == {('make it blue', False), ('make it blue', True), ('raise the left arm', False)}

def test_unlike_pairs_keep_their_centres(tmp_path):
    shard(tmp_path/'0.tar', [{'source.png': png(ramp(90, 30)), 'target.png': png(ramp(40, 40)), 'txt': 'left'}])
    s = corpus(tmp_path, task='edit', crop='random')[0]; assert torch.equal(s['source'], as_tensor(ramp(90, 30), 16)) and torch.equal(s['image'], as_tensor(ramp(40, 40), 16))

@pytest.mark.parametrize('split,moves', [('train', True), ('all', True), ('val', False), ('test', False)])
def test_only_the_training_split_moves(tmp_path, split, moves):
    for n in ('train', 'val', 'test'): shard(tmp_path/f'{n}-0.tar', [dict(png=png(ramp()), txt='a dog')] * 2)
    c = corpus(tmp_path, split=split, crop='random', flip=.5); centre = as_tensor(ramp(), 16)
    assert all(torch.equal(c[k]['image'], centre) for k in range(12)) != moves

def test_the_default_is_the_centre_and_the_profiles_move():
    from spar.running.profiles import resolved
    assert (CorpusConfig().crop, CorpusConfig().flip, CorpusConfig().max_tokens) == ('centre', 0, 1024)
    for profile in ('spar-1b', 'spar-3b'):
        for stage in ('tokenizer_1_init', 'tokenizer_2_decoder', 'tokenizer_3_encoder', 'dcae_tuned', 'unified_1_connector', 'unified_2_joint', 'unified_3_sft', 'sana_tuned'):
            c = CorpusConfig.from_dict(resolved(stage, profile)['source']); assert (c.crop, c.flip, c.max_tokens) == ('random', .5, 1024), (profile, stage)

def test_a_checkpoint_of_other_crops_is_noticed(tmp_path):
    state = pictures(tmp_path, ['a dog'] * 4).state_dict(4)
    with pytest.raises(ValueError, match='crop was random, is centre; flip was 0.5, is 0'): corpus(tmp_path).load_state_dict(state)
