"""Low-rank adapters of any layout: opened, applied, merged, converted."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from qwenvl_jax import buckets
from qwenvl_jax.conversion import (
  checkpoint_io,
  convert,
  layout,
  low_rank,
  peft,
)
from qwenvl_jax.conversion.atomic import new_folder, new_local_folder
from qwenvl_jax.conversion.base_digest import digest
from qwenvl_jax.conversion.blocks import covering
from qwenvl_jax.conversion.families.qwen_vl import assets
from qwenvl_jax.conversion.families.qwen_vl.lora_table import lora_rules
from qwenvl_jax.conversion.layout import flatten, unflatten
from qwenvl_jax.conversion.low_rank import Base, LowRank
from qwenvl_jax.conversion.rules import Rule
from qwenvl_jax.conversion.tensors import Tensor
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


def identity(folder: Path) -> str:
  """Gives a digest of a model, or of an adapter of ours with its base.

  Raises:
    CheckpointError: it is neither, or damaged.
  """
  if not low_rank.is_ours(folder):
    return digest(folder)
  adapter = low_rank.read_ours(folder)
  found = hashlib.blake2b(repr(adapter.lora).encode(), digest_size=16)
  found.update((adapter.base.digest or '').encode())
  for path, x in sorted(adapter.values.items()):
    found.update(path.encode())
    found.update(np.ascontiguousarray(x, np.float32))
  return found.hexdigest()


def merged(
  tensors: Mapping[str, Tensor], adapter: LowRank, config: QwenVLConfig
) -> dict[str, Tensor]:
  """Adds an adapter to the weights of a model, W + alpha / rank * B A.

  Args:
    tensors: of the model, by their released names.
    adapter: see `open_adapter`.
    config: of the model.

  Returns:
    Released name to tensor; what is adapted or replaced is float32.
  """
  factors = low_rank.released(
    adapter, lora_rules(config.replace(lora=adapter.lora))
  )
  return {
    name: _merged(tensors[name], name, rule, layer, adapter, factors)
    for name, rule, layer in layout.entries(layout.rules(config))
  }


def _merged(
  tensor: Tensor, name: str, rule: Rule, layer: int | None, adapter, factors
) -> Tensor:
  module = name.removesuffix('.weight')
  first, second = (factors.get(f'{module}.lora_{x}.weight') for x in 'AB')
  whole = [path for path in rule.paths if path in adapter.values]
  if second is None and not whole:
    return tensor
  stored = tensor.cast(name, np.float32)

  def read_into(start, rows):
    stored.read_into(start, rows)
    stop = start + len(rows)
    if second is not None:
      rows += np.float32(adapter.lora.scale) * (second[start:stop] @ first)
    for block in covering(rule, layer, start, stop) if whole else ():
      views = block.views(rows[block.start - start : block.stop - start])
      for path, view in zip(block.paths, views, strict=True):
        if path in whole:
          view[...] = adapter.values[path][block.box]

  return dataclasses.replace(stored, read_into=read_into)


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
    tensors, _ = checkpoint_io.open_dequantized(base, stored)
    dtypes = {
      name: np.dtype('bfloat16') if x.dtype == np.float32 else x.dtype
      for name, x in tensors.items()
    }
  else:
    tensors, _ = checkpoint_io.open_tensors(base, config, 'float32')
    kept, _ = checkpoint_io.open_tensors(base, config)
    dtypes = {name: x.dtype for name, x in kept.items()}
  made = {
    name: x.cast(name, dtypes[name] if kind is None else kind)
    for name, x in merged(tensors, adapter, config).items()
  }
  notes = convert.write_ours(made, config, base, destination, progress)
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
