"""Low-rank factors beside frozen kernels, against what PEFT computes."""

import functools

import golden
import jax
import jax.numpy as jnp
import lora_golden
import numpy as np
import pytest

from qwenvl_jax.conversion import adapters, peft
from qwenvl_jax.conversion.low_rank import LowRank
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.model.lora import LoraConfig
from qwenvl_jax.model.loss import next_token_loss
from qwenvl_jax.model.qwen_vl import QwenVL
from qwenvl_jax.model.stacking import unstack_layers
from qwenvl_jax.train.optimizer import flatten, unflatten


@functools.cache
def config():
  return golden.config().replace(lora=lora_golden.adapter('chat').lora)


def adapted(name):
  """(values of the adapter, all parameters with them), layers stacked."""
  values = dict(lora_golden.adapter(name).values)
  return values, unflatten(flatten(golden.params()) | values)


@functools.cache
def gradient():
  @jax.jit
  def run(values, params, batch):
    def loss(values):
      whole = unflatten(flatten(params) | values)
      logits = QwenVL(config()).apply({'params': whole}, batch)
      total, weight = next_token_loss(logits, batch.targets, batch.loss_weights)
      return total / weight

    return jax.value_and_grad(loss)(values)

  return run


@pytest.mark.parametrize('name', lora_golden.NAMES)
def test_loss_and_gradients_of_peft(name):
  values, params = adapted(name)
  loss, grads = gradient()(values, params, golden.train_batch())
  wanted = float(lora_golden.expected()[f'{name}/train/loss'])
  np.testing.assert_allclose(loss, wanted, rtol=1e-5)
  adapter = lora_golden.adapter(name)
  grads = LowRank(adapter.lora, adapter.base, jax.device_get(grads), 'grads')
  found = {
    key: np.linalg.norm(np.float64(x).ravel())
    for key, x in peft.tensors_of(grads, golden.config()).items()
  }
  wanted = {
    key.replace('.modules_to_save.default', '').replace('.default', ''): norm
    for key, norm in lora_golden.read(name, 'grad_norms.json').items()
  }
  assert found.keys() == wanted.keys()
  for key, norm in wanted.items():
    np.testing.assert_allclose(found[key], norm, rtol=1e-4, err_msg=key)


@functools.cache
def logits():
  made = config().replace(scan_layers=False)
  return jax.jit(
    lambda params, batch: QwenVL(made).apply(
      {'params': params}, batch, inference=True
    )
  )


@pytest.mark.parametrize('case', ('text', 'one_image', 'two_images'))
@pytest.mark.parametrize('name', lora_golden.NAMES)
def test_logits_of_peft_with_layers_apart(name, case):
  apart = adapters.applied(
    unstack_layers(golden.params()),
    golden.config(),
    lora_golden.adapter(name),
  )
  batch = golden.batch(golden.expected()[f'eval/{case}/ids'])
  found = logits()(apart, batch)[:, -64:]
  wanted = lora_golden.expected()[f'{name}/{case}/logits_last64']
  np.testing.assert_allclose(found, wanted, atol=golden.ATOL)


def test_dropout_is_of_the_adapters_inputs_alone():
  lora = LoraConfig(rank=8, alpha=16, dropout=0.5)
  model = QwenVL(golden.config().replace(lora=lora))
  batch = golden.batch(golden.expected()['eval/text/ids'])
  _, params = adapted('chat')
  one = functools.partial(model.apply, {'params': params}, batch)
  still = one()
  first, second = (one(rngs={'dropout': jax.random.key(i)}) for i in (0, 1))
  assert not np.allclose(first, still, atol=1e-3)
  assert not np.allclose(first, second, atol=1e-3)
  # Without a second factor nothing is left of it.
  zeros = {
    path: jnp.zeros_like(x) if path.endswith('lora_b') else x
    for path, x in flatten(params).items()
  }
  one = functools.partial(model.apply, {'params': unflatten(zeros)}, batch)
  np.testing.assert_array_equal(one(rngs={'dropout': jax.random.key(0)}), one())


def test_targets_that_match_nothing_are_told_with_near_ones():
  with pytest.raises(ConfigError, match='decoder/blocks/mlp/up'):
    LoraConfig(targets=('decoder/mlp/up',))
  with pytest.raises(ConfigError, match='near are decoder/blocks/attn/qkv$'):
    LoraConfig(targets=('c_attn',))
  with pytest.raises(ConfigError, match='matches no projection; known are'):
    LoraConfig(targets=('xyz',))
