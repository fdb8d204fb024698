"""What a user of diffusers types: each call works as there, or its error names the argument and what to use instead."""
import copy, io, json, pickle, re, shutil, threading
from pathlib import Path
import spar.core  # noqa: F401  declares what diffusers may miss in torchvision, so it comes first
import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from PIL import Image
from spar.core import write_json
from spar.pipeline import SparOutput, SparPipeline
from spar.tokenizer.model import Tokenizer
from spar.unified.condition import Condition
from tiny import tiny_pipeline, tiny_unified

WORDS = ['a red star left of blue heart what colour is this ? make it green']
PARTS = ['condition', 'image_tokenizer', 'mllm', 'scheduler', 'tokenizer', 'transformer']

@pytest.fixture(scope='module')
def pipe(): return tiny_pipeline(WORDS)

@pytest.fixture(scope='module')
def folder(pipe, tmp_path_factory):
    pipe.save_pretrained(to := tmp_path_factory.mktemp('saved')/'pipe', dict(profile='smoke', seed=3))
    return to

@pytest.fixture(scope='module')
def photo(): return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))

def bytes_of(out): return [np.asarray(im).tobytes() for im in out.images]
def off(a, b): return max(np.abs(np.asarray(x).astype(int) - np.asarray(y)).max() for x, y in zip(a, b, strict=True))
def gen(seed): return torch.Generator().manual_seed(seed)


# loading and saving

def test_it_is_a_pipeline_of_diffusers(pipe, folder):
    assert isinstance(pipe, DiffusionPipeline) and sorted(pipe.components) == PARTS
    index = json.loads((folder/'model_index.json').read_text())
    assert index['_diffusers_version'] and index['_class_name'] == 'SparPipeline' and all(len(index[p]) == 2 for p in PARTS)
    assert index['record'] == dict(profile='smoke', seed=3) and '"image_tokenizer"' in repr(pipe) and ' at 0x' not in repr(pipe)

@pytest.mark.parametrize('load', [lambda f: SparPipeline.from_pretrained(f, 'cpu', 'no'), lambda f: DiffusionPipeline.from_pretrained(f),
                                  lambda f: SparPipeline.from_pretrained(str(f), 'cpu', low_cpu_mem_usage=True), lambda f: SparPipeline.from_pretrained(f, device_map=None)])
def test_a_saved_pipeline_gives_the_same_pixels(load, pipe, folder, photo):
    again = load(folder); again.precision = 'no'
    for call in (lambda p: p('a red star', 2, seed=3), lambda p: p.edit(photo, 'make it green', 2), lambda p: p.reconstruct(photo)):
        assert bytes_of(call(again)) == bytes_of(call(pipe))
    assert again.answer(photo, 'what colour is this ?') == pipe.answer(photo, 'what colour is this ?') and again.record['seed'] == 3

def test_components_load_alone(pipe, folder):
    for cls, name in ((Tokenizer, 'image_tokenizer'), (Condition, 'condition'), (SanaTransformer2DModel, 'transformer')):
        a, b = cls.from_pretrained(folder/name).state_dict(), getattr(pipe, name).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert type(diffusers.AutoModel.from_pretrained(str(folder), subfolder='image_tokenizer')) is Tokenizer
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    assert len(AutoTokenizer.from_pretrained(folder/'mllm')) == len(pipe.tokenizer) and AutoModelForImageTextToText.from_pretrained(folder/'mllm')

def test_state_names_are_those_of_training(pipe):
    names = set(pipe.condition.state_dict())
    assert 'queries' in names and {n.split('.')[0] for n in names} == {'queries', 'routing', 'connector'}
    assert {n.split('.')[0] for n in pipe.image_tokenizer.state_dict()} == {'encoder', 'streams', 'decoder'}

@pytest.mark.parametrize('name', ['image_tokenizer/config.json', 'condition/config.json', 'model_index.json'])
def test_unknown_keys_are_errors(name, pipe, tmp_path):
    pipe.save_pretrained(tmp_path/'p'); file = tmp_path/'p'/name
    write_json(file, json.loads(file.read_text()) | dict(sidee=64))
    for load in (SparPipeline, DiffusionPipeline):
        with pytest.raises(ValueError, match='sidee'): load.from_pretrained(tmp_path/'p')

@pytest.mark.parametrize('part', ['mllm/model.safetensors', *(f'{p}/diffusion_pytorch_model.safetensors' for p in ('image_tokenizer', 'condition', 'transformer')),
                                  *(f'{p}/config.json' for p in ('condition', 'image_tokenizer', 'mllm', 'transformer')), 'tokenizer/tokenizer.json', 'scheduler/scheduler_config.json', 'model_index.json'])
@pytest.mark.parametrize('damage', ['missing', 'cut'])
def test_damaged_models_name_the_part(folder, tmp_path, part, damage):
    shutil.copytree(folder, tmp_path/'pipe'); file = tmp_path/'pipe'/part
    file.unlink() if damage == 'missing' else file.write_bytes(file.read_bytes()[:40])
    with pytest.raises((ValueError, OSError), match=re.escape(part.split('/')[0]) + '(?s:.*)(dvc|make)'): SparPipeline.from_pretrained(tmp_path/'pipe', 'cpu')

def test_a_half_file_is_an_error(pipe, tmp_path):
    from safetensors.torch import load_file, save_file
    for part, file in (('mllm', 'model'), ('transformer', 'diffusion_pytorch_model'), ('condition', 'diffusion_pytorch_model'), ('image_tokenizer', 'diffusion_pytorch_model')):
        pipe.save_pretrained(tmp_path/part); path = tmp_path/part/part/f'{file}.safetensors'; state = load_file(path); state.pop(sorted(state)[0]); save_file(state, path, metadata=dict(format='pt'))
        with pytest.raises(ValueError, match=f'(?s){part}.*missing keys'): SparPipeline.from_pretrained(tmp_path/part, 'cpu')

@pytest.mark.parametrize('options,says', [(dict(variant='fp16'), 'fp16'), (dict(torch_dtyp=torch.bfloat16), 'torch_dtype'), (dict(torch_dtype='bfloat16'), 'torch.bfloat16'),
                                          (dict(use_safetensors=False), 'pickles'), (dict(device_map='nonsense'), 'nonsense'), (dict(device='cpu', device_map='balanced'), 'give one')])
def test_arguments_of_loading_are_never_ignored(options, says, folder):
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=says): SparPipeline.from_pretrained(folder, **options)

def test_variants(pipe, tmp_path, folder):
    pipe.save_pretrained(tmp_path/'p', variant='fp16')
    assert bytes_of(SparPipeline.from_pretrained(tmp_path/'p', 'cpu', 'no', variant='fp16')('a red star', 2)) == bytes_of(pipe('a red star', 2))

def test_the_hub_is_asked_for_a_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('HF_HUB_OFFLINE', '1'); monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(OSError, match='someone/spar-mini.*Hub'): SparPipeline.from_pretrained('someone/spar-mini')
    with pytest.raises(FileNotFoundError, match='make repro'): SparPipeline.from_pretrained('nowhere')

def test_push_to_hub_uploads_what_is_saved(pipe, monkeypatch, tmp_path):
    seen = {}
    def upload(self, folder, repo_id, **kw): seen.update(repo=repo_id, files=sorted(p.name for p in Path(folder).iterdir()))
    monkeypatch.setattr('diffusers.utils.hub_utils.PushToHubMixin._upload_folder', upload)
    class Repo: repo_id = 'someone/pipe'
    class Card:
        def save(self, path): Path(path).write_text('a card')
    monkeypatch.setattr('diffusers.utils.hub_utils.create_repo', lambda *a, **kw: Repo)
    for name in ('load_or_create_model_card', 'populate_model_card'): monkeypatch.setattr(f'diffusers.utils.hub_utils.{name}', lambda *a, **kw: Card())
    pipe.save_pretrained(tmp_path/'pipe', push_to_hub=True, repo_id='someone/pipe')
    assert seen['repo'] == 'someone/pipe' and {'model_index.json', *PARTS} <= set(seen['files']) and (tmp_path/'pipe/model_index.json').is_file()

def test_a_subclass_loads_as_itself(folder):
    class Mine(SparPipeline): pass
    assert type(Mine.from_pretrained(folder, 'cpu')) is Mine

def test_from_pipe_and_parameters(pipe):
    for again in (SparPipeline(**pipe.components, **pipe.parameters), SparPipeline.from_pipe(pipe)):
        again.precision = 'no'; assert bytes_of(again('a red star', 2)) == bytes_of(pipe('a red star', 2))

def test_pickles_are_never_written(pipe, tmp_path):
    for part in (pipe, pipe.image_tokenizer, pipe.condition):
        with pytest.raises(ValueError, match='safe_serialization'): part.save_pretrained(tmp_path/'x', safe_serialization=False)
    assert not (tmp_path/'x').exists()


# devices and types

def test_types(pipe, folder, photo):
    plain = pipe('a red star', 2).images
    for half in (SparPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, device='cpu'), SparPipeline.from_pretrained(folder, dtype=torch.bfloat16),
                 copy.deepcopy(pipe).to(torch.bfloat16), copy.deepcopy(pipe).to('cpu', torch.bfloat16), copy.deepcopy(pipe).to(dtype=torch.bfloat16)):
        assert half.dtype == torch.bfloat16 and all(p.dtype == torch.bfloat16 for m in half.components.values() if isinstance(m, torch.nn.Module) for p in m.parameters())
        assert off(half('a red star', 2).images, plain) < 24 and off(half.edit(photo, 'make it green', 2).images, pipe.edit(photo, 'make it green', 2).images) < 24
        assert off(half.reconstruct(photo).images, pipe.reconstruct(photo).images) < 24 and isinstance(half.answer(photo, 'what colour is this ?'), str)
    assert bytes_of(copy.deepcopy(pipe).to(torch.bfloat16).to(torch.float32)('a red star', 2)) != [], 'and back'
    assert off(copy.deepcopy(pipe).to(torch.float64)('a red star', 2).images, plain) <= 1
    mixed = SparPipeline.from_pretrained(folder, torch_dtype=dict(transformer=torch.bfloat16, default=torch.float32))
    assert mixed.transformer.dtype == torch.bfloat16 and mixed.condition.dtype == torch.float32 and off(mixed('a red star', 2).images, plain) < 24

def test_properties(pipe):
    assert pipe.dtype == torch.float32 and pipe.device.type == 'cpu' and isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    assert isinstance(pipe.transformer, SanaTransformer2DModel)
    pipe.enable_attention_slicing(); pipe.disable_attention_slicing()
    with pytest.raises(RuntimeError, match='accelerator'): copy.deepcopy(pipe).enable_model_cpu_offload()

def test_copies_and_threads_give_the_same_bytes(pipe):
    want = bytes_of(pipe('a red star', 2)); got = {}
    for again in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))): assert bytes_of(again('a red star', 2)) == want
    with torch.inference_mode(): assert bytes_of(pipe('a red star', 2)) == want
    threads = [threading.Thread(target=lambda k=k: got.update({k: bytes_of(pipe('a red star', 2))})) for k in range(6)]
    [t.start() for t in threads]; [t.join() for t in threads]
    assert [got[k] for k in range(6)] == [want] * 6


# one picture, alone and in a batch

@pytest.mark.parametrize('dtype,bound', [(torch.float32, 1), (torch.bfloat16, 24)])
def test_single_equals_batch(dtype, bound, pipe, photo):
    p, prompts = copy.deepcopy(pipe).to(dtype), ['a red star', 'a blue heart left of a red star', 'green']
    batch = p(prompts, 3, generator=[gen(k) for k in range(3)]).images; edits = p.edit([photo] * 3, prompts, 3, generator=[gen(k) for k in range(3)]).images
    for k, t in enumerate(prompts):
        assert off(p(t, 3, generator=gen(k)).images, batch[k:k + 1]) <= bound and off(p.edit(photo, t, 3, generator=[gen(k)]).images, edits[k:k + 1]) <= bound
    assert off(p(prompts, 3, generator=[gen(k) for k in range(3)], batch_size=2).images, batch) <= bound
    assert off(p(prompts, 3, batch_size=1).images, p(prompts, 3).images) <= bound
    assert off(p(prompts, 3, generator=gen(5), batch_size=2).images, p(prompts, 3, generator=gen(5)).images) <= bound, 'one generator over several batches'

def test_generators(pipe):
    two = pipe(['a red star'] * 2, 2, generator=[gen(0), gen(1)]); assert bytes_of(two)[0] != bytes_of(two)[1]
    with pytest.raises(ValueError, match='1 for 2'): pipe(['a red star'] * 2, 2, generator=[gen(0)])
    with pytest.raises(ValueError, match='2 for 4'): pipe(['a red star'] * 2, 2, generator=[gen(0)] * 2, num_images_per_prompt=2)
    with pytest.raises(TypeError, match='seed=7'): pipe('a red star', 2, generator=7)
    assert len(pipe('a red star', 2, num_images_per_prompt=3).images) == 3

@pytest.mark.parametrize('options,says', [(dict(num_inference_steps=True), 'num_inference_steps: True'), (dict(num_inference_steps=0), 'num_inference_steps: 0'), (dict(seed=1.7), 'seed: 1.7'), (dict(seed=-1), 'seed: -1'),
    (dict(seed=[1, 2]), r'seed: \[1, 2\]'), (dict(batch_size=0), 'batch_size: 0'), (dict(num_images_per_prompt=0), 'num_images_per_prompt: 0'), (dict(guidance_scale=float('nan')), 'guidance_scale: nan'), (dict(guidance_scale=-1), 'guidance_scale: -1'),
    (dict(height=512), 'height: 512.*64x64'), (dict(width=65), 'width: 65.*64x64'), (dict(output_type='png'), "output_type: unknown 'png'.*pil"), (dict(latents=torch.zeros(1, 3, 8, 8)), r'latents: \(1, 3, 8, 8\).*\(1, 16, 8, 8\)'),
    (dict(latents='noise'), 'latents: str'), (dict(negative_prompt='purple'), "negative_prompt: .*'purple'"), (dict(negative_prompt=['red'] * 2), 'negative_prompt: 2 for 1'), (dict(negative_prompt='red', guidance_scale=1), 'negative_prompt'),
    (dict(callback_on_step_end=3), 'callback_on_step_end'), (dict(callback_on_step_end_tensor_inputs=['x']), "unknown 'x'.*latents"), (dict(seed=1, generator=torch.Generator()), 'seed and generator'), (dict(image='http://x.org/a.png'), 'load_image'),
    (dict(image=np.zeros((64, 64, 3)), fit='stretch'), "fit: unknown 'stretch'.*crop, pad, squash") ])
def test_wrong_arguments_are_named(options, says, pipe):
    with pytest.raises((ValueError, TypeError), match=f'(?s){says}'): pipe('a red star', **{'num_inference_steps': 2, **options})

def test_unknown_arguments_are_named(pipe):
    with pytest.raises(TypeError, match='eta'): pipe('a red star', 2, eta=0.)
    with pytest.raises(TypeError, match='strength'): pipe.edit(Image.new('RGB', (64, 64)), 'make it green', strength=.5)

def test_numbers_of_numpy(pipe):
    assert bytes_of(pipe('a red star', np.int64(2), np.float32(4.5), seed=np.int64(0), batch_size=np.int32(3))) == bytes_of(pipe('a red star', 2))

@pytest.mark.parametrize('prompt', [np.array(['a red star']), iter(['a red star']), ('a red star',), 'a\u00a0red star', 'a red\u200b star', 'a red\nstar', ' a  red star '])
def test_prompts_that_are_read(prompt, pipe): assert bytes_of(pipe(prompt, 2)) == bytes_of(pipe('a red star', 2))

@pytest.mark.parametrize('prompt,error,says', [('\U0001f600', ValueError, 'know the word'), ('?!', ValueError, 'no word'), ('\u200b', ValueError, 'empty'), ({'a'}, TypeError, 'set'), (None, TypeError, 'NoneType'), (3, TypeError, 'int'), ('a \ud800', ValueError, 'Unicode')])
def test_prompts_that_are_not(prompt, error, says, pipe):
    with pytest.raises(error, match=f'prompt: .*{says}'): pipe(prompt, 2)


# outputs, latents, callbacks

def test_outputs(pipe, photo):
    pil = np.asarray(pipe('a red star', 2).images[0]) / 255
    a, t = pipe('a red star', 2, output_type='np').images, pipe('a red star', 2, output_type='pt').images
    assert a.shape == (1, 64, 64, 3) and t.shape == (1, 3, 64, 64) and np.abs(a[0] - pil).max() <= .5 / 255 + 1e-6 and np.abs(t[0].permute(1, 2, 0).numpy() - pil).max() <= .5 / 255 + 1e-6
    out = pipe('a red star', 2); assert isinstance(out, SparOutput) and out[0] is out.images and out['images'] is out.images
    assert np.asarray(pipe('a red star', 2, return_dict=False)[0][0]).tobytes() == bytes_of(out)[0]
    for kind, shape in (('np', (1, 64, 64, 3)), ('pt', (1, 3, 64, 64))): assert pipe.reconstruct(photo, output_type=kind).images.shape == shape

def test_latents_in_and_out(pipe):
    x0 = pipe('a red star', 2, output_type='latent').images
    assert x0.shape == (1, *pipe.size()) == (1, 16, 8, 8)
    from spar.images import to_pil
    assert [np.asarray(i).tobytes() for i in to_pil(pipe.decode(x0))] == bytes_of(pipe('a red star', 2))
    noise = torch.randn(1, 16, 8, 8, generator=gen(4)); assert bytes_of(pipe('a red star', 2, latents=noise)) == bytes_of(pipe('a red star', 2, generator=gen(4)))

def test_callbacks(pipe):
    seen = []
    def watch(p, i, t, tensors): seen.append((i, sorted(tensors))); assert p is pipe; return tensors
    names = ['latents', 'prompt_embeds', 'negative_prompt_embeds']
    assert bytes_of(pipe('a red star', 3, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names)) == bytes_of(pipe('a red star', 3))
    assert seen == [(k, sorted(names)) for k in range(3)]
    zero = pipe('a red star', 2, output_type='latent', callback_on_step_end=lambda p, i, t, d: dict(latents=torch.zeros_like(d['latents'])) if i == 1 else {})
    assert not zero.images.any()
    def stop(p, i, t, d): seen.append(i); p._interrupt = True
    seen.clear(); pipe('a red star', 5, callback_on_step_end=stop); assert seen == [0]
    assert bytes_of(pipe('a red star', 3)) == bytes_of(pipe('a red star', 3)), 'an interruption ends with its call'

def test_negative_prompts(pipe):
    plain = bytes_of(pipe('a red star', 2)); assert bytes_of(pipe('a red star', 2, negative_prompt='')) == plain == bytes_of(pipe('a red star', 2, negative_prompt=None))
    assert bytes_of(pipe('a red star', 2, negative_prompt='a blue heart')) != plain
    assert bytes_of(pipe(['a red star'] * 2, 2, negative_prompt=['a blue heart', '']))[0] == bytes_of(pipe(['a red star'] * 2, 2, negative_prompt='a blue heart'))[0]

def test_sizes_of_the_model_are_accepted(pipe): assert bytes_of(pipe('a red star', 2, height=64, width=64)) == bytes_of(pipe('a red star', 2))

def test_progress(pipe, capsys):
    pipe('a red star', 2); assert capsys.readouterr().err == '', 'no bar where nobody watches'
    p = copy.deepcopy(pipe); p.set_progress_bar_config(disable=False); p('a red star', 2); assert '2/2' in capsys.readouterr().err
    p.set_progress_bar_config(disable=True); p('a red star', 2); assert capsys.readouterr().err == ''


# pictures that come in

def test_ways_to_hand_over_a_picture(pipe, photo, tmp_path):
    photo.save(tmp_path/'p.png'); want = bytes_of(pipe.edit(photo, 'make it green', 2)); a = np.asarray(photo); t = torch.from_numpy(a / 255).permute(2, 0, 1)
    for image in (a, a / 255, t, t.float(), a[None], t[None], [a], io.BytesIO((tmp_path/'p.png').read_bytes()), (tmp_path/'p.png').read_bytes(), tmp_path/'p.png', str(tmp_path/'p.png'), open(tmp_path/'p.png', 'rb')):
        assert bytes_of(pipe.edit(image, 'make it green', 2)) == want
    assert want == bytes_of(pipe('make it green', 2, image=photo)) == bytes_of(pipe.edit(prompt='make it green', image=photo, num_inference_steps=2))
    with pytest.raises(TypeError, match='image'): pipe.edit(instruction='make it green')
    with pytest.raises(TypeError, match='instruction'): pipe.edit(photo)
    with pytest.raises(ValueError, match='x / 2'): pipe.edit(t * 2 - 1, 'make it green')

@pytest.mark.parametrize('fit', ['crop', 'pad', 'squash'])
def test_what_is_done_to_an_oblong_is_said(fit, pipe):
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 500, 3), dtype=np.uint8))
    for out in (pipe.edit(wide, 'make it green', 2, fit=fit), pipe('make it green', 2, image=wide, fit=fit), pipe.reconstruct(wide, fit=fit)): assert fit in out.notes[0] and '500x300' in out.notes[0]
    assert isinstance(pipe.answer(wide, 'what colour is this ?', fit=fit), str)
    assert len({bytes_of(pipe.reconstruct(wide, fit=f))[0] for f in ('crop', 'pad', 'squash')}) == 3


# schedulers

def test_two_schedulers_agree(pipe):
    "Of random weights, in shares of the latent's mean size: 1 to 2 % apart at 20 steps, below 0.4 % at 640; in pixels less than half a grey level."
    euler = copy.deepcopy(pipe); euler.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    def distance(steps):
        a, b = (p('a red star', steps, 1., output_type='latent').images for p in (euler, pipe))
        assert (pipe.decode(a) - pipe.decode(b)).abs().max() * 127.5 < .5
        return ((a - b).abs().mean() / b.abs().mean()).item()
    far, near = distance(20), distance(640); print(far, near)
    assert near < .004 and near < far / 4, (far, near)
    assert json.loads(euler.to_json_string())['scheduler'] == ['diffusers', 'FlowMatchEulerDiscreteScheduler']

def test_a_scheduler_is_saved_and_loaded(pipe, tmp_path):
    p = copy.deepcopy(pipe); p.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0); p.save_pretrained(tmp_path/'p')
    again = SparPipeline.from_pretrained(tmp_path/'p', 'cpu', 'no')
    assert type(again.scheduler) is FlowMatchEulerDiscreteScheduler and bytes_of(again('a red star', 2)) == bytes_of(p('a red star', 2))
    assert any('shift 2' in n and 'trained with 1' in n for n in again('a red star', 2).notes) and not pipe('a red star', 2).notes

def test_a_condition_at_the_width_of_the_transformer(pipe, tmp_path):
    from spar.backbones.sana import mini_sana
    from spar.unified.model import Unified, UnifiedConfig
    cfg = UnifiedConfig.from_dict(dict(condition=dict(queries=3, layers=1, projection='linear'), alignment=dict(kind='none')))
    unified = Unified(pipe.opened_mllm, pipe.image_tokenizer, mini_sana(text_dim=24, layers=2, heads=2, head_dim=16), cfg)
    linear = SparPipeline.from_unified(unified, 'no'); linear.save_pretrained(tmp_path/'p')
    assert bytes_of(SparPipeline.from_pretrained(tmp_path/'p', 'cpu', 'no')('a red star', 2)) == bytes_of(linear('a red star', 2)) != bytes_of(pipe('a red star', 2))
    pipe.opened_mllm      # the fixture's condition reads it again

@pytest.mark.parametrize('reference', ['features', 'channels', 'tokens'])
def test_edits_see_their_reference_as_in_training(reference, tmp_path):
    "The pipeline edits as `Unified.sample` does, saved and loaded too, and honours the reference's own guidance."
    model, x = tiny_unified(WORDS, dict(reference=reference)), torch.rand(1, 3, 64, 64) * 2 - 1
    if reference == 'channels':
        with torch.no_grad(): model.transformer.patch_embed.proj.weight[:, 16:] += .1
    SparPipeline.from_unified(model, precision='no').save_pretrained(tmp_path/'p')
    pipe, drawn = SparPipeline.from_pretrained(tmp_path/'p', device='cpu', precision='no'), {}
    for scale in (1., 2.):
        kw = dict(num_inference_steps=2, guidance_scale=3., image_guidance_scale=scale)
        drawn[scale] = pipe.sample(['make it green'], x, **kw)
        assert torch.allclose(drawn[scale].clamp(-1, 1), model.sample(['make it green'], x, **kw), atol=1e-4)
    assert not torch.allclose(drawn[1.], drawn[2.], atol=1e-3)
    assert not torch.allclose(drawn[1.], pipe.sample(['make it green'], -x, num_inference_steps=2, guidance_scale=3.), atol=1e-3)
    with pytest.raises(ValueError, match='image_guidance_scale: 2.0, without effect'): pipe('a red star', image_guidance_scale=2.)

def test_an_edit_that_sets_no_image_guidance_has_that_of_the_model(tmp_path):
    model, x = tiny_unified(WORDS, dict(reference='features')), torch.rand(1, 3, 64, 64) * 2 - 1
    SparPipeline.from_unified(model, precision='no', image_guidance=2.).save_pretrained(tmp_path/'p')
    pipe, kw = SparPipeline.from_pretrained(tmp_path/'p', device='cpu', precision='no'), dict(num_inference_steps=2)
    by_default, one, two = (pipe.sample(['make it green'], x, **kw, image_guidance_scale=s) for s in (None, 1., 2.))
    assert pipe.config.image_guidance == 2 and torch.equal(by_default, two) and not torch.equal(by_default, one)
    assert SparPipeline.from_unified(model).config.image_guidance == model.cfg.flow.image_guidance == 1
    pipe('a red star', 2)       # a generation has no image to be guided by
    with pytest.raises(ValueError, match='image_guidance: -1'): SparPipeline.from_unified(model, image_guidance=-1)

def test_other_schedulers_say_what_to_use(pipe):
    p = copy.deepcopy(pipe); p.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match='DDIMScheduler.*FlowMatchEuler'): p('a red star', 2)

def test_one_step(pipe):
    for scheduler in (pipe.scheduler, FlowMatchEulerDiscreteScheduler()):
        p = copy.deepcopy(pipe); p.scheduler = scheduler; assert len(p('a red star', 1).images) == 1


# parts that may be absent, folders of earlier formats

def test_optional_components(pipe, folder, photo, tmp_path):
    lean = SparPipeline.from_pretrained(folder, 'cpu', 'no', transformer=None, condition=None, mllm=None)
    assert bytes_of(lean.reconstruct(photo)) == bytes_of(pipe.reconstruct(photo))
    with pytest.raises(ValueError, match='mllm, condition, transformer'): lean('a red star', 2)
    lean.save_pretrained(tmp_path/'lean'); again = SparPipeline.from_pretrained(tmp_path/'lean', 'cpu', 'no')
    assert again.transformer is None and bytes_of(again.reconstruct(photo)) == bytes_of(pipe.reconstruct(photo)) and not (tmp_path/'lean/transformer').exists()

def old_folder(pipe, to, version):
    "What the formats 0 and 1 wrote."
    from safetensors.torch import save_file
    from spar.backbones.mllm import save_mllm
    stamp, plain = {} if version == 0 else dict(format_version=1), lambda sd: {k: v.contiguous() for k, v in sd.items()}
    save_mllm(pipe.opened_mllm, to/'mllm', torch.float32)
    (to/'image_tokenizer').mkdir(); (to/'unified').mkdir()
    write_json(to/'model_index.json', dict(_class_name='SparPipeline', parts=['mllm', 'image_tokenizer', 'unified'], record=dict(seed=3), **stamp))
    write_json(to/'image_tokenizer/config.json', {**pipe.image_tokenizer.cfg.to_dict(), **stamp}); save_file(plain(pipe.image_tokenizer.state_dict()), to/'image_tokenizer/model.safetensors')
    config = dict(condition=pipe.condition.cfg.to_dict(), alignment=dict(kind='self', block=1, hidden=16), flow=dict(shift=1.0), latent='z_f')
    write_json(to/'unified/config.json', {**config, **stamp}); save_file({f'condition.{k}': v for k, v in plain(pipe.condition.state_dict()).items()}, to/'unified/model.safetensors')
    pipe.transformer.save_pretrained(to/'unified/transformer')
    return to

@pytest.mark.parametrize('version', [0, 1])
def test_folders_of_earlier_formats_load(version, pipe, tmp_path, photo):
    old = old_folder(pipe, tmp_path, version); again = SparPipeline.from_pretrained(old, 'cpu', 'no')
    assert bytes_of(again('a red star', 2)) == bytes_of(pipe('a red star', 2)) and bytes_of(again.edit(photo, 'make it green', 2)) == bytes_of(pipe.edit(photo, 'make it green', 2)) and again.record == dict(seed=3)
    with pytest.raises(ValueError, match='SparPipeline.from_pretrained'): DiffusionPipeline.from_pretrained(old)
    with pytest.raises(ValueError, match='mllm='): Tokenizer.from_pretrained(old/'image_tokenizer')

def test_a_condition_needs_its_language_model(pipe, folder):
    alone = Condition.from_pretrained(folder/'condition')
    with pytest.raises(RuntimeError, match='attach'): alone(['a red star'])
    assert torch.equal(alone.attach(pipe.opened_mllm)(['a red star']).tokens, pipe.condition(['a red star']).tokens)

def test_old_way_to_make_one_says_what_to_use(pipe):
    with pytest.raises(TypeError, match='from_unified'): SparPipeline(pipe.opened_mllm)
