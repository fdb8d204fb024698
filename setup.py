"""Everything the package says of itself stands in settings.ini (nbdev 2); this file only hands it to setuptools."""
from configparser import ConfigParser
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], license='Apache-2.0',
    description=cfg['description'], keywords=cfg['keywords'], author=cfg['author'],
    long_description=open('README.md', encoding='utf-8').read() if __import__('os').path.exists('README.md') else '',
    long_description_content_type='text/markdown',
    packages=find_packages(include=['spar', 'spar.*']), include_package_data=True, zip_safe=False,
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={
        'console_scripts': [line.strip() for line in cfg['console_scripts'].splitlines() if line.strip()],
        'nbdev': ['spar=spar._modidx:d'],
    },
)
