"""Everything the package says of itself stands in settings.ini (nbdev 2); this file only hands it to setuptools."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=['='])
ini.read(here / 'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
readme = here / 'README.md'

extras = {name: cfg[f'{name}_requirements'].split() for name in ('train', 'scale', 'demo', 'dev')}
extras['all'] = sorted({r for names in extras.values() for r in names})
pythons = [f'Programming Language :: Python :: {v}' for v in ('3.11', '3.12', '3.13')]

setup(
    name=cfg['lib_name'], version=cfg['version'], license='Apache-2.0',
    description=cfg['description'], keywords=cfg['keywords'], author=cfg['author'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown', classifiers=pythons,
    packages=find_packages(include=['spar', 'spar.*']), include_package_data=True, zip_safe=False,
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={
        'console_scripts': [line.strip() for line in cfg['console_scripts'].splitlines() if line.strip()],
        'nbdev': ['spar=spar._modidx:d'],
    },
)
