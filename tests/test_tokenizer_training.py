"""What a loss weighs, what decays, what a stage refuses, and what may be loaded: on the real classes, small or without memory."""
import copy, json
import pytest, torch
from torch import nn
from spar.backbones.dcae import DCAE, mini_dcae
from spar.backbones.mllm import MLLM, mini_mllm
from spar.backbones.perceptual import PerceptualMini
from spar.backbones.sana import mini_sana, mini_text_encoder, Text2Image
from spar.core import freeze
from spar.evaluation import metrics, reconstruction, tables
from spar.mini.sana import SanaObjective
from spar.running.profiles import complete
from spar.scale.models.parts import whole_model
from spar.tokenizer import adversary, losses, texture, training
from spar.tokenizer.model import new_tokenizer
from spar.training.optimizers import decayed, Muon, param_groups
from spar.unified.flow import FlowConfig
from spar.unified.model import Unified, UnifiedConfig
from spar.unified.training import StageConfig, UnifiedObjective
from conftest import ROOT

TOKENIZER, UNIFIED = ('tokenizer_1_init', 'tokenizer_2_decoder', 'tokenizer_3_encoder'), ('unified_1_connector', 'unified_2_joint', 'unified_3_sft')
nan = float('nan')

@pytest.fixture(autouse=True)
def at_root(monkeypatch): monkeypatch.chdir(ROOT)

@pytest.fixture(scope='module')
def parts():
    torch.manual_seed(0)
    mllm = freeze(MLLM(*mini_mllm('a red star'.split(), dim=32, layers=4, heads=4, ffn=64, vision_dim=32, vision_layers=2)))
    dcae = freeze(DCAE(mini_dcae(channels=(16, 16, 32, 32), enc_layers=(0, 1, 1, 1), dec_layers=(0, 1, 1, 1))))
    return mllm, dcae, PerceptualMini()

def tokenizer(parts): return new_tokenizer(*parts[:2], dict(layers=1, heads=2, blocks=1))

def objectives(parts):
    "The objectives of the six stages and of the two controls, with what the miniature's profile switches on."
    mllm, dcae, lpips = parts
    of = lambda name, key: complete(name, 'mini')[key]
    for name in TOKENIZER:
        cfg = training.ReconstructionLoss.from_dict(of(name, 'loss'))
        yield name, training.TokenizerObjective(tokenizer(parts), cfg, lpips, dcae, mllm.encoder)
    yield 'dcae_tuned', training.AutoencoderObjective(copy.deepcopy(dcae), training.PixelLoss.from_dict(of('dcae_tuned', 'loss')), lpips)
    for name in UNIFIED:
        condition = dict(queries=3, layers=1, reference='features' if name == 'unified_1_connector' else complete('unified_2_joint', 'mini')['condition']['reference'])
        cfg = UnifiedConfig.from_dict(dict(condition=condition, alignment=dict(block=1, hidden=16)))
        model = Unified(mllm, freeze(tokenizer(parts)), mini_sana(text_dim=24, layers=2, heads=2, head_dim=16), cfg)
        yield name, UnifiedObjective(model, StageConfig.from_dict(of(name, 'stage')))
    base = Text2Image(mini_sana(text_dim=128, layers=1), mini_text_encoder(mllm.tokenizer), mllm.tokenizer)
    yield 'sana_tuned', SanaObjective(base, FlowConfig())


# the scale of pixels

@pytest.mark.parametrize('rec,x,loss', [(0., -1., .25), (1., -1., 1.), (-1 + 2/255, -1., 255**-2), (0., 0., 0.)])
def test_the_squared_error_of_pixels_is_that_of_the_scale_0_to_1(parts, rec, x, loss):
    full = lambda v: torch.full((2, 3, 64, 64), v)
    assert losses.pixel_loss(full(rec), full(x)).item() == pytest.approx(loss, rel=1e-4)
    o = training.AutoencoderObjective(DCAE(mini_dcae()), training.PixelLoss(lpips=0.))
    o.reconstruct = lambda images, pixels=True: (full(x), full(rec), None)
    assert o.terms(dict(image=full(x)), o.weights(0.) and {'mse': 1.})['mse'].item() == pytest.approx(loss, rel=1e-4)

@pytest.mark.parametrize('profile,weight', [('spar-1b', 1), ('spar-3b', 1), ('mini', 4)])      # 4: the miniature was tuned with [-1, 1]
def test_weight_of_pixels(profile, weight):
    assert {complete(s, profile)['loss']['mse'] for s in (*TOKENIZER, 'dcae_tuned')} == {weight}

def test_weight_4_gives_the_gradient_of_minus_1_to_1_to_the_bit():
    x, rec = torch.rand(2, 2, 3, 16, 16).mul(2).sub(1); rec.requires_grad_()
    (new,), (old,) = torch.autograd.grad(4 * losses.pixel_loss(rec, x), rec), torch.autograd.grad(nn.functional.mse_loss(rec, x), rec)
    assert torch.equal(new, old)


# weight decay

def test_kernels_decay_and_nothing_else(parts):
    seen = set()
    for name, o in objectives(parts):
        names, groups = {id(p): n for n, p in o.named_parameters()}, [g for e in o.players().values() for g in param_groups(e, .1, o)]
        got = {names[id(p)] for g in groups for p in g['params'] if g['weight_decay']}
        kinds = {f'{n}.{k}': type(m).__name__ for n, m in o.named_modules() for k in m._parameters}
        trained = {names[id(p)] for g in groups for p in g['params']}
        assert got == {n for n in trained if kinds[n] in ('Linear', 'Conv2d') and n.endswith('.weight')}, name
        left = trained - got
        seen |= {n.rsplit('.', 1)[-1] for n in left}
        assert not [n for n in got if any(w in n for w in ('cls_token', 'position_embeddings', 'queries', 'embed_tokens', 'scale_shift_table', 'norm', 'lambda_', 'alpha'))]
        assert {n for n in left if kinds[n] in ('Linear', 'Conv2d')} == {n for n in left if n.endswith('.bias') and kinds[n] in ('Linear', 'Conv2d')}
    assert {'cls_token', 'position_embeddings', 'queries', 'scale_shift_table', 'alpha', 'bias'} <= seen

def test_a_tied_table_does_not_decay():
    net = nn.ModuleDict(dict(table=nn.Embedding(5, 4), head=nn.Linear(4, 5, bias=False))); net['head'].weight = net['table'].weight
    assert decayed(net) == set()


# LeCam

def test_decay_of_lecam_is_the_references_and_a_setting(parts):
    critic, zero = adversary.PatchCritic(8), torch.zeros(1, 1, 7, 7)
    adversary.lecam(critic, zero, zero); assert critic.real_mean.item() == pytest.approx(.999)
    for decay in (.5, .999):
        o = training.AutoencoderObjective(copy.deepcopy(parts[1]), training.PixelLoss(lpips=0., lambda_gan=.1, gan_start=0., critic_width=8, lecam_decay=decay))
        x = torch.rand(2, 3, 64, 64); o.critic_terms(dict(image=x, index=torch.arange(2)), {'critic': 1., 'lecam': 1.})
        score = o.critic(x).mean().item(); assert o.critic.real_mean.item() == pytest.approx(decay + (1 - decay) * score, abs=1e-5)
    for s in ('tokenizer_3_encoder', 'dcae_tuned'): assert complete(s, 'spar-1b')['loss']['lecam_decay'] == .999 and complete(s, 'mini')['loss']['lecam_decay'] == .99


# keys without effect, numbers outside of their range

@pytest.mark.parametrize('key,value', dict(train_encoder=False, train_streams=True, train_decoder=True, encoder_lr=.1, anchor='mse', lambda_p=0., lambda_s=0., pixels_start=0.).items())
def test_the_control_refuses_what_belongs_to_the_streams(key, value, monkeypatch):
    with pytest.raises(ValueError, match=f"unknown '{key}'.*Allowed"): training.PixelLoss.from_dict({key: value})
    from spar.running import profiles
    monkeypatch.setattr(profiles, 'sections', lambda p: dict(dcae_tuned=dict(loss={key: value})))
    with pytest.raises(ValueError, match=f"dcae_tuned.loss.*'{key}'"): profiles.complete('dcae_tuned', 'mini')

@pytest.mark.parametrize('given,named', [
    (dict(anchor='cosine'), 'lambda_s=0.0 leaves anchor'), (dict(encoder_lr=1.), 'train_encoder=False leaves encoder_lr'),
    (dict(gan_start=.5, lecam_decay=.9), 'lambda_gan=0.0 leaves gan_start, lecam_decay'), (dict(lambda_p=1., train_streams=False, train_decoder=True), 'lambda_p=1.0 reaches nothing'),
    (dict(mse=-1.), 'mse: .*got -1.0'), (dict(lpips=nan), 'lpips: .*got nan'), (dict(lambda_gan=.1, gan_start=2.), 'gan_start: .*got 2.0'),
    (dict(lambda_gan=.1, lecam_decay=1.5), 'lecam_decay: .*got 1.5'),
    (dict(lambda_gan=.1, critic_width=0), 'critic_width: .*got 0'),
])
def test_what_changes_nothing_or_is_out_of_range_is_refused(given, named):
    with pytest.raises(ValueError, match=named): training.ReconstructionLoss.from_dict(given)

@pytest.mark.parametrize('given', [dict(lambda_a=.1), dict(lr_transformer=.5), dict(head='new')])
def test_stage_one_refuses_what_it_does_not_train(given):
    with pytest.raises(ValueError, match=f'{[*given][0]} has no effect in stage connector'): StageConfig.from_dict(given)
    StageConfig.from_dict(dict(stage='joint', **given))

def test_every_ablation_of_every_profile_is_accepted():
    from spar.running.profiles import ablations, merged, notebook_of, overlaid, sections, typed_parameters
    from spar.training.notebook import parameters
    import importlib
    for profile in ('mini', 'smoke', 'spar-1b', 'spar-3b'):
        for name, changes in ablations().items():
            for stage, section in changes.items():
                typed, file = typed_parameters(notebook_of(stage)), sections(profile).get(stage) or {}
                got = merged(parameters(notebook_of(stage)), overlaid(file, section), name, typed)
                for key, (module, cls) in typed.items(): getattr(importlib.import_module(module), cls).from_dict(got[key])

def test_a_width_that_the_parts_contradict_is_refused(parts):
    with pytest.raises(ValueError, match='D_s=64.*say 32'): new_tokenizer(*parts[:2], dict(D_s=64))

@pytest.mark.parametrize('path,weight', [('net.safetensors', 0.), ('', .1)])
def test_a_classifier_and_its_weight_go_together(path, weight):
    with pytest.raises((ValueError, FileNotFoundError), match='logits'): losses.load_logits(path, weight)


# loading

@pytest.fixture
def saved(parts, tmp_path):
    cfg = UnifiedConfig.from_dict(dict(condition=dict(queries=3, layers=1), alignment=dict(block=1, hidden=16)))
    model = Unified(parts[0], freeze(tokenizer(parts)), mini_sana(text_dim=24, layers=2, heads=2, head_dim=16), cfg); model.save_pretrained(tmp_path/'u')
    load = lambda **how: Unified.from_pretrained(tmp_path/'u', parts[0], model.image_tokenizer, **how)
    return tmp_path/'u', model, load

def test_a_head_of_another_width_is_named(saved, capsys):
    _, model, load = saved; wide = dict(alignment=dict(block=1, hidden=24))
    with pytest.raises(ValueError, match=r'alignment.head.0.weight \(file: 16x32, model: 24x32\).*stage.head: new'): load(**wide)
    new = load(head='new', **wide); assert new.alignment.head[0].out_features == 24 and 'head begins anew' in capsys.readouterr().out
    assert torch.equal(load().alignment.head[0].weight, model.alignment.head[0].weight) and capsys.readouterr().out == ''
    load(alignment=dict(kind='none')); assert 'head is not used' in capsys.readouterr().out
    with pytest.raises(ValueError, match="kind 'self', this stage asks for 'external'"): load(alignment=dict(kind='external', block=1, hidden=16))

def test_an_export_has_no_head_and_says_so(saved):
    folder, model, load = saved; model.save_pretrained(folder, head=False)
    assert json.loads((folder/'config.json').read_text())['alignment']['kind'] == 'none' and not load().alignment.active
    with pytest.raises(ValueError, match='stage.head: new'): load(alignment=dict(block=1, hidden=16))


# latent statistics

def test_moments_do_not_depend_on_how_many_pictures_go_through_at_once(parts):
    tok, sizes = freeze(tokenizer(parts)), []
    tok.encoder.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    batches = [dict(image=torch.rand(n, 3, 64, 64, generator=torch.manual_seed(n)) * 2 - 1) for n in (7, 2)]
    whole = vars(tok.measure(parts[1], batches)); assert sizes == [7, 2]; sizes.clear()
    for batch_size in (1, 3):
        for k, v in vars(tok.measure(parts[1], batches, batch_size=batch_size)).items(): assert v == pytest.approx(whole[k], abs=1e-6), k
        assert max(sizes) <= batch_size; sizes.clear()
    with pytest.raises(ValueError, match='batch_size=0'): tok.measure(parts[1], batches, batch_size=0)


# Muon

def test_muon_refuses_to_be_adamw_at_the_papers_scale(capsys):
    sana = whole_model('spar-1b')['sana']
    with pytest.raises(ValueError, match=r'Muon moves ([\d,]+) of ([\d,]+) parameters \(0\.\d+%\).*Choose optimizer .adamw.'): Muon(param_groups([*sana.parameters()], 0., sana))
    small = nn.Linear(64, 64); Muon(param_groups([*small.parameters()], 0., small)); assert 'Muon moves 4,096 of 4,160 parameters (98.46%)' in capsys.readouterr().out
    for share in (-.1, 1.1, nan):
        with pytest.raises(ValueError, match='muon_share'): Muon([*small.parameters()], least=share)


# FID and what is not finite

def test_an_fid_of_few_pictures_is_called_rank_order(capsys):
    x, net = torch.rand(20, 3, 16, 16) * 2 - 1, lambda v: v[:, :, ::4, ::4].flatten(1)          # 48 features
    row = reconstruction.reconstruction_mini(dict(it=lambda v: v * .9), x, net=net, least=2)['it']
    assert row['rank_only'] is True and metrics.clean(row)['rank_only'] is True and '20 pictures in 48 dimensions, rank order only' in capsys.readouterr().out
    assert '| rfid_efflite0 (rank order only) |' in tables.markdown_table(dict(it=row))
    many = reconstruction.reconstruction_mini(dict(it=lambda v: v * .9), x.repeat(3, 1, 1, 1), net=net, least=2)['it']
    assert many['rank_only'] is False and 'rank' not in tables.markdown_table(dict(it=many)) + capsys.readouterr().out

@pytest.mark.parametrize('hole', [nan, float('inf')])
def test_no_metric_scores_what_is_not_finite(hole):
    good = torch.rand(4, 3, 16, 16); bad = good.clone(); bad[2, 1, 3, 3] = hole
    calls = [lambda: metrics.psnr(good, bad), lambda: metrics.psnr(bad, good), lambda: metrics.ssims(good, bad), lambda: metrics.ssim(bad, good), lambda: metrics.compare(good, bad),
             lambda: metrics.compare(bad, good), lambda: metrics.features(lambda v: v.flatten(1), bad), lambda: metrics.fid(bad.flatten(1), good.flatten(1), 2),
             lambda: metrics.bootstrap([1., 2., hole]), lambda: texture.texture_kept(good, bad), lambda: texture.texture_kept(bad, good),
             lambda: training.reconstruction_scores(lambda v: bad[:len(v)], dict(them=good)),
             lambda: reconstruction.reconstruction_mini(dict(it=lambda v: bad[:len(v)]), good),
             lambda: metrics.compare(good, good, lpips=lambda a, b: torch.tensor([0., 0., hole, 0.]))]
    for call in calls:
        with pytest.raises(ValueError, match=r'NaN or inf in 1 of \d, by index \[2\]'): call()
