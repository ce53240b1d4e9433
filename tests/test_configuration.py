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
    ('optimizer.OptimizerConfig.steeps = 1', 'did you mean steps'),
    ('optimizer.OptimizerConfig.peak = ', 'parse value'),
  ],
)
def test_a_misspelt_file_says_what_is_close_and_where(here, text, said):
  (here / 'bad.gin').write_text(RUN + text + '\n')
  error = message(file='bad.gin')
  assert said in error and 'bad.gin' in error


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
