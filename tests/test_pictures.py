"""Every part reads a picture alike, what is not finite becomes no picture, and a save takes nothing along that it has not written."""
import re
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline, tiny_unified
from spar.backbones.dcae import DCAE, mini_dcae, save_dcae
from spar.backbones.mllm import save_mllm
from spar.backbones.perceptual import save_lpips
from spar.backbones.sana import mini_sana, mini_text_encoder, save_sana, Text2Image
from spar.core import to_uint8
from spar.figures import picture_grid
from spar.images import read_image, squared
from spar.mini.judge import Judge, JudgeConfig
from spar.scale.benchmarks.reconstruction import _read_square
from spar.scale.data.sample import as_tensor, picture
from spar.scale.export import export

WORDS = ['a red star left of blue heart what colour is this ?']

@pytest.fixture(scope='module')
def pipe(): return tiny_pipeline(WORDS)

def _sana(pipe):
    tk = pipe.tokenizer
    return Text2Image(mini_sana(text_dim=24, layers=1, heads=2, head_dim=16), mini_text_encoder(tk, dim=24, layers=1), tk)

WRITERS = dict(
    pipeline=lambda pipe, to: pipe.save_pretrained(to), condition=lambda pipe, to: pipe.condition.save_pretrained(to),
    tokenizer=lambda pipe, to: pipe.image_tokenizer.save_pretrained(to),
    unified=lambda pipe, to: tiny_unified(WORDS).save_pretrained(to),
    mllm=lambda pipe, to: save_mllm(pipe.opened_mllm, to),
    dcae=lambda pipe, to: save_dcae(DCAE(mini_dcae(channels=(16, 16), enc_layers=(0, 1), dec_layers=(0, 1))), to),
    sana=lambda pipe, to: save_sana(_sana(pipe), to),
    lpips=lambda pipe, to: save_lpips({'0.weight': torch.ones(2)}, to),
    judge=lambda pipe, to: Judge(JudgeConfig.of_world(width=8)).save_pretrained(to),
    export=lambda pipe, to: export(pipe, 'pipeline', to, overwrite=True),
)
MINE = ('notes.txt', 'results/a.csv', '.git/HEAD')

def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}

@pytest.mark.parametrize('earlier', [False, True])
@pytest.mark.parametrize('name', WRITERS)
def test_a_save_takes_nothing_along(name, earlier, pipe, tmp_path):
    folder, write = tmp_path/'f', WRITERS[name]
    if earlier: write(pipe, folder); write(pipe, folder)        # a save takes the place of a save
    for m in MINE: (folder/m).parent.mkdir(parents=True, exist_ok=True); (folder/m).write_text('mine')
    before = contents(folder)
    with pytest.raises(FileExistsError, match=re.escape(str(folder))): write(pipe, folder)
    assert contents(folder) == before and sorted(p.name for p in tmp_path.iterdir()) == ['f']

@pytest.mark.parametrize('name', WRITERS)
def test_the_working_folder_and_a_file_are_no_targets(name, pipe, tmp_path, monkeypatch):
    (tmp_path/'here').mkdir(); monkeypatch.chdir(tmp_path/'here'); (tmp_path/'file').write_text('x')
    for to in ('.', '..'):
        with pytest.raises(ValueError, match='the folder you work in'): WRITERS[name](pipe, to)
    with pytest.raises(NotADirectoryError, match='file is a file'): WRITERS[name](pipe, '../file')
    assert list((tmp_path/'here').iterdir()) == [] and (tmp_path/'file').read_text() == 'x'

@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_becomes_no_picture(value, pipe, monkeypatch):
    odd = torch.zeros(2, 3, 64, 64); odd[1, 0, 3, 3] = value
    for write in (to_uint8, lambda x: picture_grid(x, ['a', 'b'])):
        with pytest.raises(ValueError, match='NaN or inf'): write(odd)
    monkeypatch.setattr(pipe.image_tokenizer.decoder, 'forward', lambda z: odd[:len(z)])
    grey = Image.new('RGB', (64, 64))
    for call in (lambda: pipe(['a red star'] * 2, 1), lambda: pipe.edit([grey] * 2, 'a red star', 1), lambda: pipe.reconstruct([grey] * 2)):
        with pytest.raises(ValueError, match='NaN or inf') as e: call()
        assert '1' in str(e.value), 'it names the picture'


def odd_pictures(folder):
    "The kinds of files that Pillow alone gets wrong; one is black and white halves turned by EXIF."
    folder.mkdir(); ramp = np.linspace(0, 1, 48 * 32).reshape(48, 32)
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(folder/'grey16.png')
    clear = np.zeros((48, 32, 4), np.uint8); clear[:24] = (255, 0, 0, 255); Image.fromarray(clear).save(folder/'clear.png')
    exif = Image.Exif(); exif[0x0112] = 6
    Image.fromarray((np.stack([ramp] * 3, -1) * 255).astype(np.uint8)).save(folder/'turned.jpg', exif=exif, quality=95)
    return sorted(folder.iterdir())

def test_every_part_reads_alike(pipe, tmp_path):
    for path in odd_pictures(tmp_path/'odd'):
        right = np.asarray(squared(read_image(path).image, 64).image).astype(float)
        as_bytes = lambda x: to_uint8(x).permute(1, 2, 0).numpy()
        seen = dict(
            pipeline=as_bytes(pipe.pictures(path)[0][0]), data=as_bytes(as_tensor(picture(path.read_bytes(), path.name), 64)),
            reconstruction=_read_square(path, 64), opened=as_bytes(pipe.pictures(Image.open(path))[0][0]),
        )
        for part, x in seen.items(): assert abs(x - right).mean() < 1, (part, path.name)

@pytest.mark.parametrize('odd', [np.nan, np.inf, 1.0001, 7., None])
def test_one_odd_value_does_not_make_a_picture_black(odd, tmp_path):
    a = np.tile(np.linspace(0, 1, 60, dtype=np.float32), (40, 1))
    if odd is not None: a[5, 5] = odd
    Image.fromarray(a).save(tmp_path/'float.tif')
    if odd is not None and not np.isfinite(odd):
        with pytest.raises(ValueError, match='float.tif: 1 of 2400 values'): read_image(tmp_path/'float.tif')
    else: assert abs(np.asarray(read_image(tmp_path/'float.tif').image).mean() - 127.5) < 2
