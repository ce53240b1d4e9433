"""Low-rank adapters of any layout: opened, applied, merged, converted."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from qwenvl_jax import buckets
from qwenvl_jax.conversion import checkpoint_io, convert, low_rank, peft
from qwenvl_jax.conversion.atomic import new_folder, new_local_folder
from qwenvl_jax.conversion.base_digest import digest
from qwenvl_jax.conversion.blocks import Block
from qwenvl_jax.conversion.families.qwen_vl import assets
from qwenvl_jax.conversion.layout import flatten, is_packed, unflatten
from qwenvl_jax.conversion.low_rank import Base, LowRank
from qwenvl_jax.conversion.source import Source
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model import int8
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.stacking import unstack_layers


def open_adapter(folder: Path, base: Path, config: QwenVLConfig) -> LowRank:
  """Reads an adapter, and checks that it is one of a model.

  Args:
    folder: in PEFT's layout, in ours, or a training run.
    base: folder of the model.
    config: of the model.

  Raises:
    CheckpointError: it is damaged, or of another model by sizes or values.
  """
  if not folder.is_dir():
    raise CheckpointError(
      f'{folder} does not exist: expected an adapter (of PEFT, or of ours)'
    )
  if low_rank.is_ours(folder):
    adapter = low_rank.read_ours(folder)
  elif peft.is_peft(folder):
    adapter = peft.read(folder, config)
  else:
    raise CheckpointError(
      f'{folder} is no adapter: it has neither {peft.CONFIG} (PEFT) nor '
      f'{low_rank.FILE} (a training run with low-rank factors)'
    )
  adapter.check_fits(config, str(base))
  check_base(adapter.base, base, str(folder))
  return adapter


def base_of(folder: Path) -> Base:
  """Names a model, with its digest."""
  return Base(str(buckets.absolute(folder)), digest(folder))


def check_base(wanted: Base, base: Path, where: str) -> None:
  """Raises CheckpointError if an adapter is not of the model in a folder."""
  if wanted.digest is None:
    return
  found = digest(base)
  if found != wanted.digest:
    raise CheckpointError(
      f'{where} was trained on {wanted.folder} (digest {wanted.digest[:8]}), '
      f'but {base} has other values (digest {found[:8]}): name that base'
    )


def applied(
  params: dict, config: QwenVLConfig, adapter: LowRank, shardings=None
) -> dict:
  """Adds an adapter to a model for inference, unmerged.

  Args:
    params: of the model, its layers apart.
    config: of the model.
    adapter: see `open_adapter`.
    shardings: tree of shardings of the whole; None for the first device.

  Returns:
    The parameters of the model with `QwenVLConfig.lora`: factors are added,
    and what was trained whole takes its place.
  """
  stacked = unflatten(dict(adapter.values))
  # A tree without layers is not one with layers apart.
  stacked['decoder'] = {'blocks': {}} | stacked.get('decoder', {})
  tree = unstack_layers(stacked)
  if config.decoder.int8:
    tree = int8.quantize_params(tree)
  placements = dict(flatten(shardings or {}))
  leaves = dict(flatten(params))
  dtype = leaves['decoder/embed'].dtype
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  for path, x in flatten(tree):
    x = np.asarray(x).astype(leaves[path].dtype if path in leaves else dtype)
    leaves[path] = jax.device_put(x, placements.get(path, device))
  return unflatten(leaves)


@dataclasses.dataclass(frozen=True)
class MergedSource(Source):
  """A model with an adapter added to its kernels.

  Attributes:
    source: of the model, its values in float32.
    adapter: see `open_adapter`.
    dtypes: of the sums, by path.
  """

  source: Source
  adapter: LowRank
  dtypes: dict[str, np.dtype]

  def position(self, block: Block) -> tuple:
    return self.source.position(block)

  def read(self, block: Block) -> list[np.ndarray]:
    return [
      self._merged(path, block, values).astype(self.dtypes[path])
      for path, values in zip(block.paths, self.source.read(block), strict=True)
    ]

  def _merged(self, path: str, block: Block, values) -> np.ndarray:
    if path in self.adapter.values:
      return np.asarray(self.adapter.values[path])[block.box]
    factors = self._factors(path)
    if factors is None:
      return values
    layers, *box = block.box
    first, second = factors
    inputs = first.ndim - 2
    first = first[(layers, *box[:inputs])]
    second = second[(layers, slice(None), *box[inputs:])]
    merged = np.array(values)
    for layer, a, b in zip(merged, first, second, strict=True):
      layer += np.float32(self.adapter.lora.scale) * np.tensordot(a, b, 1)
    return merged

  def _factors(self, path: str):
    """Both factors of a kernel in float32, None if it is not adapted."""
    module, _, name = path.rpartition('/')
    second = self._float(f'{module}/lora_b')
    if name != 'kernel' or second is None:
      return None
    shared = f'{module.rpartition("/")[0]}/qkv/lora_a'
    first = self._float(f'{module}/lora_a')
    return self._float(shared) if first is None else first, second

  def _float(self, path: str) -> np.ndarray | None:
    found = self.adapter.values.get(path)
    return None if found is None else np.asarray(found, np.float32)


def merge(
  base: Path,
  folder: Path,
  destination: Path,
  dtype: str | None = None,
  progress: convert.Progress = lambda done, total: None,
) -> convert.Converted:
  """Writes a model with an adapter merged into its kernels.

  W + alpha / rank * B A in float32, then rounded, as PEFT merges.

  Args:
    base: folder of the model, of any layout. Packed kernels are dequantized.
    folder: see `open_adapter`.
    destination: a new folder, for a checkpoint of ours.
    dtype: of the result; None for that of the base, bfloat16 where it is
      packed.
    progress: told how many bytes of how many are done.

  Raises:
    CheckpointError: the adapter is not of the base, see `open_adapter`; or see
      `convert.from_hf`.
  """
  stored = checkpoint_io.read_config(base)
  config = checkpoint_io.dequantized(stored)
  checkpoint_io.check_whole(base)
  adapter = open_adapter(folder, base, config)
  kind = convert.dtype_of(dtype)
  if stored.decoder.int4_group is not None:
    source, _ = checkpoint_io.open_dequantized(base, stored)
    kept = dict(source.dtypes)
    packed = np.dtype('bfloat16')
    kept = {p: packed if d == np.float32 else d for p, d in kept.items()}
  else:
    kept = checkpoint_io.open_source(base, config)[0].dtypes
    source, _ = checkpoint_io.open_source(base, config, 'float32')
  dtypes = {
    path: kind or stored for path, stored in kept.items() if not is_packed(path)
  }
  values = MergedSource(source, adapter, dtypes)
  notes = convert.write_ours(values, config, base, destination, progress)
  return convert.Converted(config, tuple(notes))


def to_peft(run: Path, destination: Path, base: str | None = None) -> LowRank:
  """Writes an adapter of ours in PEFT's layout.

  Args:
    run: a training run with low-rank factors, or an adapter of ours.
    destination: a new folder on a disk.
    base: what the adapter names as its model; None for what it was trained on.

  Raises:
    CheckpointError: it is no such run, or PEFT has no form of what it trained.
  """
  if not low_rank.is_ours(run):
    raise CheckpointError(
      f'{run} has no {low_rank.FILE}: expected a training run with low-rank '
      'factors (finetune/lora.gin)'
    )
  adapter = low_rank.read_ours(run)
  config = checkpoint_io.read_config(run)
  adapter.check_fits(config, str(run))
  tensors = peft.tensors_of(adapter, config)
  settings = peft.config_of(adapter, base or adapter.base.folder)
  size = sum(x.nbytes for x in tensors.values())
  with new_local_folder(destination, size) as partial:
    peft.write(partial, tensors, settings)
  return adapter


def from_peft(folder: Path, base: Path, destination: Path) -> LowRank:
  """Writes an adapter of PEFT's as one of ours, bound to a model.

  Args:
    folder: in PEFT's layout.
    base: folder of the model that it is for.
    destination: a new folder.

  Raises:
    CheckpointError: see `open_adapter`.
  """
  if not peft.is_peft(folder):
    raise CheckpointError(f'{folder} has no {peft.CONFIG}: no adapter of PEFT')
  config = checkpoint_io.read_config(base)
  adapter = open_adapter(folder, base, config)
  named = base_of(base)
  size = sum(x.nbytes for x in adapter.values.values())
  with new_folder(destination, size) as partial:
    low_rank.write_ours(partial, dataclasses.replace(adapter, base=named))
    assets.write_assets(partial, config)
  return adapter
