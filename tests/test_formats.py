"""Folders that a pipeline is saved into say which version of the format they have, and where the weights come from."""
import json, shutil
import pytest
from spar import SparPipeline, cli
from spar.command import main
from spar.core import FORMAT, read_json
from spar.world.prompts import vocabulary
from tiny import tiny_pipeline

OURS = ('model_index.json', 'image_tokenizer/config.json', 'condition/config.json')
RECORD = dict(profile='smoke', seed=3, commit='0123abc')

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('saved')/'pipe'
    tiny_pipeline(vocabulary()).save_pretrained(path, RECORD)
    return path

@pytest.fixture
def changed(folder, tmp_path):
    "A copy of the folder with one configuration changed."
    def change(name, do):
        shutil.copytree(folder, tmp_path/'pipe'); file = tmp_path/'pipe'/name
        config = json.loads(file.read_text()); do(config); file.write_text(json.dumps(config))
        return tmp_path/'pipe'
    return change

def draw(pipe): return pipe('a red star', num_inference_steps=2).images[0].tobytes()

@pytest.mark.parametrize('name', OURS)
def test_every_configuration_of_ours_has_the_version(folder, name): assert json.loads((folder/name).read_text())['format_version'] == FORMAT

def test_the_record_is_read_and_written_again(folder, tmp_path):
    pipe = SparPipeline.from_pretrained(folder, 'cpu', 'no'); assert pipe.record == RECORD
    pipe.save_pretrained(tmp_path/'again'); assert SparPipeline.from_pretrained(tmp_path/'again', 'cpu', 'no').record == RECORD

@pytest.mark.parametrize('name', OURS)
def test_a_folder_without_a_version_is_the_first(folder, changed, name):
    old = changed(name, lambda c: (c.pop('format_version'), c.pop('record', None)))
    assert draw(SparPipeline.from_pretrained(old, 'cpu', 'no')) == draw(SparPipeline.from_pretrained(folder, 'cpu', 'no'))

@pytest.mark.parametrize('version', [FORMAT + 1, '1', -1, None])
@pytest.mark.parametrize('name', OURS)
def test_a_version_nobody_knows_is_refused(changed, name, version):
    with pytest.raises(ValueError, match='format version'): SparPipeline.from_pretrained(changed(name, lambda c: c.update(format_version=version)), 'cpu', 'no')

@pytest.mark.parametrize('named,said', [('mini', True), ('smoke', False), (None, True)])
def test_commands_name_the_profile_when_it_is_another(folder, tmp_path, monkeypatch, capsys, named, said):
    monkeypatch.chdir(tmp_path)
    if named: (tmp_path/'params.yaml').write_text(f'profile: {named}\n')
    main(['generate', 'a red star', '--model', str(folder), '--steps', '2', '--out', 'star.png', '--device', 'cpu'])
    assert ("'smoke'" in capsys.readouterr().err) == said and (tmp_path/'star.png').is_file()

def test_commands_take_the_pipeline_of_the_profile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); assert cli.default_model() == 'artifacts/mini/pipeline'
    (tmp_path/'params.yaml').write_text('profile: smoke\n'); assert cli.default_model() == 'artifacts/smoke/pipeline'

def test_a_file_of_the_working_folder_is_read_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); (tmp_path/'a.json').write_text('{"a": 1}')
    assert read_json('a.json') == dict(a=1)
    with pytest.raises(FileNotFoundError, match='b.json is missing'): read_json('b.json')
