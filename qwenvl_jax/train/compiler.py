"""Options of the TPU compiler for a training step, by generation of chip.

Others' measurements chose them, or the compiler's estimates where docs/pods.md
has them. Further ones, for an experiment, go into the environment:
LIBTPU_INIT_ARGS=--xla_tpu_...
"""

import importlib.metadata

from jax.sharding import Mesh

# Lets collectives run beside the products that do not need their results.
_OVERLAP = {
  'xla_tpu_enable_async_collective_fusion': True,
  'xla_tpu_enable_async_collective_fusion_fuse_all_gather': True,
  'xla_tpu_enable_async_collective_fusion_multiple_steps': True,
  'xla_tpu_overlap_compute_collective_tc': True,
  'xla_enable_async_all_gather': True,
}
# Twice the vector memory that a product gets by default: with less it waits for
# its operands (docs/pods.md).
_MEMORY = {'xla_tpu_scoped_vmem_limit_kib': 32768}
_CUBES = {
  **_OVERLAP,
  'xla_tpu_enable_data_parallel_all_reduce_opt': True,
  'xla_tpu_data_parallel_opt_different_sized_ops': True,
  'xla_tpu_megacore_fusion_allow_ags': False,
  'xla_enable_async_collective_permute': True,
  'xla_tpu_enable_ag_backward_pipelining': True,
}
# By what the kind of a chip contains; v5e and v6e are 'lite', v5p is 'TPU v5'.
_OPTIONS = {
  'lite': {
    **_MEMORY,
    'xla_tpu_enable_async_collective_fusion_fuse_all_reduce': True,
    'xla_enable_async_all_reduce': True,
    'xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter': True,
  },
  'v4': _CUBES,  # Has no more vector memory to give.
  '': {**_MEMORY, **_CUBES},
}
# Later compilers refuse to fuse collectives on other chips than v5e's. Between
# this version and 0.0.52, which does, none was tried.
_FUSES_ON_ALL_CHIPS = (0, 0, 42)
_FUSION = 'xla_tpu_enable_async_collective_fusion'


def compiler_options(mesh: Mesh) -> dict | None:
  """Options for the chips of a mesh, None where there is nothing to say."""
  device = mesh.devices.flat[0]
  if device.platform != 'tpu' or mesh.size == 1:
    return None
  chip = device.device_kind
  options = next(found for kind, found in _OPTIONS.items() if kind in chip)
  if 'v5 lite' in chip or _libtpu() <= _FUSES_ON_ALL_CHIPS:
    return options
  return {k: v for k, v in options.items() if not k.startswith(_FUSION)}


def _libtpu() -> tuple[int, ...]:
  """The first three numbers of the compiler's version; unknown is later."""
  try:
    version = importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:
    return (1,)
  return tuple(map(int, version.split('.')[:3]))
