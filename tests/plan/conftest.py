import importlib.util

import pytest

from qwenvl_jax import configuration
from qwenvl_jax.plan import topology
from qwenvl_jax.plan.main import UNREAD
from qwenvl_jax.train.loop import TrainConfig

# A Qwen-VL of two layers each that a TPU's tiles fit.
SMALL = (
  'VisionConfig.layers=2',
  'VisionConfig.width=128',
  'VisionConfig.heads=2',
  'VisionConfig.mlp_dim=256',
  'DecoderConfig.layers=2',
  'DecoderConfig.dim=256',
  'DecoderConfig.heads=2',
  'DecoderConfig.mlp_dim=512',
  'DecoderConfig.vocab_size=512',
  'AdapterConfig.dim=256',
  'AdapterConfig.heads=2',
  'IMAGE_SIZE=56',
  'QUERIES=16',
  'IMAGE_SLOTS=1',
  'PACKER=None',
  'Pipeline.sequence_length=256',
  'Pipeline.batch_size=16',
  'TrainConfig.accumulation=2',
  'MeshConfig.tensor=1',
  "QwenVLConfig.remat='full'",
)


@pytest.fixture(scope='session')
def small():
  return SMALL


@pytest.fixture(scope='session')
def libtpu():
  """Skips where the TPU's compiler is not installed."""
  if not importlib.util.find_spec('libtpu'):
    pytest.skip('needs libtpu')


@pytest.fixture(scope='session')
def configured():
  """A stage as configured, small: (stage, *bindings) -> `TrainConfig`."""

  def build(
    stage: str, *bindings: str, small: bool = True, files=()
  ) -> TrainConfig:
    changes = SMALL if small else ()
    configuration.load([stage, *files], [*changes, *bindings, *UNREAD])
    return configuration.build(TrainConfig, whole=False)

  return build


@pytest.fixture(scope='session')
def pod(libtpu):
  """Name of a topology -> (topology, its devices)."""

  def found(name: str, slices: int = 1):
    wanted = topology.parse(name, slices)
    return wanted, topology.devices(wanted)

  return found
