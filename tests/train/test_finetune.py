"""From a folder of pictures to an adapter, by the commands of the manual."""

import json

import fake
import golden
import numpy as np
import pytest
from PIL import Image

import qwenvl_jax
from qwenvl_jax import configuration
from qwenvl_jax.conversion.families.qwen_vl.assets import write_assets
from qwenvl_jax.data import cli
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.train.loop import TrainConfig
from qwenvl_jax.train.main import command
from qwenvl_jax.train.objective import NextToken
from qwenvl_jax.train.optimizer import OptimizerConfig
from qwenvl_jax.train.state import abstract_params, random_params

# The sizes of `fake.small_config`, with the goldens' vocabulary.
SMALL = (
  'VisionConfig.patch_size=14',
  'VisionConfig.width=16',
  'VisionConfig.layers=2',
  'VisionConfig.heads=2',
  'VisionConfig.mlp_dim=32',
  'VisionConfig.position_grid=2',
  'AdapterConfig.dim=16',
  'AdapterConfig.heads=2',
  'DecoderConfig.vocab_size=512',
  'DecoderConfig.dim=16',
  'DecoderConfig.layers=2',
  'DecoderConfig.heads=2',
  'DecoderConfig.head_dim=8',
  'DecoderConfig.mlp_dim=32',
  "QwenVLConfig.dtype='float32'",
  'QwenVLConfig.image_start_id=500',
  'IMAGE_SIZE=28',
  'QUERIES=4',
  'Pipeline.sequence_length=256',
)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A folder with a model, a vocabulary and a prepared data set."""
  folder = tmp_path_factory.mktemp('finetune')
  (folder / 'small.tiktoken').write_text(golden.vocabulary())
  small = fake.small_config()
  decoder = {'vocab_size': 512, 'dim': 16, 'layers': 2, 'heads': 2}
  decoder |= {'head_dim': 8, 'mlp_dim': 32, 'seq_length': 2048}
  config = small.replace(
    decoder=type(small.decoder)(**decoder), image_start_id=500
  )
  whole = OptimizerConfig(peak=1, end=0, warmup=1, steps=2)
  target = abstract_params(NextToken(config), whole, make_mesh())
  golden.save_params(
    folder / 'base', random_params(NextToken(config), target, 0)
  )
  write_assets(folder / 'base', config)
  raw, rng = folder / 'raw', np.random.default_rng(0)
  raw.mkdir()
  entries = []
  for i in range(20):
    pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(raw / f'{i}.png')
    answer = 'red' if i % 2 else 'blue'
    said = ('user', '<image>\nColour?'), ('assistant', answer)
    turns = [{'from': who, 'value': text} for who, text in said]
    entries.append({'id': i, 'image': f'{i}.png', 'conversations': turns})
  entries[3]['conversations'][1]['value'] = 'red ' * 200
  (raw / 'mine.json').write_text(json.dumps(entries))
  for name in ('mine', 'old'):
    cli.main(
      ['prepare', name, '--format', 'conversations', '--manual_dir', str(raw),
       '--data_dir', str(folder / 'data')]
    )  # fmt: skip
  return folder


def bindings(place, *more):
  return [
    f"BASE='{place / 'base'}'",
    f"DATA='{place / 'data'}'",
    f"VOCABULARY='{place / 'small.tiktoken'}'",
    'BATCH=4',
    *more,
  ]


def test_from_pictures_to_an_adapter(place, capsys):
  run = place / 'run'
  given = ['EPOCHS=2.0', 'RANK=2', 'OptimizerConfig.peak=0.01']
  given = bindings(place, *SMALL, *given)
  assert not command(
    ['--gin_file=finetune/lora.gin', f'--workdir={run}',
     *(f'--gin.{x}' for x in given)]
  )  # fmt: skip
  said = ' '.join(capsys.readouterr().err.split())
  assert 'mine: 19 records with 19 pictures' in said
  assert 'mine: the ends of 1 records are cut: ' in said
  records = [
    json.loads(x) for x in (run / 'log.jsonl').read_text().split('\n') if x
  ]
  held = {r['step']: r['heldout_loss'] for r in records if 'heldout_loss' in r}
  *half_epochs, end = held
  assert len(half_epochs) == 3 and end == records[-1]['step']
  assert held[end] < held[half_epochs[0]]
  tokens = fake.rows(0, 1)['tokens'][:, 6:]
  plain = qwenvl_jax.load(place / 'base').logits(tokens)
  for folder in (run, run / 'best'):
    opened = qwenvl_jax.load(place / 'base', adapter=folder)
    assert opened.config.lora.rank == 2
    assert np.abs(opened.logits(tokens) - plain).max() > 0


def test_settings_of_the_release(place):
  """Of its finetune.py: full, LoRA, Q-LoRA."""
  found = {}
  for name in ('full', 'lora', 'qlora'):
    given = bindings(place, 'BATCH=8')
    configuration.load([f'finetune/{name}.gin'], given)
    found[name] = c = configuration.build(TrainConfig)
    o = c.optimizer
    assert (o.peak, o.end, o.b1, o.b2, o.eps) == (1e-5, 0, 0.9, 0.95, 1e-8)
    # 5 epochs of 19 records, 8 a step; a hundredth of them to warm up.
    assert (o.steps, o.warmup, o.weight_decay) == (12, 1, 0.1)
    assert c.data.streams[0].source.part == 'train'
    assert c.heldout.data.streams[0].source.part == 'heldout'
    assert c.heldout.batches == 1
  assert found['full'].optimizer.trainable == ('adapter/.*', 'decoder/.*')
  assert found['full'].objective.config.lora is None
  lora = found['lora'].objective.config.lora
  assert (lora.rank, lora.alpha, lora.dropout) == (64, 16, 0.05)
  assert found['qlora'].objective.config.lora == lora
  assert found['qlora'].objective.config.decoder.int4_group == 128


def test_old_conversations_are_mixed_into_training_alone(place):
  given = bindings(place, 'BATCH=8', "MIX={'old': 1.0}")
  configuration.load(['finetune/lora.gin'], given)
  c = configuration.build(TrainConfig)
  assert [x.source.name for x in c.data.streams] == ['mine', 'old']
  assert [x.source.name for x in c.heldout.data.streams] == ['mine']
  # 5 epochs of 19 records, and as many of others, 8 a step.
  assert (c.optimizer.steps, c.heldout.every, c.heldout.batches) == (24, 3, 1)
