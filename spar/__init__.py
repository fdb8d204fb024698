__version__ = "0.1.0"

# The public names, imported when they are first asked for: `import spar` alone costs nothing. They stay where they are;
# what is not listed here may move from one module to another.
_PUBLIC = {
    'SparPipeline': 'pipeline',
    'Tokenizer': 'tokenizer.model', 'new_tokenizer': 'tokenizer.model',
    'DualStream': 'tokenizer.streams', 'StreamsConfig': 'tokenizer.streams',
    'Routing': 'unified.routing', 'RoutingConfig': 'unified.routing',
    'Condition': 'unified.condition', 'ConditionConfig': 'unified.condition',
    'Alignment': 'unified.alignment', 'AlignmentConfig': 'unified.alignment',
    'Unified': 'unified.model', 'UnifiedConfig': 'unified.model', 'FlowConfig': 'unified.flow',
    'load_mllm': 'backbones.mllm', 'load_dcae': 'backbones.dcae', 'load_sana': 'backbones.sana',
    'read_image': 'images',
}
__all__ = ['__version__', *_PUBLIC]


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}. Public names: {", ".join(_PUBLIC)}.')
    from importlib import import_module
    return getattr(import_module(f'{__name__}.{_PUBLIC[name]}'), name)


def __dir__():
    return sorted({*globals(), *_PUBLIC})
