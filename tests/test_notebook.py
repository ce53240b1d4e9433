"""What the notebooks stand on, where they themselves do not go."""

import golden
import pytest

from qwenvl_jax import notebook
from qwenvl_jax.errors import ConfigError, DataError, QwenVLError


def test_a_command_that_fails_ends_the_notebook(capsys):
  with pytest.raises(QwenVLError, match='qwenvl-convert failed with status 2'):
    notebook.run('qwenvl-convert', 'inspect', 'no such/folder')
  said = capsys.readouterr().out
  assert said.startswith("$ qwenvl-convert inspect 'no such/folder'\n")
  assert 'error: no such/folder does not exist' in said


@pytest.mark.parametrize('command', ['rm', 'qwenvl-nothing', 'os.system'])
def test_other_commands_are_refused(command):
  with pytest.raises(ConfigError, match=f'{command} is no command'):
    notebook.run(command)


def test_keep_makes_the_folder(tmp_path):
  assert notebook.keep(str(tmp_path / 'a' / 'b')).is_dir()


def test_drive_is_on_colab_only():
  with pytest.raises(ConfigError, match='on Colab only'):
    notebook.keep('/content/drive/MyDrive/qwenvl')


def test_pictures():
  path = golden.FOLDER / 'wide.png'
  assert notebook.picture(str(path)).width > notebook.picture().width
  address = 'http://127.0.0.1:1/a.png'
  with pytest.raises(DataError, match=f'{address} cannot be fetched'):
    notebook.picture(address)


def test_curves_of_a_run_that_has_none(tmp_path):
  with pytest.raises(DataError, match='is no training run'):
    notebook.curves({'mine': tmp_path})


def test_curves_have_what_was_held_out(tmp_path):
  plain = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n'
  (tmp_path / 'log.jsonl').write_text(plain)
  before = notebook.curves({'mine': tmp_path}).tobytes()
  (tmp_path / 'log.jsonl').write_text(
    plain + '{"step": 1, "heldout_loss": 1.5}\n'
  )
  assert notebook.curves({'mine': tmp_path}).tobytes() != before
