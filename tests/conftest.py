"""What every test runs under: one CPU device, and compiled programs kept."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile

import pytest
from fake_storage import FakeStorage

# Before anything imports JAX. Tests are about one CPU device unless they ask
# for more (`run_on_devices`).
os.environ['JAX_PLATFORMS'] = 'cpu'
# Tests spend their time compiling small programs that run for milliseconds.
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')
# For the length of the run, tests and their subprocesses share compiled
# programs: many compile the same tiny model.
_COMPILED = None
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _COMPILED = tempfile.mkdtemp(prefix='qwenvl_jax_tests_')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _COMPILED


def pytest_unconfigure():
  if _COMPILED:
    shutil.rmtree(_COMPILED, ignore_errors=True)


@pytest.fixture(scope='session')
def cloud():
  """The one stand-in of a test run: clients remember where they went first."""
  if not importlib.util.find_spec('gcsfs'):
    pytest.skip("needs the extra 'gcs'")
  storage = FakeStorage()
  # Before any client is imported.
  os.environ |= storage.environ()
  yield storage
  storage.close()


@pytest.fixture
def bucket(cloud):
  """A new, empty bucket."""
  yield cloud.new_bucket()
  cloud.before = None


@pytest.fixture
def run_on_devices(tmp_path):
  """Runs Python source in a process of its own with several CPU devices.

  A process settles its number of devices once, when JAX starts, so that a test
  of sharding cannot share the process of the others:

      def test_mesh(run_on_devices):
        run_on_devices(8, 'import jax; assert jax.device_count() == 8')
  """

  def run(devices: int, source: str) -> str:
    script = tmp_path / 'script.py'
    script.write_text(source, encoding='utf-8')
    done = subprocess.run(
      [sys.executable, str(script)],
      env=os.environ | {'JAX_NUM_CPU_DEVICES': str(devices)},
      capture_output=True,
      text=True,
    )
    assert not done.returncode, f'{done.stdout}\n{done.stderr}'
    return done.stdout

  return run
