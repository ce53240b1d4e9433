import pytest

from qwenvl_jax.data import catalogue, cli, prepare
from qwenvl_jax.errors import ConfigError


def test_list_shows_what_is_prepared(prepared, tmp_path, capsys):
  cli.main(['list', '--data_dir', prepared])
  shown = capsys.readouterr().out
  assert '400' in shown and 'combos' in shown and '4,000' in shown
  cli.main(['list', '--data_dir', str(tmp_path)])
  assert 'not prepared' in capsys.readouterr().out


@pytest.mark.parametrize('arguments', [[], ['--name', 'flickr30k']])
def test_addresses_can_be_copied_at_any_width(arguments, monkeypatch, capsys):
  monkeypatch.setenv('COLUMNS', '40')
  cli.main(['list', *arguments])
  url = catalogue.DATA_SETS['flickr30k'].url
  assert any(line.endswith(url) for line in capsys.readouterr().out.split('\n'))


def test_prepare_again_changes_nothing(prepared, capsys):
  cli.main(['prepare', 'scenes', '--config', 'small', '--data_dir', prepared])
  assert 'qwen.tiktoken' in capsys.readouterr().out.replace('\n', '')
  cli.main(['prepare', 'easy_vqa'])
  assert 'no preparation' in capsys.readouterr().out


@pytest.mark.parametrize('tasks', ['questions', 'chats', 'words'])
def test_show_writes_a_page(prepared, tmp_path, tasks):
  page = tmp_path / 'rows.html'
  options = ['--data_dir', prepared, '--config', 'small', '--tasks', tasks]
  cli.main(['show', 'scenes', *options, '--rows', '4', '--output', str(page)])
  content = page.read_text()
  assert content.count('<section>') == 4
  assert 'scenes/train/' in content and 'class="loss"' in content
  assert ('data:image/png' in content) == (tasks != 'words')
  assert ('&lt;|im_start|&gt;' in content) == (tasks == 'chats')


def test_show_easy_vqa(tmp_path):
  page = tmp_path / 'rows.html'
  cli.main(
    ['show', 'easy_vqa', '--split', 'test', '--rows', '2', '--output',
     str(page)]
  )  # fmt: skip
  assert 'Answer:' in page.read_text()


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (['show', 'scenes', '--data_dir', 'nowhere'], 'prepare scenes'),
    (['prepare', 'scenes', '--config', 'huge'], "'small'"),
    (['show', 'easy_vqa', '--split', 'val'], "'val'"),
    (['show', 'easy_vqa', '--tasks', 'chats'], 'questions only'),
    (['show', 'mine'], '--gin_file=finetune/lora.gin'),
    (
      ['prepare', 'scenes', '--config', 'small', '--data_dir', '/dev/null/x'],
      'cannot write to /dev/null/x',
    ),
  ],
)
def test_bad_input_gets_one_line_and_status_2(arguments, says, capsys):
  assert cli.main(arguments) == 2
  error = capsys.readouterr().err
  assert says in error and error.count('\n') == 1


def test_help_of_every_command(capsys):
  for command in ([], ['list'], ['prepare'], ['show']):
    with pytest.raises(SystemExit) as stop:
      cli.main([*command, '--help'])
    assert stop.value.code == 0
  assert 'data_dir' in capsys.readouterr().out


def test_prepare_says_which_configurations_there_are(tmp_path):
  with pytest.raises(ConfigError, match="'default', 'small'"):
    prepare.scenes(tmp_path, 'medium')
