"""A digest is of a model's values, whatever folder they are in."""

import shutil

import golden
import jax
import lora_golden
import numpy as np

import qwenvl_jax
from qwenvl_jax.conversion import adapters, low_rank


def test_a_model_is_known_by_its_values(tmp_path):
  copy, changed = tmp_path / 'copy', tmp_path / 'changed'
  shutil.copytree(golden.FOLDER, copy)
  (copy / 'notes.txt').write_text('not of the checkpoint')
  assert qwenvl_jax.digest(copy) == qwenvl_jax.digest(golden.FOLDER)
  tree = jax.tree.map(np.array, golden.params())
  tree['decoder']['blocks']['mlp']['up']['kernel'][1, 0, 0] += 1
  changed.mkdir()
  shutil.copy(golden.FOLDER / 'config.json', changed)
  golden.save_params(changed, tree)
  assert qwenvl_jax.digest(changed) != qwenvl_jax.digest(golden.FOLDER)


def test_an_adapter_is_another_model_than_its_base(tmp_path):
  adapter = lora_golden.adapter('chat')
  low_rank.write_ours(tmp_path, adapter)
  assert adapters.identity(tmp_path) != adapters.identity(golden.FOLDER)
