"""Orbax checkpoints, read and written block by block.

Orbax writes a checkpoint whose arrays are still empty: Zarr, uncompressed, one
chunk a block. TensorStore then fills in one chunk at a time. Any Orbax opens
the result and restores it to any sharding.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging

from qwenvl_jax import buckets
from qwenvl_jax.conversion import layout
from qwenvl_jax.conversion.blocks import Block, covering
from qwenvl_jax.conversion.event_loops import ended_tasks
from qwenvl_jax.conversion.json_schema import read_json
from qwenvl_jax.conversion.rules import Rule
from qwenvl_jax.conversion.tensors import DTYPES, FLOATS, Tensor
from qwenvl_jax.errors import CheckpointError

# For packed checkpoints (OCDBT), as training runs have them: their chunks are
# not our blocks, so that several blocks come from one chunk.
_CACHE_BYTES = 2**30


class _Blank:
  """A leaf of the tree that Orbax saves: an array without values."""

  def __init__(self, shape, dtype, chunk):
    self.shape, self.dtype, self.chunk = shape, np.dtype(dtype), chunk


class _BlankHandler(ocp.type_handlers.NumpyHandler):
  """Makes the arrays; registered as what NumPy arrays are saved as."""

  async def serialize(self, values, infos, args=None):
    for value, info in zip(values, infos, strict=True):
      await info.await_path_creation()
      await tensorstore.open(
        {
          'driver': 'zarr',
          'kvstore': _file(info.path),
          'metadata': {
            'shape': value.shape,
            'chunks': value.chunk,
            'dtype': _zarr_dtype(value.dtype),
            'compressor': None,
            'dimension_separator': '.',
          },
        },
        create=True,
      )
    return []


def _zarr_dtype(dtype: np.dtype) -> str:
  return 'bfloat16' if dtype.name == 'bfloat16' else dtype.str


def _file(path) -> dict:
  if buckets.in_bucket(path):
    bucket, name = buckets.split(path)
    return {'driver': 'gcs', 'bucket': bucket, 'path': f'{name}/'}
  # TensorStore refuses `..`. Whoever publishes the folder syncs all files of it
  # at once.
  path = os.path.realpath(path)
  return {'driver': 'file', 'path': f'{path}/', 'file_io_sync': False}


class OrbaxWriter:
  """Fills a new checkpoint block by block."""

  def __init__(
    self,
    path: Path,
    tensors: Mapping[str, Tensor],
    table: list[Rule],
    chunks: Mapping[str, tuple[int, ...]],
  ):
    """Makes the checkpoint with arrays that have no values yet.

    Args:
      path: new folder.
      tensors: what will be written, by released names.
      table: which parameters they are.
      chunks: parameter path to the shape of its blocks.
    """
    shapes = layout.shapes_of(table)
    tree = layout.unflatten(
      {
        name: _Blank(
          shapes[name], tensors[rule.released_names()[0]].dtype, chunks[name]
        )
        for rule in table
        for name in rule.paths
      }
    )
    # Orbax warns that it has no arrays to put together: they come from here.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
      handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
          (_Blank, _BlankHandler())
        ),
      )
      with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(buckets.absolute(path), ocp.args.PyTreeSave(tree))
    finally:
      logging.set_verbosity(verbosity)
    self._path, self._stores = path, open_stores(path)

  def write(self, block: Block, rows: np.ndarray) -> None:
    """Writes one block of released rows; several threads may.

    Args:
      block: says where they go.
      rows: [block.stop - block.start, ...].
    """
    boxes = block.to_ours(rows)
    pending = [
      self._stores[path][block.box].write(
        box, can_reference_source_data_indefinitely=True
      )
      for path, box in zip(block.paths, boxes, strict=True)
    ]
    try:
      for future in pending:
        future.result()
    except ValueError as error:  # So says TensorStore of a full disk.
      raise CheckpointError(
        f'{self._path}: {" or ".join(block.paths)} cannot be written ({error})'
      ) from error


def metadata(path: Path) -> dict:
  """Tree of the shapes and dtypes of Orbax parameters.

  Raises:
    CheckpointError: they are incomplete or damaged.
  """
  if (path / '_METADATA').exists():
    read_json(path / '_METADATA')  # Orbax would wait for the end of a pipe.
  try:
    # A checkpointer would warn that a training run's step has none of its own.
    with ended_tasks():
      handler = ocp.PyTreeCheckpointHandler()
      return handler.metadata(buckets.absolute(path)).tree
  except Exception as error:
    raise CheckpointError(
      f'{path} cannot be opened as Orbax parameters ({error}); the checkpoint '
      'is incomplete or damaged'
    ) from error


def open_stores(path: Path) -> dict[str, tensorstore.TensorStore]:
  """Parameter path to its array, whichever of its formats Orbax chose.

  Raises:
    CheckpointError: see `metadata`.
  """
  names = [name for name, _ in layout.flatten(metadata(path))]
  root = buckets.absolute(path)
  form = read_json(root / '_METADATA')
  packed = form.get('use_ocdbt', False)
  context = tensorstore.Context(
    {'cache_pool': {'total_bytes_limit': _CACHE_BYTES if packed else 0}}
  )
  opening = {}
  for name in names:
    key = name.replace('/', '.')
    if packed:
      store = {'driver': 'ocdbt', 'base': _file(root), 'path': f'{key}/'}
    else:
      store = _file(root / key)
    opening[name] = tensorstore.open(
      {
        'driver': 'zarr3' if form.get('use_zarr3') else 'zarr',
        'kvstore': store,
        # A chunk that is not there is damage, not zeros.
        'fill_missing_data_reads': False,
      },
      context=context,
      open=True,
    )
  try:
    return {name: future.result() for name, future in opening.items()}
  except ValueError as error:
    raise CheckpointError(
      f'{path} cannot be opened ({error}); a file of it is missing or damaged'
    ) from error


def read_arrays(path: Path) -> dict[str, np.ndarray]:
  """Reads all arrays of a small checkpoint, by path.

  Raises:
    CheckpointError: a file is missing or damaged.
  """
  stores = open_stores(path)
  with _damage_told(path, stores):
    pending = {name: store.read() for name, store in stores.items()}
    return {name: future.result() for name, future in pending.items()}


def open_tensors(path: Path, table: list[Rule]) -> dict[str, Tensor]:
  """Opens parameters as released tensors, which are read a block at a time.

  Args:
    path: an Orbax checkpoint.
    table: of the parameters, as `layout.rules`.

  Returns:
    Released name to tensor. Where rows may begin and end: see
    `blocks.covering`.

  Raises:
    CheckpointError: a parameter is missing, unknown, misshapen or no float, or
      see `metadata`.
  """
  stores = open_stores(path)
  layout.check_shapes(
    layout.shapes_of(table),
    {name: store.shape for name, store in stores.items()},
    str(path),
  )
  for name, store in stores.items():
    dtype = np.dtype(store.dtype.numpy_dtype)
    if dtype not in FLOATS and not layout.is_packed(name):
      raise CheckpointError(
        f'{path}: {name} has dtype {dtype}, which is not supported for '
        f'parameters ({", ".join(DTYPES)})'
      )

  def tensor(rule: Rule, layer: int | None) -> Tensor:
    def read_into(start, rows):
      for block in covering(rule, layer, start, start + len(rows)):
        boxes = [np.empty(block.box_shape, rows.dtype) for _ in block.paths]
        with _damage_told(path, block.paths):
          for name, box in zip(block.paths, boxes, strict=True):
            _read_box(stores[name][block.box], box)
        block.to_released(boxes, rows[block.start - start : block.stop - start])

    dtype = np.dtype(stores[rule.paths[0]].dtype.numpy_dtype)
    return Tensor(rule.shape, dtype, path, read_into)

  return {
    name: tensor(rule, layer) for name, rule, layer in layout.entries(table)
  }


def _read_box(stored: tensorstore.TensorStore, box: np.ndarray) -> None:
  # TensorStore's own `read` into new memory takes three times as long.
  tensorstore.array(box, copy=False, write=True).write(stored).result()


@contextlib.contextmanager
def _damage_told(path: Path, names: Iterable[str]) -> Iterator[None]:
  """Raises CheckpointError for what TensorStore says of damaged files."""
  try:
    yield
  except ValueError as error:
    reason = str(error).split('[')[0].strip()
    raise CheckpointError(
      f'{path}: {layout.some(list(names))} cannot be read ({reason}); a file '
      'of it is missing or damaged'
    ) from error


def restore(path: Path, dtype, placements, keep) -> dict:
  """Restores parameters as Orbax does, whole arrays at a time.

  Args:
    path: an Orbax checkpoint.
    dtype: to cast to, but for packed kernels; None for the stored one.
    placements: path to sharding; what is not in it goes to the first device.
    keep: predicate on paths; others are left out unread.

  Raises:
    CheckpointError: a file is missing or damaged.
  """
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  wanted = layout.unflatten(
    {
      name: jax.ShapeDtypeStruct(
        leaf.shape,
        leaf.dtype if layout.is_packed(name) else dtype or leaf.dtype,
        sharding=placements.get(name, device),
      )
      for name, leaf in layout.flatten(metadata(path))
      if keep(name)
    }
  )
  if not wanted:
    return {}
  try:
    with ended_tasks(), ocp.PyTreeCheckpointer() as checkpointer:
      return checkpointer.restore(
        buckets.absolute(path),
        ocp.args.PyTreeRestore(
          item=wanted,
          restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
          partial_restore=True,
        ),
      )
  except Exception as error:
    # The rest is the whole of TensorStore's settings.
    reason = re.split(r' \[| See full', str(error))[0]
    raise CheckpointError(
      f'{path} cannot be restored ({reason}); a file of it is missing or '
      'damaged'
    ) from error
