"""What fine-tuning keeps on a chip: full, LoRA and Q-LoRA, without compiling.

  python benchmarks/finetune_memory.py [--topology v5e:1x1 ..]

Exact for parameters and optimizer state; of the activations a lower bound, for
rows of 2,048 tokens with one picture of 448 pixels. What the compiler needs in
all is what `qwenvl-plan --gin_file=finetune/qlora.gin --topology v5e:1x1
--gin.RECORDS=400 --gin.IMAGE_SLOTS=1` says (minutes of compiling).
"""

import argparse
import dataclasses

import jax
from rich.console import Console
from rich.table import Table

from qwenvl_jax import configuration
from qwenvl_jax.plan import jobs, memory, topology
from qwenvl_jax.plan.main import UNREAD
from qwenvl_jax.plan.topology import GIB
from qwenvl_jax.sharding import data_shards, make_mesh
from qwenvl_jax.train.loop import TrainConfig


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    '--topology', nargs='*', default=['v5e:1x1', 'v5e:2x2', 'v5e:2x4']
  )
  flags = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  table = Table(title='GiB a chip')
  columns = ('', 'chips', 'rows', 'frozen', 'trained', 'optimizer', 'at least')
  for column in (*columns, 'of', 'trained parameters'):
    table.add_column(column, justify='right')
  for name in ('full', 'lora', 'qlora'):
    for place in flags.topology:
      table.add_row(name, *row(name, topology.parse(place)))
  Console(width=120).print(table)


def row(name: str, wanted: topology.Topology) -> list[str]:
  """The figures of one configuration on one slice."""
  given = ['RECORDS=400', 'IMAGE_SLOTS=1', *UNREAD]
  configuration.load([f'finetune/{name}.gin'], given)
  config = configuration.build(TrainConfig, whole=False)
  devices = topology.devices(wanted)
  shards = data_shards(make_mesh(config.mesh, devices))
  # One row a chip at a time.
  accumulation = config.data.batch_size // shards
  config = dataclasses.replace(config, accumulation=accumulation)
  job = jobs.make('train', config, devices)
  sizes = memory.Sizes.of(config, job.params)
  kept = [size / GIB for size in job.kept_bytes.values()]
  fixed = sum(job.kept_bytes.values())
  layers = config.objective.config.decoder
  tokens = config.data.sequence_length
  # Inputs of all decoder layers, logits and their gradient, summed gradients.
  rest = 2 * tokens * (layers.layers * layers.dim + 2 * layers.vocab_size)
  rest += 4 * sizes.trained / wanted.chips
  return [
    str(wanted.chips),
    '1',
    *(f'{x:.2f}' for x in kept),
    f'{(fixed + rest) / GIB:.2f}',
    f'{wanted.chip.hbm_bytes / GIB:.2f}',
    f'{sizes.trained:,}',
  ]


if __name__ == '__main__':
  main()
