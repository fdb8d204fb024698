"""A whole pipeline of the real classes, small and random."""
import torch
from spar.core import freeze
from spar.backbones.dcae import DCAE, mini_dcae
from spar.backbones.mllm import mini_mllm, MLLM
from spar.backbones.sana import mini_sana
from spar.pipeline import SparPipeline
from spar.tokenizer.model import new_tokenizer
from spar.unified.model import Unified, UnifiedConfig


def tiny_unified(words: list, condition: dict = {}) -> Unified:
    "Knows the given words; its encoder is moved away from the MLLM's own, as after tokenizer stage III."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mllm = freeze(MLLM(*mini_mllm(words, dim=32, layers=4, heads=4, ffn=64, vision_dim=32, vision_layers=1)))
        dcae = freeze(DCAE(mini_dcae(channels=(16, 16, 32, 32), enc_layers=(0, 1, 1, 1), dec_layers=(0, 1, 1, 1))))
        tok = new_tokenizer(mllm, dcae, dict(layers=1, heads=4, blocks=1)); tok.measure(dcae, [dict(image=torch.randn(4, 3, 64, 64))])
        for p in tok.encoder.parameters(): p.data += .3 * p.data.std().nan_to_num(.1) * torch.randn_like(p)
        cfg = UnifiedConfig.from_dict(dict(condition=dict(queries=3, layers=1) | condition, alignment=dict(block=1, hidden=16)))
        return freeze(Unified(mllm, freeze(tok), mini_sana(text_dim=24, layers=2, heads=2, head_dim=16), cfg))

def tiny_pipeline(words: list) -> SparPipeline: return SparPipeline.from_unified(tiny_unified(words), precision='no')
