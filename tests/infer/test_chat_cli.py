import io
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from PIL import Image

from qwenvl_jax import api, entry
from qwenvl_jax.errors import DataError
from qwenvl_jax.infer import chat as chatting
from qwenvl_jax.infer import chat_cli, terminal
from qwenvl_jax.infer.chat import Chat

# What `recited` says.
WORDS = 'I see 狗'

COMMAND = [sys.executable, '-m', 'qwenvl_jax.infer.chat_cli']


@pytest.fixture(scope='module')
def model(chat_checkpoint):
  return api.load(chat_checkpoint)


@pytest.fixture
def session(model, monkeypatch, tmp_path, recited):
  """A conversation in a folder with two pictures; nothing is computed."""
  monkeypatch.setattr(chatting, 'answer', lambda *_: iter([recited]))
  monkeypatch.chdir(tmp_path)
  Image.new('RGB', (600, 450), 'white').save('white.png')
  Image.new('RGB', (600, 450), 'blue').save('my blue.png')
  return terminal.Session(Chat(model), [])


def test_a_conversation_through_a_pipe(chat_checkpoint, tmp_path, recited):
  """Only answers go to stdout, in words but for /raw."""
  Image.new('RGB', (600, 450), 'white').save(tmp_path / 'dog.png')
  lines = ['/image dog.png', 'Où est le chien?', '/save', '/raw', '', 'And?']
  done = subprocess.run(
    [*COMMAND, '--checkpoint', str(chat_checkpoint), '--seed', '1'],
    input='\n'.join(lines),
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [WORDS, recited, WORDS]
  assert '(1 box: --save or /save draws' in done.stderr
  with Image.open(tmp_path / 'answer.png') as drawn:
    # The box is (250,100),(750,900): its left edge is at a quarter.
    assert drawn.size == (600, 450)
    assert drawn.convert('RGB').getpixel((150, 225)) != (255, 255, 255)
    assert drawn.convert('RGB').getpixel((300, 225)) == (255, 255, 255)


def test_a_script_ends_at_the_first_line_that_cannot_be_done(
  session, capsys, monkeypatch
):
  """Or the next question would be about another picture, or none."""
  script = 'Hi\n/image no.png\nWhat is it?\n'
  monkeypatch.setattr('sys.stdin', io.StringIO(script))
  assert entry.run(lambda _: session.converse(), []) == 2
  shown = capsys.readouterr()
  assert shown.out == f'{WORDS}\n'
  assert shown.err.startswith('error: line 2: no.png: no such file')


def test_one_shot(chat_checkpoint, tmp_path, capsys, recited):
  Image.new('RGB', (50, 40)).save(tmp_path / 'a.png')
  arguments = ['--checkpoint', str(chat_checkpoint), '--prompt', 'Where?']
  arguments += ['--image', str(tmp_path / 'a.png'), '--temperature', '1']
  arguments += ['--save', str(tmp_path / 'drawn.png')]
  assert chat_cli.main(arguments) == 0
  assert capsys.readouterr().out == f'{WORDS}\n'
  assert (tmp_path / 'drawn.png').exists()
  assert chat_cli.main([*arguments, '--raw']) == 0
  assert capsys.readouterr().out == f'{recited}\n'


ASK = ('--checkpoint', 'x', '--prompt', 'what')


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--checkpoint', 'no/such'], 'no/such'),
    (['--checkpoint', 'x', '--image', 'no.png'], 'no.png: no such file'),
    (['--checkpoint', 'x', '--temperature', '-1'], 'temperature=-1'),
    (['--checkpoint', 'x', '--save', 'y.png'], '--save needs --prompt'),
    ([*ASK, '--save', 'y.png'], '--save needs --image'),
    ([*ASK, '--image', 'a.png', '--save', 'no/y.png'], 'cannot write no/y.png'),
    ([*ASK, '--image', 'a.png', '--save', 'y.doc'], 'cannot write y.doc'),
  ],
)
def test_errors_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  Image.new('RGB', (50, 40)).save('a.png')
  assert chat_cli.main(arguments) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ')
  assert error.count('\n') == 1
  assert message in error


def test_no_vocabulary(chat_checkpoint, tmp_path, capsys):
  folder = tmp_path / 'copy'
  folder.mkdir()
  for path in chat_checkpoint.iterdir():
    if path.name != 'qwen.tiktoken':
      (folder / path.name).symlink_to(path)
  assert chat_cli.main(['--checkpoint', str(folder), '--prompt', 'x']) == 2
  assert 'no vocabulary' in capsys.readouterr().err


def test_pictures_come_with_the_next_question(session, capsys):
  session.obey('/image white.png')
  session.obey('/image my blue.png')
  session.obey('/image white.png "my blue.png"')
  assert 'Picture 4: my blue.png (600 x 450)' in capsys.readouterr().err
  session.obey('How many?')
  session.obey('And now?')
  assert [len(turn.pictures) for turn in session._chat.history] == [4, 0]


def test_save_draws_on_the_picture_that_is_asked_for(session, capsys):
  session.obey('/image white.png "my blue.png"')
  session.obey('Where?')
  session.obey('/save')
  session.obey('/save')
  session.obey('/save first.jpg 1')
  session.obey('/save "of two.png" 2')
  colours = [
    Image.open(name).convert('RGB').getpixel((300, 225))
    for name in ('answer.png', 'answer-2.png', 'first.jpg', 'of two.png')
  ]
  blue, white = (0, 0, 255), (255, 255, 255)
  assert colours == [blue, blue, white, blue]
  assert 'Picture 1 with 1 box is saved as first.jpg' in capsys.readouterr().err


@pytest.mark.parametrize(
  'lines, message',
  [
    (['/save'], 'no answer yet'),
    (['Hi', '/save'], 'no picture in this conversation'),
    (['/image white.png', 'Hi', '/save x.png 2'], 'no Picture 2'),
    (['/image white.png', 'Hi', '/save no/such/x.png'], 'cannot write'),
    (['/image white.png', 'Hi', '/save x.unknown'], 'cannot write'),
    (['/image'], 'needs the path'),
    (['/imgae white.png'], 'no command /imgae; did you mean /image?'),
    (['/raw'], 'no answer yet'),
    (['/image no.png'], 'no such file'),
    (['<img>no.png</img> what is it?'], 'no such file'),
    (['<box> what?'], ''),
    (['what </box>?'], 'closes nothing'),
  ],
)
def test_a_line_that_cannot_be_done(session, lines, message):
  *before, last = lines
  for line in before:
    session.obey(line)
  if message:
    with pytest.raises(DataError, match=message):
      session.obey(last)
  else:
    session.obey(last)
  session.obey('Still there?')
  assert session._chat.history[-1].query == 'Still there?'


def test_int4_weights_that_are_not_there(chat_checkpoint, capsys):
  folder = str(chat_checkpoint)
  assert chat_cli.main(['--checkpoint', folder, '--keep_int4']) == 2
  assert 'holds no int4 weights' in capsys.readouterr().err


def test_an_adapter_that_is_not_there(chat_checkpoint, capsys):
  folder = str(chat_checkpoint)
  assert chat_cli.main(['--checkpoint', folder, '--adapter', 'nowhere']) == 2
  assert 'nowhere' in capsys.readouterr().err


def test_commands(session, capsys):
  session.obey('/image white.png')
  session.obey('Hi')
  session.obey('/image white.png')
  session.obey('/reset')
  assert not session._chat.history
  session.obey('/help')
  error = capsys.readouterr().err
  assert (
    'new conversation: 1 question and 2 pictures are forgotten (1 of them not '
    'asked about yet)'
  ) in ' '.join(error.split())
  assert '/save [PATH] [N]' in error
  assert session.obey('   ') is None
  assert session.obey('/exit') == 'exit'
  # No command: a question about a path.
  session.obey('/usr/bin is what?')
  assert len(session._chat.history) == 1


def test_boxes_are_drawn_where_it_is_told(
  session, capsys, tmp_path, monkeypatch
):
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
  session._interactive = True
  session.obey('/image white.png')
  session.obey('Where?')
  shown = capsys.readouterr()
  assert shown.out == f'{WORDS}\n'
  path = pathlib.Path(shown.err.split('saved as ')[1].strip())
  assert path.name == 'answer.png'
  with Image.open(path) as drawn:
    assert drawn.convert('RGB').getpixel((150, 225)) != (255, 255, 255)
  assert not list(pathlib.Path().glob('answer*'))


def test_control_characters_of_an_answer_do_not_reach_the_terminal(capsys):
  terminal.write_text('a\x1b[31mb\x07\n狗\tc')
  assert capsys.readouterr().out == 'a[31mb\n狗\tc'


def test_ctrl_c_stops_an_answer_and_not_the_program(
  session, monkeypatch, capsys
):
  def interrupted(*_):
    yield 'I see'
    signal.raise_signal(signal.SIGINT)
    yield ' a'
    yield ' dog'

  session._interactive = True
  with monkeypatch.context() as patch:
    patch.setattr(chatting, 'answer', interrupted)
    session.obey('Hi')
  assert 'stopped' in capsys.readouterr().err
  assert session._chat.history[-1].answer == 'I see a'
  session.obey('And?')
  assert len(session._chat.history) == 2
  # A script ends instead.
  session._interactive = False
  monkeypatch.setattr(chatting, 'answer', interrupted)
  with pytest.raises(KeyboardInterrupt):
    session.obey('Hi')


SPLIT = """
from qwenvl_jax import api, entry
from qwenvl_jax.infer import chat_cli

opened, load = [], api.load
api.load = lambda *a, **b: opened.append(load(*a, **b)) or opened[-1]
assert not chat_cli.main(['--checkpoint', {folder!r}, '--prompt', 'What?'])
kernel = opened[0].params['decoder']['blocks_0']['mlp']['down']['kernel']
assert len(kernel.sharding.device_set) == 2
assert not kernel.sharding.is_fully_replicated
"""


def test_all_devices_of_the_machine_share_the_model(
  chat_checkpoint, run_on_devices
):
  out = run_on_devices(2, SPLIT.format(folder=str(chat_checkpoint)))
  assert out == f'{WORDS}\n'
