"""What diffusers, transformers and lpips compute, and what our wrappers compute: the same weights, the same inputs, one number and its tolerance a line (`pytest -s`)."""
import contextlib, copy
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from PIL import Image
from spar.core import freeze, normal
from spar.backbones.dcae import DCAE, load_dcae, mini_dcae, save_dcae
from spar.backbones.mllm import IMAGENET_MEAN, IMAGENET_STD, load_mllm, mini_mllm, MLLM, pad_left, save_mllm
from spar.backbones.perceptual import PerceptualMini, PerceptualVGG
from spar.backbones.sana import flow_scheduler, load_sana, mini_sana, mini_text_encoder, save_sana, Text2Image
from spar.backbones.words import make_tokenizer
from spar.images import from_pil, squared
from spar.mini.sana import draw_with_sana
from spar.scale.models.parts import recipe
from spar.scale.models.random import gemma_like
from spar.unified.flow import _solver, both_conditions, FlowConfig, guided_velocity, sample, velocity
from spar.unified.layers import tap
from spar.unified.model import Unified, UnifiedConfig
from conftest import ROOT
from tiny import tiny_unified
import lpips, torchvision
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from diffusers.image_processor import PixArtImageProcessor
from tokenizers.processors import TemplateProcessing
from torchvision.models.vgg import cfgs, make_layers
from transformers import Gemma2Config, Gemma2Model, GotOcr2ImageProcessor, InternVLForConditionalGeneration
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

WORDS = ['a red green blue heart star on the sky what colour is this there how many ? yes no one two']
SCALE = 0.41407          # of the published autoencoder
TOLERANCE = 2e-5         # of fp32, relative to the largest number: sums in another order, other kernels, channels last


def difference(ours, theirs) -> float:
    "The largest difference, relative to the largest number of the reference."
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())

def same(what: str, ours, theirs, tolerance: float = TOLERANCE):
    "Print the difference beside its tolerance. Numbers that hardly vary would agree with anything."
    d = difference(ours, theirs)
    print(f'{what:64s} {d:.1e}  (tolerance {tolerance:.0e})')
    assert theirs.isfinite().all() and theirs.float().std() > 1e-3 * theirs.float().abs().max(), f'{what}: the reference says nothing'
    assert d <= tolerance, f'{what}: {d:.2e} > {tolerance:.0e}'

@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        yield

def shaken(module):
    "Moved away from its initial values, so that biases, norms and gates which begin at 0 or 1 count as well; never trained."
    for p in module.parameters(): p.add_(.05 * torch.randn_like(p) * (1 + p.abs()))
    return freeze(module)

def photos(*sizes) -> list:
    "Smooth colours with noise on top."
    rng = np.random.default_rng(0)
    def one(w, h):
        coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
        return Image.fromarray(np.clip(np.asarray(coarse) + rng.normal(0, 20, (h, w, 3)), 0, 255).astype(np.uint8))
    return [one(*s) for s in sizes]


# the pixel autoencoder

def efficient_dcae() -> AutoencoderDC:
    "Small, with the blocks that the published DC-AE has and the miniature has not: linear attention, rms norms, f16."
    levels = dict(encoder_block_out_channels=[16, 16, 32, 32, 32], decoder_block_out_channels=[16, 16, 32, 32, 32])
    kinds = ['ResBlock', 'ResBlock', 'EfficientViTBlock', 'EfficientViTBlock', 'EfficientViTBlock']
    scales = [[], [], [], [5], [5]]
    return AutoencoderDC(in_channels=3, latent_channels=8, attention_head_dim=8, encoder_block_types=kinds, decoder_block_types=kinds, **levels,
        encoder_layers_per_block=[0, 1, 1, 1, 1], decoder_layers_per_block=[0, 1, 1, 1, 1], encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales,
        downsample_block_type='Conv', upsample_block_type='interpolate', decoder_norm_types='rms_norm', decoder_act_fns='silu', scaling_factor=SCALE)

@pytest.mark.parametrize('build', [mini_dcae, efficient_dcae])
def test_autoencoder(build, tmp_path):
    save_dcae(DCAE(shaken(build())), tmp_path/'dcae', torch.float32)
    theirs, ours = AutoencoderDC.from_pretrained(tmp_path/'dcae').eval(), load_dcae(tmp_path/'dcae')
    x = from_pil(photos((64, 64), (64, 64)))
    z = theirs.encode(x).latent
    same(f'{build.__name__}: latents', ours.encode(x), z)
    same(f'{build.__name__}: pictures', ours.decode(z), theirs.decode(z).sample)
    same(f'{build.__name__}: there and back', ours(x), theirs(x).sample)
    assert ours.factor == x.shape[-1] // z.shape[-1] and ours.channels == z.shape[1] and ours.scale == theirs.config.scaling_factor

def test_pixels_of_the_autoencoder():
    p = PixArtImageProcessor(vae_scale_factor=32)
    pictures = photos((64, 64), (64, 64))
    x = from_pil(pictures)
    same('PIL -> [-1, 1]', x, p.preprocess(pictures), 1e-6)
    assert [np.array(a).tolist() for a in p.postprocess(x, 'pil')] == [np.array(a).tolist() for a in pictures]


# the multimodal model

@pytest.fixture(params=[dict(), dict(patch=4, downsample=.5)], ids=['every patch a token', '2x2 patches a token'])
def mllm(request, tmp_path):
    "(ours, transformers' own, processor), from one folder."
    sizes = dict(dim=32, layers=4, heads=4, ffn=64, vision_dim=32, vision_layers=2)
    save_mllm(MLLM(*(lambda hf, tk: (shaken(hf), tk))(*mini_mllm(WORDS, **sizes, **request.param))), tmp_path/'mllm', torch.float32)
    ours = load_mllm(tmp_path/'mllm')
    theirs = InternVLForConditionalGeneration.from_pretrained(tmp_path/'mllm', tie_word_embeddings=False).eval()
    size = dict(height=64, width=64)
    images = GotOcr2ImageProcessor(size=size, crop_to_patches=False, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD))
    return ours, theirs, images

QUESTIONS = ['what colour is this star ?', 'how many ?', 'is there a heart on the sky ?']

def test_moments_of_pixels_are_those_of_the_published_processor(monkeypatch):
    monkeypatch.chdir(ROOT)
    for profile in ('spar-1b', 'spar-3b'):
        stated = recipe(profile)['mllm']['processor']
        assert (tuple(stated['image_mean']), tuple(stated['image_std'])) == (IMAGENET_MEAN, IMAGENET_STD)
        assert (tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)) == (IMAGENET_MEAN, IMAGENET_STD)

def test_pictures_and_features(mllm):
    ours, theirs, processor = mllm
    pictures = photos((64, 64), (64, 64))
    pixels = processor(pictures, return_tensors='pt').pixel_values
    same('pixel values', ours.encoder.pixels(from_pil(pictures)), pixels, 1e-6)
    f_v = theirs.get_image_features(pixels).pooler_output
    same('tower and projector', ours.encode(from_pil(pictures)), f_v.reshape(2, -1, f_v.shape[-1]))

def test_pictures_of_another_size():
    """Read as our data sets and the pipeline read them, a picture differs from the processor's by one grey level at most (Pillow and torchvision round on their own).
    A tensor of another size is resized by the encoder in fp32: not rounded and, where bicubic overshoots, not cut to the range."""
    processor = GotOcr2ImageProcessor(size=dict(height=64, width=64), crop_to_patches=False, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD))
    enc = MLLM(*mini_mllm(WORDS, dim=32, layers=1, vision_dim=32, vision_layers=1)).encoder
    grey = lambda a, b: (a - b).abs().mul(enc.std * 255)
    for size in [(100, 100), (160, 120), (40, 40)]:
        pictures = photos(size, size)
        theirs = processor(pictures, return_tensors='pt').pixel_values
        read = grey(enc.pixels(from_pil([squared(p, 64, 'squash').image for p in pictures])), theirs)
        print(f'{size[0]}x{size[1]} -> 64x64, read by us: {read.max():.2f} grey levels at most, {read.mean():.4f} on average  (tolerance 1)')
        assert read.max() < 1.01 and read.mean() < .05
        if size[0] == size[1] > 64:
            resized = grey(enc.pixels(from_pil(pictures)), theirs)
            print(f'  resized by the encoder: {resized.max():.2f} at most, {resized.mean():.2f} on average  (tolerance 4)')
            assert resized.max() < 4 and resized.mean() < .5

def batch_of(ours) -> tuple:
    "Ids and mask of questions about pictures, of three lengths."
    ids, mask = pad_left([ours.chat_ids(q, True) for q in QUESTIONS], ours.pad_token)
    assert len(set(mask.sum(1).tolist())) == 3
    return ids, mask

def spliced(ours, ids, pictures):
    return ours.splice(ours.embed(ids), ids == ours.image_token, ours.encode(from_pil(pictures)))

def test_whole_forward_with_left_padding(mllm):
    ours, theirs, processor = mllm
    pictures, (ids, mask) = photos(*[(64, 64)] * 3), batch_of(ours)
    pixels, real = processor(pictures, return_tensors='pt').pixel_values, mask.bool()
    want = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels, output_hidden_states=True)
    embeds = spliced(ours, ids, pictures)
    for name, states in dict(states=ours.states(embeds, mask, [2, 4], raw=True), tap=tap(ours.lm, embeds, real, [2, 4], raw=True)).items():
        same(f'{name}: layer 2, padded on the left', states[0][real], want.hidden_states[2][real])
        same(f'{name}: logits', ours.hf.lm_head(ours.lm.norm(states[1]))[real], want.logits[real])
    last = ours.states(embeds, mask, [4])[0]
    same('states: last layer, normed', last[real], want.hidden_states[-1][real])
    for b, n in enumerate(mask.sum(1).tolist()):      # without padding, each by itself
        alone = theirs(input_ids=ids[b:b + 1, -n:], pixel_values=pixels[b:b + 1]).logits[0]
        same(f'logits of row {b}, against the row without its padding', ours.hf.lm_head(last[b, -n:]), alone)
    other = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels.flip(0)).logits
    assert difference(other[real], want.logits[real]) > 100 * TOLERANCE, 'the pictures change nothing, so this test says nothing'

def test_answers(mllm):
    ours, theirs, processor = mllm
    pictures, (ids, mask) = photos(*[(64, 64)] * 3), batch_of(ours)
    pixels = processor(pictures, return_tensors='pt').pixel_values
    eos = ours.hf.config.text_config.eos_token_id
    told = theirs.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=8, do_sample=False, eos_token_id=eos, pad_token_id=ours.pad_token)
    want = [t.strip() for t in ours.tokenizer.batch_decode(told[:, ids.shape[1]:], skip_special_tokens=True)]
    with pytest.warns(match='answers cut') if not (told == eos).any(1).all() else contextlib.nullcontext():
        got = ours.answer(from_pil(pictures), QUESTIONS)
    print(got)
    assert got == want and len(set(got)) > 1


# the transformer, its text encoder and its sampler

PROMPTS = ['a red star on the sky', 'two blue heart']

def base_of(tmp_path, shift: float = 3., tk=None, text=None) -> tuple:
    "(our base, our autoencoder, diffusers' SanaPipeline), from the same folders; the scale is the one number of the autoencoder."
    tk = tk or make_tokenizer(WORDS)
    dit = shaken(mini_sana(text_dim=24, layers=2, heads=2, head_dim=16))
    text = text or mini_text_encoder(tk, dim=24, layers=1)
    base = Text2Image(dit, shaken(text), tk, flow_scheduler(shift), std=1 / SCALE)
    save_sana(base, tmp_path/'sana', torch.float32)
    ae = mini_dcae(channels=(16, 16, 32, 32), enc_layers=(0, 1, 1, 1), dec_layers=(0, 1, 1, 1))
    ae.register_to_config(scaling_factor=SCALE)
    save_dcae(DCAE(shaken(ae)), tmp_path/'dcae', torch.float32)
    ours, dcae = load_sana(tmp_path/'sana', text_encoder=True), load_dcae(tmp_path/'dcae')
    part = lambda cls, name: cls.from_pretrained(tmp_path/name)
    pipe = SanaPipeline(copy.deepcopy(ours.tokenizer), copy.deepcopy(ours.text_encoder), part(AutoencoderDC, 'dcae').eval(),
        part(SanaTransformer2DModel, 'sana/transformer').eval(), part(DPMSolverMultistepScheduler, 'sana/scheduler'))
    pipe.set_progress_bar_config(disable=True)
    return ours, dcae, pipe

def conditions(pipe, prompts) -> dict:
    "What the pipeline attends to, padded on the right to 300; the miniature's tokenizer adds no <bos>, so it stands in the text."
    e, m, n, k = pipe.encode_prompt([f'<bos> {p}' for p in prompts], True, negative_prompt='<bos>', device='cpu', complex_human_instruction=None)
    return dict(prompt_embeds=e, prompt_attention_mask=m, negative_prompt_embeds=n, negative_prompt_attention_mask=k)

def drawn(pipe, given: dict, noise, steps: int, guidance: float, exact: bool, output: str = 'latent'):
    "The pipeline's own loop; `exact`: the time of a call is 1000 sigma as it is, not cut to a whole number."
    def with_exact_time(module, args, kwargs):
        i = pipe.scheduler.step_index or 0
        return args, kwargs | dict(timestep=torch.full_like(kwargs['timestep'], 0, dtype=torch.float32) + 1000 * pipe.scheduler.sigmas[i])
    hook = pipe.transformer.register_forward_pre_hook(with_exact_time, with_kwargs=True) if exact else None
    try:
        return pipe(None, None, steps, guidance_scale=guidance, height=64, width=64, latents=noise, use_resolution_binning=False, output_type=output, **given)[0]
    finally:
        if hook: hook.remove()

def test_one_call_of_the_transformer(tmp_path):
    ours, _, pipe = base_of(tmp_path)
    given, x = conditions(pipe, PROMPTS), torch.randn(2, 16, 8, 8)
    pipe.scheduler.set_timesteps(20)
    t = pipe.scheduler.timesteps[7].expand(4) * pipe.transformer.config.timestep_scale
    e, m = (torch.cat([given['negative_' + n], given[n]]) for n in ('prompt_embeds', 'prompt_attention_mask'))
    v_0, v = pipe.transformer(torch.cat([x, x]), encoder_hidden_states=e, encoder_attention_mask=m, timestep=t, return_dict=False)[0].chunk(2)
    sigma, (tokens, mask) = t[:2] / 1000, ours.encode_text(PROMPTS)
    same('Text2Image: velocity', ours(x, sigma, tokens, mask), v)
    same('velocity()', velocity(ours.transformer, x, sigma, tokens, mask), v)
    none = [a.repeat(2, *[1] * (a.dim() - 1)) for a in ours.encode_text([''])]
    both = both_conditions((tokens, mask), none)
    same('guided_velocity()', guided_velocity(ours.transformer, x, sigma, *both, 4.5), v_0 + 4.5 * (v - v_0))
    with torch.enable_grad(): same('velocity() where a gradient is needed', velocity(ours.transformer, x, sigma, tokens, mask).detach(), v)
    assert difference(v_0, v) > 100 * TOLERANCE, 'the prompt changes nothing, so this test says nothing'

@pytest.mark.parametrize('guidance', [4.5, 1.])
@pytest.mark.parametrize('shift', [1., 3.])
def test_sampling(shift, guidance, tmp_path):
    ours, dcae, pipe = base_of(tmp_path, shift)
    assert ours.shift == shift and pipe.transformer.config.timestep_scale == 1
    noise, flow = torch.randn(2, 16, 8, 8), FlowConfig(shift=shift, guidance=guidance)
    x0 = sample(ours.transformer, ours.encode_text(PROMPTS), ours.encode_text([''] * 2), noise, flow)
    given = conditions(pipe, PROMPTS)
    same(f'20 steps, shift {shift:g}, guidance {guidance:g}: latent', x0, drawn(pipe, given, noise, 20, guidance, True), 1e-4)
    pictures = drawn(pipe, given, noise, 20, guidance, True, 'pt')
    same(f'20 steps, shift {shift:g}, guidance {guidance:g}: picture', dcae.decode(ours.denormalise(x0)).clamp(-1, 1) * .5 + .5, pictures, 1e-4)
    cut = difference(x0, drawn(pipe, given, noise, 20, guidance, False))
    print(f'  with times cut to whole numbers, as the pipeline has them: {cut:.1e}')
    assert 1e-5 < cut < 2e-2

def test_times_and_sigmas(tmp_path):
    "The one difference of the loop: the scheduler states its times as whole numbers below 1000 sigma, and we give 1000 sigma itself."
    _, _, pipe = base_of(tmp_path)
    for steps in (2, 20, 50):
        pipe.scheduler.set_timesteps(steps)
        s = _solver(FlowConfig(shift=3.), steps)
        assert torch.equal(s.sigmas, pipe.scheduler.sigmas) and torch.equal(s.timesteps, pipe.scheduler.timesteps)
        lost = 1000 * s.sigmas[:-1].double() - s.timesteps
        print(f'{steps} steps: cut by at most {lost.max():.3f}')
        assert -1e-3 < lost.min() and lost.max() < 1

def test_base_draws(tmp_path):
    "The control of the miniature, from prompt to picture."
    ours, dcae, pipe = base_of(tmp_path, 1.)
    flow = FlowConfig(shift=1., steps=5)
    pictures = drawn(pipe, conditions(pipe, PROMPTS), normal((16, 8, 8), 0, 'draw', range(2)), 5, flow.guidance, True, 'pt')
    same('draw_with_sana', draw_with_sana(ours, dcae, PROMPTS, flow) * .5 + .5, pictures, 1e-4)

def test_prompts_of_a_large_base(tmp_path):
    "Gemma's own classes: <bos>, lower case, at most 300 tokens, and states that do not depend on the side of the padding."
    tk = gemma_like(600)
    tk.backend_tokenizer.post_processor = TemplateProcessing(single='<bos> $A', special_tokens=[('<bos>', tk.bos_token_id)])      # as the published file
    text = Gemma2Model(Gemma2Config(vocab_size=len(tk), hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=12, pad_token_id=tk.pad_token_id, sliding_window=16))
    ours, _, pipe = base_of(tmp_path, tk=tk, text=text)
    texts = ['a red star', '', '  A Red Star, \u201eÜber\u201c dem MOND \n', 'a red star on the blue sky and ' * 40]
    e, m, *_ = pipe.encode_prompt(texts, False, device='cpu', complex_human_instruction=None)
    tokens, mask = ours.encode_text(texts)
    ids, _ = ours.captions.ids(texts)
    theirs = pipe.tokenizer([t.lower().strip() for t in texts], max_length=300, truncation=True)['input_ids']
    assert len(theirs[3]) == 300 and theirs[0][0] == tk.bos_token_id
    for b, text in enumerate(texts):
        assert ids[b][mask[b].bool()].tolist() == theirs[b], repr(text[:40])
        same(f'states of {text[:24]!r}, {len(theirs[b])} tokens', tokens[b][mask[b].bool()], e[b][m[b].bool()])
        alone = ours.text_encoder(input_ids=torch.tensor([theirs[b]])).last_hidden_state[0]
        same('  the same without padding', tokens[b][mask[b].bool()], alone)


# the unified model

def unified_of(**changes) -> Unified:
    m = tiny_unified(WORDS)
    shaken(m.transformer)
    return freeze(Unified(m.mllm, m.image_tokenizer, m.transformer, UnifiedConfig.from_dict(m.cfg.to_dict() | changes.pop('cfg', {})), **changes))

def pipeline_around(transformer, scheduler, dcae=None) -> SanaPipeline:
    pipe = SanaPipeline(None, None, dcae or mini_dcae(channels=(16, 16, 32, 32), enc_layers=(0, 1, 1, 1), dec_layers=(0, 1, 1, 1)), transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe

def test_sampling_with_our_condition():
    "SanaPipeline is given the condition's tokens as its prompt: the same latent, and the tokenizer decodes it."
    model = unified_of()
    cond, empty = model.condition(PROMPTS), model.condition([''] * 2)
    T = max(cond.mask.shape[1], empty.mask.shape[1])
    left = lambda c: (torch.nn.functional.pad(c.tokens, (0, 0, T - c.tokens.shape[1], 0)), torch.nn.functional.pad(c.mask.long(), (T - c.mask.shape[1], 0)))
    (e, m), (n, k) = left(cond), left(empty)
    given = dict(prompt_embeds=e, prompt_attention_mask=m, negative_prompt_embeds=n, negative_prompt_attention_mask=k)
    x0 = drawn(pipeline_around(model.transformer, flow_scheduler(model.cfg.flow.shift)), given, normal((16, 8, 8), 0, 'sample', range(2)), 5, 4.5, True)
    want = model.image_tokenizer.decode(model.image_tokenizer.from_dit(x0)).clamp(-1, 1)
    same('Unified.sample', model.sample(PROMPTS, num_inference_steps=5, guidance_scale=4.5), want, 1e-4)

def test_native_latents():
    "With latent `dcae`, what enters the transformer is what a SANA pipeline decodes: latents times the scaling factor."
    ae = mini_dcae(channels=(16, 16, 32, 32), enc_layers=(0, 1, 1, 1), dec_layers=(0, 1, 1, 1))
    ae.register_to_config(scaling_factor=SCALE)
    dcae, x = DCAE(shaken(ae)), from_pil(photos((64, 64), (64, 64)))
    base = Text2Image(mini_sana(), std=1 / SCALE)      # as `latent_stats` reads it of a public folder
    model = unified_of(dcae=dcae, cfg=dict(latent='dcae'))
    model.image_tokenizer.measure(dcae, [dict(image=x)], base.mean, 1 / base.std)
    z = ae.encode(x).latent * ae.config.scaling_factor
    same('Unified.native', model.native(x), z)
    same('Text2Image.normalise', base.normalise(dcae.encode(x)), z)
    same('Unified.decode', model.decode(z), ae.decode(z / ae.config.scaling_factor).sample)


# the perceptual distance

@pytest.mark.parametrize('kind', ['vgg', 'squeeze'])
def test_lpips(kind, monkeypatch, tmp_path):
    "The package fills its networks from torchvision; here torchvision hands out our weights."
    features = shaken(make_layers(cfgs['D']) if kind == 'vgg' else torchvision.models.squeezenet1_1().features)
    name = dict(vgg='vgg16', squeeze='squeezenet1_1')[kind]
    if kind == 'vgg':
        torch.save({f'features.{k}': v for k, v in features.state_dict().items()}, tmp_path/'vgg16.pth')
        ours = PerceptualVGG(tmp_path/'vgg16.pth')
    else: ours = PerceptualMini(features.state_dict())
    asked = []
    monkeypatch.setattr(lpips.pretrained_networks.tv, name, lambda pretrained: asked.append(pretrained) or SimpleNamespace(features=copy.deepcopy(features)))
    theirs = lpips.LPIPS(net=kind, lpips=kind == 'vgg', verbose=False).eval()
    assert asked == [True], 'the package must have taken these weights for the pretrained ones'
    x, y = torch.rand(3, 3, 64, 64) * 2 - 1, torch.rand(3, 3, 64, 64) * 2 - 1
    y[0] = .9 * x[0]
    same(f'LPIPS of {kind}', ours.to(memory_format=torch.channels_last)(x, y), theirs(x, y).flatten())
