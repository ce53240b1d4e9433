"""Composed scenes as records: pictures with exact annotations.

Sprites of one to three everyday things, and sometimes a painted word, on a
background of one colour, with exact boxes and names in English and Chinese.
A scene depends on the seed, its split and its number only, so a larger set
starts with the same scenes.
"""

import dataclasses
import io
import random
import zlib

from qwenvl_jax.data import records
from qwenvl_jax.data.builders import compose

# To learn from; layouts not seen there, from the same distribution; and
# pictures with a thing on a background colour on which it never stands in the
# others (`things.held_out`).
SPLITS = ('train', 'test', 'combos')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScenesConfig:
  """A set of scenes.

  Attributes:
    train, test, combos: number of scenes in each split.
    seed: scenes of different seeds have nothing in common.
    style: what scenes look like.
  """

  train: int = 10000
  test: int = 600
  combos: int = 300
  seed: int = 0
  style: compose.Style = compose.Style()


# By what `--config` calls them; 'small' is to try things out.
CONFIGS = {
  'default': ScenesConfig(),
  'small': ScenesConfig(train=400, test=60, combos=40),
}


def draw(config: ScenesConfig, split: str, number: int) -> records.Scene:
  """Draws scene `number` of a split; its picture is a PNG."""
  rng = random.Random(f'scenes-{config.seed}-{split}-{number}')
  drawn = compose.compose(rng, config.style, combos=split == 'combos')
  encoded = io.BytesIO()
  # Fast, and small on the flat areas that scenes are made of.
  drawn.image.save(encoded, 'PNG', compress_level=1, compress_type=zlib.Z_RLE)
  return dataclasses.replace(
    drawn, id=f'scenes/{split}/{number:06d}', image=encoded.getvalue()
  )
