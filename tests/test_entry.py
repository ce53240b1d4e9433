import contextlib
import errno
import os
import pty
import shlex
import subprocess
import sys

import jax
import pytest

from qwenvl_jax import buckets, configuration, entry
from qwenvl_jax.errors import ConfigError


def test_command_line():
  arguments = entry.parser('qwenvl-x', 'Does x.')
  arguments.add_argument('--workdir')
  argv = ['--gin_file=a', '--gin_file', 'b', '--gin.X=1', '--gin.Y', '"2"']
  flags, bindings = entry.parse(arguments, [*argv, '--workdir=w'])
  assert (flags.gin_file, flags.workdir) == (['a', 'b'], 'w')
  assert bindings == ['X=1', 'Y="2"']
  with pytest.raises(ConfigError, match='did you mean --workdir'):
    entry.parse(arguments, ['--workdr=w'])
  with pytest.raises(ConfigError, match='has no value'):
    entry.parse(arguments, ['--gin.X'])


@pytest.mark.parametrize(
  ('raised', 'status', 'said'),
  [
    ("ConfigError('no such thing')", 2, 'error: no such thing\n'),
    ('KeyboardInterrupt()', 130, 'interrupted\n'),
  ],
)
def test_errors_for_people_come_without_a_traceback(
  raised, status, said, capsys
):
  def main(argv):
    raise eval(raised)

  assert entry.run(main, []) == status
  assert capsys.readouterr().err == said


ESCAPES = """
import os, sys
from rich.console import Console
from qwenvl_jax import entry
from qwenvl_jax.errors import DataError
from qwenvl_jax.progress import PrintableConsole
name = 'pic\\x1b]0;title\\x07\\x9b31m.png'
def command(argv):
  print(name, flush=True)
  PrintableConsole().print(name, markup=False)
  Console(force_terminal=True).print('[red]ours')
  entry.parser(name, 'x').print_usage()
  raise DataError(f'{name} is damaged')
sys.exit(entry.run(command))
"""


def test_control_characters_in_names_do_not_reach_the_terminal():
  done = subprocess.run(
    [sys.executable, '-c', ESCAPES.replace('\\\\', '\\')],
    capture_output=True,
    env=os.environ | {'COLUMNS': '200'},
  )
  assert done.returncode == 2
  shown = rb'pic\x1b]0;title\x07\x9b31m.png'
  assert done.stderr == b'error: ' + shown + b' is damaged\n'
  assert done.stdout.count(shown) == 3
  # Only the colours that are ours.
  assert done.stdout.count(b'\x1b') == 2 and b'\x07' not in done.stdout


BAR = """
import sys
from rich.console import Console
from rich.progress import Progress
from qwenvl_jax import entry
def command(argv):
  with Console(stderr=True).status('opening'):
    pass
  with Progress(console=Console(stderr=True)) as bar:
    bar.add_task('training', total=2)
    print('beside it', file=sys.stderr, flush=True)
sys.exit(entry.run(command))
"""


def test_bars_and_spinners_reach_a_terminal_as_they_are():
  ours, its = pty.openpty()
  done = subprocess.run(
    [sys.executable, '-c', BAR],
    stdout=its,
    stderr=its,
    env=os.environ | {'TERM': 'xterm'},
  )
  os.close(its)
  shown = b''
  with contextlib.suppress(OSError):  # How a terminal ends.
    while piece := os.read(ours, 4096):
      shown += piece
  os.close(ours)
  assert done.returncode == 0
  assert b'beside it' in shown and b'\x1b[' in shown
  assert b'\\x1b' not in shown


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_full_output_is_a_line():
  source = (
    'import sys; from qwenvl_jax import entry; '
    'sys.exit(entry.run(lambda _: print("x")))'
  )
  with open('/dev/full', 'w') as full:
    done = subprocess.run(
      [sys.executable, '-c', source],
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
    )
  said = 'error: the output: No space left on device\n'
  assert (done.returncode, done.stderr) == (2, said)


def test_what_a_disk_refuses_is_a_line(capsys):
  def command(argv):
    raise OSError(errno.EDQUOT, 'Disk quota exceeded', 'runs/a')

  assert entry.run(command, []) == 2
  assert capsys.readouterr().err == 'error: runs/a: Disk quota exceeded\n'


def test_a_device_without_memory_is_a_line(capsys):
  def command(argv):
    jax.numpy.zeros(2**50, 'int8').block_until_ready()

  assert entry.run(command, []) == 2
  said = capsys.readouterr().err
  assert said.count('\n') == 1 and 'too little memory' in said


def test_an_empty_path_is_refused():
  command = ['--gin_file=quickstart/stage1.gin', '--workdir=']
  done = subprocess.run(
    [sys.executable, '-m', 'qwenvl_jax.train.main', *command],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2 and '--workdir is empty' in done.stderr
  with pytest.raises(ConfigError, match="named ''"):
    buckets.as_path('')


def test_a_reader_that_leaves_is_no_error():
  source = (
    'import sys; from qwenvl_jax import entry; '
    'sys.exit(entry.run(lambda _: print("x" * 10**6)))'
  )
  done = subprocess.run(
    [
      'bash',
      '-o',
      'pipefail',
      '-c',
      f"{shlex.quote(sys.executable)} -c '{source}' | head -c 1",
    ],
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, 'x', '')


def test_train_says_how_it_is_used():
  def train(*argv):
    command = [sys.executable, '-m', 'qwenvl_jax.train.main', *argv]
    root = configuration.CONFIGS.parent
    return subprocess.run(command, cwd=root, capture_output=True, text=True)

  done = train('--help')
  assert not done.returncode
  for words in ('--workdir', '--gin_file', '--gin.NAME=VALUE', 'examples:'):
    assert words in done.stdout
  done = train('--workdir=x', '--gin_file=stage1.gn')
  assert done.returncode == 2
  assert done.stderr.startswith("error: config file 'stage1.gn'")
  assert 'did you mean stage1.gin' in done.stderr


COMPILES = """
import sys, jax
from qwenvl_jax import entry
def command(argv):
  hits = []
  jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event.endswith('/cache_hits'))
  )
  @jax.jit
  def f(x):
    for _ in range(20):  # Long enough to compile to be worth keeping.
      x = jax.numpy.sort(x @ x.T, axis=0).cumsum(axis=1)
    return x
  f(jax.numpy.ones((30, 30))).block_until_ready()
  print(sum(hits))
sys.exit(entry.run(command))
"""


def test_compiled_programs_are_kept_for_the_next_start(tmp_path):
  """Where the environment says nothing: in the user's cache folder."""
  environment = os.environ | {
    'XDG_CACHE_HOME': str(tmp_path),
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': '',
  }

  def start():
    return int(
      subprocess.run(
        [sys.executable, '-c', COMPILES],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
      ).stdout
    )

  assert start() == 0
  assert not list(tmp_path.iterdir())
  del environment['JAX_COMPILATION_CACHE_DIR']
  assert start() == 0
  assert start() > 0
