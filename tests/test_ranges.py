"""Every number of every configuration has a declared range, which direct construction, `from_dict` and assignment keep."""
import importlib
import math
import pkgutil
import typing
from dataclasses import fields

import pytest

import spar
from conftest import ROOT
from spar.core import Config, Range
from spar.running.profiles import complete, profiles, sections, stage_names

for module in pkgutil.walk_packages(spar.__path__, 'spar.'): importlib.import_module(module.name)


def below(cls) -> list:
    "All configuration classes of the package."
    found = [c for sub in cls.__subclasses__() for c in (sub, *below(sub))]
    return sorted({c for c in found if c.__module__.startswith('spar.')}, key=lambda c: c.__name__)


def numbers_in(kind, path=()):
    "(where in the field, what the number is declared as) of a field's type; a container that does not say what it holds is named too."
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated: yield path, kind
    elif kind in (int, float, complex, tuple, list, dict, set): yield path, kind
    elif origin is dict: yield from numbers_in(args[1], (*path, 'key'))
    elif origin in (tuple, list):
        for i, a in enumerate(args[:1] if args[1:] == (...,) or origin is list else args): yield from numbers_in(a, (*path, i))
    elif args:
        for a in args: yield from numbers_in(a, path)


NUMBERS = [
    pytest.param(cls, f.name, path, kind, id=f'{cls.__name__}.{f.name}' + ''.join(f'.{p}' for p in path))
    for cls in below(Config) for f in fields(cls)
    for path, kind in numbers_in(typing.get_type_hints(cls, include_extras=True)[f.name])
]


def test_there_are_configurations():
    assert {'TrainConfig', 'FlowConfig', 'ReconstructionLoss', 'CorpusConfig', 'LatentStats'} <= {c.__name__ for c in below(Config)}
    assert len(NUMBERS) > 80


@pytest.mark.parametrize('cls,name,path,kind', NUMBERS)
def test_every_number_says_its_range(cls, name, path, kind):
    assert any(isinstance(a, Range) for a in typing.get_args(kind)), f'{cls.__module__}.{cls.__name__}.{name} is {kind}: say which numbers it takes'


def good(kind):
    base, span = typing.get_args(kind)
    middle = (max(span.low, -1) + min(span.high, 1)) / 2 or 1
    return int(max(middle, span.low, 1)) if base is int else middle


def filled(cls, name, path, value):
    "The field's value with `value` at `path`."
    kind = typing.get_type_hints(cls, include_extras=True)[name]
    for p in path:
        args = typing.get_args(kind)
        if p == 'key': return {'some': value}
        if typing.get_origin(kind) is list: return [value]
        return tuple(value if i == p else good(a) for i, a in enumerate(args))
    return value


@pytest.mark.parametrize('cls,name,path,kind', NUMBERS)
def test_what_lies_outside_is_refused(cls, name, path, kind):
    base, span = typing.get_args(kind)
    wrong = [math.nan, math.inf, -math.inf, True, None, [1]] + [1.5] * (base is int) + [span.low - 1] * math.isfinite(span.low)
    wrong += [span.high + 1] * math.isfinite(span.high) + [span.low] * span.above + [span.high] * span.below
    for value in wrong:
        for make in (lambda v: cls(**{name: v}), lambda v: cls.from_dict({name: v}), lambda v: setattr(cls(), name, v)):
            with pytest.raises(ValueError, match=f'{cls.__name__}.{name}'): make(filled(cls, name, path, value))


@pytest.mark.parametrize('profile', profiles() + ['bases'])
def test_profiles_lie_inside(profile, monkeypatch):
    monkeypatch.chdir(ROOT)
    kind = 'bases' if profile == 'bases' else 'stages'
    assert set(sections(profile)) == set(stage_names(kind))
    for stage in stage_names(kind): complete(stage, profile, kind)


@pytest.mark.parametrize('weights', [(-.5, 1.5), (math.nan, 1.), (True, 1.)])
def test_a_mixture_refuses_what_is_no_weight(weights):
    from spar.world.datasets import Mixture, PhotoCrops, SceneImages
    parts = dict(photos=(PhotoCrops(), weights[0]), scenes=(SceneImages(), weights[1]))
    with pytest.raises(ValueError, match="weight of 'photos'"): Mixture(parts)


@pytest.mark.parametrize('kw', [dict(steps=0), dict(steps=1.5), dict(guidance=-1), dict(guidance=math.nan)])
def test_the_sampler_refuses_what_no_configuration_allows(kw):
    from spar.unified.flow import FlowConfig, sample
    with pytest.raises(ValueError, match=next(iter(kw))): sample(None, (None, None), None, None, FlowConfig(), **kw)


def test_shares_and_batches_of_plain_arguments():
    from spar.evaluation.systems import in_batches
    from spar.world.tasks import SceneCaptions
    with pytest.raises(ValueError, match='SceneCaptions.twos'): SceneCaptions(twos=1.2)
    with pytest.raises(ValueError, match='batch_size'): in_batches(None, 4, -1)
