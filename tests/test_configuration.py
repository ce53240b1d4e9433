import os

import pytest

from qwenvl_jax import configuration
from qwenvl_jax.data import sources
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train import init
from qwenvl_jax.train.optimizer import OptimizerConfig

HEADER = 'from __gin__ import dynamic_registration\n'
RUN = (
  HEADER
  + """
from qwenvl_jax.train import optimizer

PEAK = 1e-3
STEPS = 100

optimizer.OptimizerConfig:
  peak = %PEAK
  end = 1e-5
  warmup = 10
  steps = %STEPS
"""
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'run.gin').write_text(RUN)
  return tmp_path


def build(*bindings, file='run.gin'):
  configuration.load([file], bindings)
  return configuration.build(OptimizerConfig)


def message(*bindings, file='run.gin'):
  with pytest.raises(ConfigError) as error:
    build(*bindings, file=file)
  return str(error.value)


def test_overrides_by_name_and_by_parameter():
  c = build(
    'PEAK=1e-2',
    'OptimizerConfig.end=1e-6',
    'optimizer.OptimizerConfig.warmup = 7',
  )
  assert (c.peak, c.end, c.warmup, c.steps) == (1e-2, 1e-6, 7, 100)
  # What has been said before is forgotten.
  assert build() == OptimizerConfig(peak=1e-3, end=1e-5, warmup=10, steps=100)


def test_the_resolved_configuration_is_a_config_file(here):
  wanted = build('PEAK=1e-2', 'OptimizerConfig.trainable=("a/.*", "b/.*")')
  (here / 'saved.gin').write_text(configuration.resolved())
  assert build(file='saved.gin') == wanted


def test_paths_are_resolved_wherever_the_saved_file_is_opened(
  here, monkeypatch
):
  (here / 'run.gin').write_text(
    HEADER
    + """
from qwenvl_jax.data import sources
from qwenvl_jax.train import init

INIT = 'runs/stage1'
DATA = %WHERE
WHERE = 'data'

init.InitFrom:
  params = %INIT
  vision = '/models/clip'
  decoder = 'gs://bucket/qwen'
sources.Prepared:
  name = 'data'
  data_dir = %DATA
"""
  )

  def read(file):
    configuration.load([file])
    kinds = init.InitFrom, sources.Prepared
    return tuple(configuration.build(kind) for kind in kinds)

  as_written = read('run.gin')
  assert as_written[0].params == 'runs/stage1'
  (here / 'saved.gin').write_text(configuration.resolved())
  # What is going on meanwhile is as it was.
  assert configuration.build(init.InitFrom) == as_written[0]
  (here / 'elsewhere').mkdir()
  monkeypatch.chdir(here / 'elsewhere')
  assert read('../saved.gin') == (
    init.InitFrom(
      f'{here}/runs/stage1', '/models/clip', None, 'gs://bucket/qwen'
    ),
    sources.Prepared('data', data_dir=f'{here}/data'),
  )


def test_files_are_found_here_beside_their_includer_and_in_the_project(here):
  (here / 'deep').mkdir()
  (here / 'deep' / 'base.gin').write_text(RUN)
  (here / 'deep' / 'small.gin').write_text(
    HEADER + "include 'base.gin'\nPEAK = 0.5\n"
  )
  assert build(file='deep/small.gin').peak == 0.5
  # Of the same name as what it specializes, in the project's configs/.
  (here / 'stage3.gin').write_text(
    HEADER + "include 'stage3.gin'\nINIT = 'x'\n"
  )
  configuration.load(['stage3.gin'])
  assert 'warmup = 3000' in configuration.resolved()
  assert f"INIT = '{here}/x'" in configuration.resolved()


def test_the_configuration_of_a_run_in_a_bucket(here, bucket):
  bucket.put('run/config.gin', RUN.encode())
  url = f'{bucket.url}/run/config.gin'
  assert build('STEPS=70', file=url).steps == 70
  (here / 'more.gin').write_text(f"include '{url}'\nSTEPS = 80\n")
  assert build(file='more.gin').steps == 80
  assert 'gs://' in message(file=f'{bucket.url}/none.gin')


@pytest.mark.parametrize(
  ('binding', 'said'),
  [
    ('PEEK=1', 'define no PEEK; did you mean PEAK'),
    ('peak=1', 'did you mean PEAK or OptimizerConfig.peak?'),
    ('OptimizerConfig.peek=1', "named 'peek'; did you mean peak?"),
    ('OptimizrConfig.peak=1', 'did you mean OptimizerConfig'),
    ('optimiser.OptimizerConfig.peak=1', 'mean optimizer.OptimizerConfig'),
    ('OptimizerConfig.trainable=vision', '\'"vision"\''),
    ('PEAK=%PEEK', 'no PEEK is defined; did you mean PEAK?'),
    ('PEAK=@optimiser.split', 'did you mean optimizer?'),
  ],
)
def test_a_misspelt_override_says_what_is_close(binding, said):
  assert said in message(binding)


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ("include 'stage7.gin'", 'did you mean stage'),
    ('from qwenvl_jax.train import optimiser', 'did you mean optimizer?'),
    ('optimiser.OptimizerConfig.peak = 1', 'did you mean optimizer?'),
    ('optimizer.OptimiserConfig.peak = 1', 'did you mean OptimizerConfig'),
    ('from qwenvl_jax.data import packed', 'it is qwenvl_jax.data.packing'),
    ('optimizer.OptimizerConfig.steeps = 1', 'did you mean steps'),
    ('optimizer.OptimizerConfig.peak = ', 'parse value'),
  ],
)
def test_a_misspelt_file_says_what_is_close_and_where(here, text, said):
  (here / 'bad.gin').write_text(RUN + text + '\n')
  error = message(file='bad.gin')
  assert said in error and 'bad.gin' in error


def test_what_took_the_place_of_a_name_of_an_earlier_version_is_said(here):
  text = 'from qwenvl_jax.data import tasks\ntasks.AskedTasks.branches = 6\n'
  (here / 'old.gin').write_text(HEADER + text)
  said = message(file='old.gin')
  assert 'old.gin line 3' in said and 'qwenvl_jax.data.formats.Answers' in said


def test_what_only_another_file_imports_is_said(here):
  text = "include 'run.gin'\noptimizer.OptimizerConfig.peak = 1\n"
  (here / 'more.gin').write_text(HEADER + text)
  said = 'own line: from qwenvl_jax.train import optimizer'
  assert said in message(file='more.gin')


def test_what_is_left_open_must_be_given(here):
  (here / 'open.gin').write_text(RUN.replace('1e-3', '%gin.REQUIRED'))
  error = message(file='open.gin')
  assert 'leave open: PEAK' in error and '--gin.PEAK=VALUE' in error
  assert build('PEAK=2.0', file='open.gin').peak == 2


def test_a_missing_file_and_a_missing_value_are_named(here):
  assert 'did you mean' in message(file='stge1.gin')
  (here / 'half.gin').write_text(RUN.replace('end = 1e-5', ''))
  assert "'end'" in message(file='half.gin')


@pytest.mark.parametrize(
  ('binding', 'said'),
  [
    (
      "PEAK='1e-4'",
      "= '1e-4': wanted is a number that float32 holds; numbers stand",
    ),
    ('OptimizerConfig.steps=4.0', '= 4.0: wanted is a whole number'),
    ('OptimizerConfig.warmup=0.03', '= 0.03: wanted is a whole number'),
    ('STEPS=10.5', '%STEPS = 10.5: wanted is a whole number'),
    ('STEPS=True', '= True: wanted is a whole number'),
    (f'STEPS={2**64}', 'below 2**63'),
    ('STEPS=10**10', 'no Python literal'),
    ('STEPS=None', '= None: wanted is a whole number'),
    ('PEAK=1e999', '= inf: wanted is a number that float32 holds'),
    (f'STEPS=0x{"9" * 5000}', 'STEPS is a number of 20,000 bits'),
    (f'PEAK=[0x{"9" * 5000}]', 'PEAK is a number of 20,000 bits'),
    (f'PEAK={10**400}', 'wanted is a number that float32 holds'),
    ('PEAK=1e-39', 'wanted is a number that float32 holds'),
    (f'STEPS={2**31}', 'counted in int32'),
    ('OptimizerConfig.b1=1.0', 'b1=1.0 is not in [0, 1)'),
    ('OptimizerConfig.weight_decay=-1', 'must not be negative'),
    ('OptimizerConfig.vision_layer_decay=1.5', 'is not in (0, 1]'),
    ("OptimizerConfig.rates={'a': -1}", 'is negative'),
    ('STEPS=-1', 'steps=-1'),
    ('PEAK=-1.0', 'peak=-1.0 must be'),
    ("OptimizerConfig.trainable=('a', 1)", 'a list, each a string'),
    ("OptimizerConfig.rates=('a', 1)", 'a dict of a string'),
    ("OptimizerConfig.rates={'a': 'b'}", 'a dict of a string'),
    ('PEAK=@optimizer.OptimizerConfig()', 'an object of OptimizerConfig'),
    ('PEAK=[%PEAK]', 'leads back to itself'),
    ('PEAK=[', 'no Python literal'),
    ('PEAK=1e-3\nSTEPS=3', 'more than one value'),
    ('PEAK=1\nimport subprocess', 'more than one value'),
    ('PEAK={[1]: 2}', 'no Python literal'),
    ('PEAK=' + '(' * 10**5, 'no Python literal'),
    ('PEAK=\x00', 'no Python literal'),
  ],
)
def test_a_value_of_another_type_is_a_line(binding, said):
  error = message(binding)
  assert said in error and '\n' not in error[:120]


def test_where_a_wrong_value_stands_is_said(here):
  text = RUN.replace('warmup = 10', "warmup = 'ten'")
  (here / 'bad.gin').write_text(text)
  line = text.splitlines().index("  warmup = 'ten'") + 1
  assert f'bad.gin line {line}: OptimizerConfig.warmup' in message(
    file='bad.gin'
  )


@pytest.mark.parametrize(
  'text',
  [
    'import subprocess\nPEAK = @subprocess.getoutput()\n'
    "subprocess.getoutput.cmd = 'touch ran'",
    'from os import path\nPEAK = 1',
    'import qwenvl_jax.entry\nPEAK = @qwenvl_jax.entry.os.system()',
    'from qwenvl_jax import entry\nPEAK = @entry.os.system()\n'
    "entry.os.system.command = 'touch ran'",
    'from qwenvl_jax import entry\nPEAK = @entry.os.getpid()',
    'from qwenvl_jax import buckets\nPEAK = @buckets.remove()\n'
    "buckets.remove.folder = 'kept'",
    'from qwenvl_jax.train import optimizer\n'
    'PEAK = @optimizer.OptimizerConfig.__init__.__globals__()',
    'import qwenvl_jax_of_another\nPEAK = 1',
    'import builtins as qwenvl_jax\nPEAK = @qwenvl_jax.exec()',
    'from qwenvl_jax import errors\nPEAK = @gin.singleton()',
  ],
)
def test_a_config_file_runs_nothing_but_our_classes(here, text):
  (here / 'kept').mkdir()
  (here / 'bad.gin').write_text(f"include 'run.gin'\n{HEADER}{text}\n")
  with pytest.raises(ConfigError):
    build(file='bad.gin')
  assert (here / 'kept').exists() and not (here / 'ran').exists()


@pytest.mark.parametrize(
  'end', ['\u2028', '\x0b', '\x0c', '\x1c', '\x85', '\r']
)
def test_what_else_ends_lines_hides_no_statement(here, end):
  for before in range(4):
    comment = f'# {end * before}include "run.gin"{end}import subprocess{end}#\n'
    text = f'{HEADER}{comment}A = 1\ninclude "run.gin"\n{comment}B = 2\n'
    (here / 'bad.gin').write_bytes(text.encode())
    try:
      configuration.load(['bad.gin'])
    except ConfigError:
      continue
    assert 'subprocess' not in configuration.resolved()


def test_more_packages_are_trusted_by_who_starts_the_command(here, monkeypatch):
  (here / 'of_mine.py').write_text(
    'import dataclasses\n\n@dataclasses.dataclass\nclass A:\n  x: int = 0\n'
  )
  (here / 'mine.gin').write_text(
    f'{HEADER}import of_mine\nfrom qwenvl_jax.train import loop\n'
    'loop.TrainConfig.data = @of_mine.A()\nof_mine.A.x = 3\n'
  )
  monkeypatch.syspath_prepend(here)
  with pytest.raises(ConfigError, match='import only from qwenvl_jax'):
    configuration.load(['mine.gin'])
  monkeypatch.setenv('QWENVL_CONFIG_PACKAGES', 'of_mine')
  configuration.load(['mine.gin'])
  import of_mine

  assert configuration.build(of_mine.A) == of_mine.A(3)


def test_files_that_include_each_other_are_said(here):
  (here / 'a.gin').write_text("include 'b.gin'\n")
  (here / 'b.gin').write_text("A = 1\ninclude 'a.gin'\n")
  assert 'include each other' in message(file='a.gin')
  for n in range(30):
    (here / f'deep{n}.gin').write_text(f"include 'deep{n + 1}.gin'\n")
  (here / 'deep30.gin').write_text('A = 1\n')
  assert '20 deep' in message(file='deep0.gin')


def test_objects_and_names_that_lead_back_to_themselves_are_said(here):
  more = 'optimizer.OptimizerConfig.rates = @optimizer.OptimizerConfig()\n'
  (here / 'a.gin').write_text(f'{RUN}A = %B\nB = %A\n')
  assert 'leads back to itself' in message(file='a.gin')
  (here / 'b.gin').write_text(RUN + more)
  assert 'an object of OptimizerConfig' in message(file='b.gin')
  lines = [f'N{i} = [%N{i + 1}, %N{i + 1}]' for i in range(60)]
  (here / 'c.gin').write_text('\n'.join([RUN, *lines, 'N60 = 1\n']))
  assert 'more than 20000 values' in message(file='c.gin')


@pytest.mark.parametrize('kind', ['folder', 'fifo', 'large', 'bytes', 'long'])
def test_what_is_no_config_file_is_a_line(here, kind):
  path, name = here / 'odd.gin', 'odd.gin'
  if kind == 'folder':
    path.mkdir()
  elif kind == 'fifo':
    os.mkfifo(path)
  elif kind == 'large':
    path.write_text('#' * (2**20 + 1))
  elif kind == 'bytes':
    path.write_bytes(b'A = \xff\xfe')
  else:
    name = 'x' * 5000
  assert len(message(file=name)) < 900


def test_files_as_windows_writes_them(here):
  text = '\ufeff' + RUN.replace('\n', '\r\n')
  (here / 'dos.gin').write_bytes(text.encode())
  assert build(file='dos.gin') == build()


def test_an_include_applies_where_it_stands(here):
  (here / 'base.gin').write_text('A = 1\nB = 1\nC = 1\n')
  (here / 'more.gin').write_text(
    f"{RUN}\nSTEPS = 50\nA = 0\n\ninclude 'base.gin'  # as it is\nB = 2\n"
    "include 'other.gin'\nC = 3\n"
  )
  (here / 'other.gin').write_text('B = 5\nSTEPS = 60\nD = 4\n')
  assert build(file='more.gin').steps == 60
  said = configuration.resolved()
  for line in ('A = 1', 'B = 5', 'C = 3', 'D = 4'):
    assert f'\n{line}\n' in said
