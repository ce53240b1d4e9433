"""The whole model against the released implementation."""

import dataclasses

import flax.linen as nn
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.batch import NO_IMAGE, text_batch
from qwenvl_jax.conversion import layout
from qwenvl_jax.model.config import qwen_vl_7b
from qwenvl_jax.model.loss import next_token_loss
from qwenvl_jax.model.qwen_vl import QwenVL


@pytest.mark.parametrize(
  'name', ['text', 'one_image', 'two_images', 'long_text']
)
def test_logits_of_inference(name):
  e = golden.expected()
  batch = golden.batch(e[f'eval/{name}/ids'])
  logits = np.asarray(golden.apply(True)(golden.params(), batch))
  assert np.abs(logits[:, -64:] - e[f'eval/{name}/logits_last64']).max() < 2e-4
  assert np.abs(logits.sum(-1) - e[f'eval/{name}/logits_sum']).max() < 2e-3


def test_loss_and_every_gradient():
  e, batch = golden.expected(), golden.train_batch()

  @jax.jit
  def value_and_grad(params):
    def loss(params):
      logits = golden.model().apply({'params': params}, batch)
      total, weight = next_token_loss(logits, batch.targets, batch.loss_weights)
      return total / weight, logits

    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, logits), grads = value_and_grad(golden.params())
  assert loss == pytest.approx(float(e['train/loss']), rel=1e-5)
  last = np.asarray(logits)[0, -40:]
  assert np.abs(last - e['train/logits_row0_last40']).max() < golden.ATOL

  norms, compared = golden.grad_norms(), 0
  table = layout.rules(golden.config())
  for name, grad in golden.released_tensors(table, grads).items():
    if name in norms:
      norm = np.linalg.norm(grad.astype(np.float64))
      assert norm == pytest.approx(norms[name], rel=1e-4), name
      compared += 1
    if f'train/grad/{name}' in e:
      wanted = e[f'train/grad/{name}']
      scale = np.abs(wanted).max()
      assert np.abs(grad - wanted).max() < 1e-4 * scale, name
  assert compared == len(norms) == 60


def test_sizes_of_the_release():
  config = qwen_vl_7b()
  batch = text_batch(np.zeros((1, 4)))
  boxed = jax.eval_shape(QwenVL(config).init, jax.random.key(0), batch)
  leaves = dict(layout.flatten(nn.meta.unbox(boxed)['params']))
  assert {p: x.shape for p, x in leaves.items()} == layout.parameter_shapes(
    config
  )
  sizes = {p: int(np.prod(x.shape)) for p, x in leaves.items()}
  assert sum(sizes.values()) == 9_656_935_168
  assert sizes['adapter/pos_embed'] == 1_048_576
  decoder = sum(n for p, n in sizes.items() if layout.part_of(p) == 'decoder')
  assert decoder == 7_721_324_544
  released = layout.released_shapes(layout.rules(config))
  assert len(released) == 853


def test_packed_row_equals_samples_alone():
  """Two samples, each with an image and two branches, in one padded row."""
  e, config = golden.expected(), golden.config()
  prefix = e['eval/one_image/ids'][0][:270].astype(np.int32)
  starts, images = golden.spans(prefix)
  branches = [np.arange(40, 52), np.arange(90, 97)]
  alone = []
  for branch in branches:
    ids = np.concatenate([prefix, branch])[None]
    logits = golden.apply(False)(golden.params(), golden.batch(ids))
    alone.append(np.asarray(logits)[0])

  sample = np.concatenate([prefix, *branches])
  branch_ids = np.repeat([0, 1, 2], [len(prefix), 12, 7])
  n, pad = len(prefix), 5
  positions = np.concatenate(
    [np.arange(n), n + np.arange(12), n + np.arange(7)]
  )
  length = len(sample)
  tokens = np.concatenate([sample, sample, np.zeros(pad, int)])[None]
  batch = dataclasses.replace(
    text_batch(tokens),
    positions=np.concatenate([positions] * 2 + [np.zeros(pad, int)])[None],
    segment_ids=np.repeat([1, 2, 0], [length, length, pad])[None],
    branch_ids=np.concatenate([branch_ids] * 2 + [np.zeros(pad, int)])[None],
    pixels=np.concatenate([images, images, images * 0])[None],
    image_starts=np.array([[starts[0], length + starts[0], NO_IMAGE]]),
  )
  logits = np.asarray(golden.apply(False)(golden.params(), batch))[0]
  for offset in (0, length):
    row = logits[offset : offset + length]
    first, second = alone
    assert np.abs(row[: n + 12] - first).max() < 1e-4
    assert np.abs(row[n + 12 :] - second[n:]).max() < 1e-4
  assert np.isfinite(logits).all()
  assert config.adapter.queries == 256


def test_rows_with_other_numbers_of_images_share_a_program():
  e = golden.expected()
  ids = e['train/ids']
  apply = golden.apply(False)
  mask = e['train/mask']
  together = np.asarray(apply(golden.params(), golden.batch(ids, mask, 2)))
  programs = apply._cache_size()
  for row in range(3):
    only = np.zeros_like(mask)
    only[row] = mask[row]
    batch = golden.batch(np.where(only > 0, ids, 499), only, 2)
    alone = np.asarray(apply(golden.params(), batch))
    real = mask[row] > 0
    assert np.abs(alone[row][real] - together[row][real]).max() < 1e-5
  assert apply._cache_size() == programs


def test_causality():
  """No logit depends on a later token."""
  ids = golden.expected()['eval/text/ids'].astype(np.int32)
  model, params = golden.model(), golden.params()
  batch = text_batch(ids)

  def at(embeddings, position):
    def intercept(next_fun, args, kwargs, context):
      if context.method_name == 'embed_tokens':
        return embeddings
      return next_fun(*args, **kwargs)

    with nn.intercept_methods(intercept):
      return model.apply({'params': params}, batch)[0, position].sum()

  embeddings = params['decoder']['embed'][ids]
  grads = jax.grad(at)(embeddings, 20)
  influence = jnp.abs(grads[0]).max(-1)
  assert (influence[21:] == 0).all()
  assert (influence[:21] > 0).all()


@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_remat_changes_nothing(remat):
  batch = golden.train_batch()

  def loss(params, policy):
    model = QwenVL(golden.config().replace(remat=policy))
    logits = model.apply({'params': params}, batch)
    return next_token_loss(logits, batch.targets, batch.loss_weights)[0]

  grad = jax.jit(jax.grad(loss), static_argnums=1)
  plain = dict(layout.flatten(grad(golden.params(), 'none')))
  saved = dict(layout.flatten(grad(golden.params(), remat)))
  # Some are zero but for rounding: a bias on all keys changes nothing.
  floor = 1e-3 * max(float(np.abs(x).max()) for x in plain.values())
  for path, value in plain.items():
    scale = max(float(np.abs(value).max()), floor)
    assert np.abs(value - saved[path]).max() < 1e-4 * scale, path


def test_bfloat16_stays_close():
  """bf16 activations with float32 softmax, norms and rotary positions."""
  e = golden.expected()
  config = golden.config().replace(dtype='bfloat16')
  batch = golden.batch(e['eval/one_image/ids'])
  logits = QwenVL(config).apply(
    {'params': golden.params()}, batch, inference=True
  )
  assert logits.dtype == jnp.bfloat16
  wanted = e['eval/one_image/logits_last64']
  error = np.abs(np.asarray(logits, np.float32)[:, -64:] - wanted)
  assert error.mean() < 0.02 * np.abs(wanted).max()
