"""TPU slices as the compiler knows them, and what a chip of each can do.

Peak, topologies and the bandwidths of memory, interconnect and data center
network are those of Cloud TPU's documentation (cloud.google.com/tpu/docs/v4,
v5e, v5p, v6e); usable memory and clock are what libtpu's compiler says and
uses.
"""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

from qwenvl_jax.errors import ConfigError

GIB = 2**30
# What collectives reach of the links' nominal bandwidth: 180 of 200 GB/s on
# v5e, 540 of 600 on v5p.
_LINK_EFFICIENCY = 0.9


@dataclasses.dataclass(frozen=True)
class Chip:
  """One generation of TPU, per chip.

  Attributes:
    name: as in a topology's name.
    peak_flops: bfloat16 FLOPs a second.
    clock: cycles a second, the unit of the compiler's estimates.
    hbm_bytes: usable memory, where the compiler stops.
    hbm_bandwidth: bytes a second from and to memory.
    link_bandwidth: bytes a second and direction, all links together.
    dcn_bandwidth: bytes a second to other slices.
    topologies: names of the slices that are offered.
    options: what the compiler has to be told about every slice.
  """

  name: str
  peak_flops: float
  clock: float
  hbm_bytes: int
  hbm_bandwidth: float
  link_bandwidth: float
  dcn_bandwidth: float
  topologies: tuple[str, ...]
  options: tuple[tuple[str, Any], ...] = ()

  @property
  def axes(self) -> int:
    """Dimensions of the network that its chips form."""
    return self.topologies[-1].count('x') + 1

  @property
  def collective_bandwidth(self) -> float:
    """Bytes a second of a collective that uses all links."""
    return self.link_bandwidth * _LINK_EFFICIENCY


_PLANES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = (
  *('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8'),
  *('8x8x8', '8x8x16', '8x16x16', '16x16x16'),
)

CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name='v4',
      peak_flops=275e12,
      clock=1.05e9,
      hbm_bytes=int(30.75 * GIB),
      hbm_bandwidth=1228e9,
      link_bandwidth=300e9,
      dcn_bandwidth=6.25e9,  # Not documented; as v5p, whose hosts are alike.
      topologies=_CUBES,
      options=(('chip_config_name', 'megacore'),),
    ),
    Chip(
      name='v5e',
      peak_flops=197e12,
      clock=1.5e9,
      hbm_bytes=int(15.75 * GIB),
      hbm_bandwidth=819e9,
      link_bandwidth=200e9,
      dcn_bandwidth=3.125e9,
      topologies=_PLANES,
    ),
    Chip(
      name='v5p',
      peak_flops=459e12,
      clock=1.75e9,
      hbm_bytes=int(95.74 * GIB),
      hbm_bandwidth=2765e9,
      link_bandwidth=600e9,
      dcn_bandwidth=6.25e9,
      topologies=(*_CUBES, '16x16x24'),
    ),
    Chip(
      name='v6e',
      peak_flops=918e12,
      clock=1.75e9,
      hbm_bytes=int(31.25 * GIB),
      hbm_bandwidth=1640e9,
      link_bandwidth=400e9,
      dcn_bandwidth=12.5e9,
      topologies=_PLANES,
    ),
  )
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Some slices of TPU chips.

  Attributes:
    chip: of which generation.
    shape: chips along each dimension of a slice.
    slices: number of equal slices, connected by the data center network.
  """

  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    """As `parse` reads it, with the slices in front if there are several."""
    slice_name = f'{self.chip.name}:{"x".join(map(str, self.shape))}'
    return slice_name if self.slices == 1 else f'{self.slices} x {slice_name}'

  @property
  def chips(self) -> int:
    """Number of chips, all slices together."""
    return self.slices * math.prod(self.shape)


def parse(name: str, slices: int = 1) -> Topology:
  """Reads a topology such as 'v5e:16x16', so many slices of it.

  Raises:
    ConfigError: there is no such topology; says which there are.
  """
  generation, _, shape = name.partition(':')
  chip = CHIPS.get(generation)
  if chip is None:
    raise ConfigError(
      f'--topology={name}: the TPU generations are {", ".join(CHIPS)}; write '
      'generation and shape, e.g. v5e:16x16 or v5p:4x4x4'
    )
  if shape not in chip.topologies:
    raise ConfigError(
      f'--topology={name}: the slices of {generation} are '
      + ', '.join(f'{generation}:{shape}' for shape in chip.topologies)
    )
  if slices < 1:
    raise ConfigError(f'--slices={slices}: there must be at least one')
  return Topology(chip, tuple(map(int, shape.split('x'))), slices)


def devices(topology: Topology) -> Sequence:
  """The chips, for `make_mesh` and to compile for; nothing runs on them.

  Raises:
    ConfigError: libtpu, which holds the compiler, is missing or refuses.
  """
  if not importlib.util.find_spec('libtpu'):
    raise ConfigError(
      "libtpu, which holds the TPU's compiler, is not installed: pip install "
      "'qwenvl_jax[plan]' (there is one for Linux on x86-64)"
    )
  _prepare_environment()
  options = dict(topology.chip.options)
  if topology.shape == (1, 1):
    options['chips_per_host_bounds'] = (1, 1, 1)
  if topology.chip.axes == 3 and all(n % 4 == 0 for n in topology.shape):
    # Cubes of 64 chips are closed to a torus by optical switches.
    options['wrap'] = (True, True, True)
  if topology.slices > 1:
    options['num_slices'] = topology.slices
  slice_name = dataclasses.replace(topology, slices=1).name
  try:
    found = topologies.get_topology_desc(
      platform='tpu', topology_name=slice_name, **options
    )
  except (RuntimeError, ValueError) as error:
    text = ' '.join(str(error).split())
    raise ConfigError(
      f'the compiler refuses topology {topology.name}: {text[:400]}'
    ) from error
  return found.devices


def _prepare_environment() -> None:
  """Keeps libtpu from looking for the machine's own chips.

  It would ask a metadata server that only Cloud machines have, and complain
  about each thing that it does not learn there.
  """
  for name, value in (
    ('TPU_SKIP_MDS_QUERY', '1'),
    ('TPU_ACCELERATOR_TYPE', 'v5litepod-1'),
    ('TPU_WORKER_HOSTNAMES', 'localhost'),
    ('TPU_WORKER_ID', '0'),
    # Tests, and a plan beside another one, load it several times.
    ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
  ):
    os.environ.setdefault(name, value)
