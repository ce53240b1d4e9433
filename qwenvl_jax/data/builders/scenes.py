"""TFDS builder `scenes`: composed pictures with exact annotations.

Splits:
  train: to learn from.
  test: layouts not seen in training, from the same distribution.
  combos: every picture has a thing on a background colour on which it never
    stands in `train` or `test` (`things.held_out`).

A scene depends on the seed, its split and its number only, so a larger build
starts with the same scenes. Written as array_record; needs no TensorFlow.
"""

import dataclasses
import io
import random
import zlib
from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds

from qwenvl_jax.data import things
from qwenvl_jax.data.builders import compose

_DESCRIPTION = """\
Sprites of one to three everyday things, and sometimes a painted word, on a
background of one colour, with exact boxes and names in English and Chinese.
Sprites: Noto Emoji by Google, images under Apache-2.0.
"""


OnScene = Callable[[str, compose.Drawing], None]


@dataclasses.dataclass(kw_only=True)
class ScenesConfig(tfds.core.BuilderConfig):
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


class Scenes(tfds.core.GeneratorBasedBuilder):
  """Builder of composed scenes."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First version.'}
  BUILDER_CONFIGS = [
    ScenesConfig(name='default', description='10,000 scenes of 84 px.'),
    ScenesConfig(
      name='small',
      description='500 scenes, to try things out.',
      train=400,
      test=60,
      combos=40,
    ),
  ]

  def __init__(self, *, on_scene: OnScene | None = None, **kwargs):
    """As any TFDS builder.

    Args:
      on_scene: called with the split and the drawing of each scene.
      **kwargs: of `tfds.core.GeneratorBasedBuilder`.
    """
    self._on_scene = on_scene or (lambda split, drawing: None)
    kwargs.setdefault('file_format', 'array_record')
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    side = self.builder_config.style.side
    return tfds.core.DatasetInfo(
      builder=self,
      # Pipelines shuffle; in order, scene n of a split is record n.
      disable_shuffling=True,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          'id': tfds.features.Text(),
          'image': tfds.features.Image(
            shape=(side, side, 3), encoding_format='png'
          ),
          'things': tfds.features.Sequence(
            tfds.features.ClassLabel(names=[x.en for x in things.THINGS])
          ),
          # x1, y1, x2, y2 in pixels, upper bounds excluded.
          'boxes': tfds.features.Tensor(shape=(None, 4), dtype=np.int32),
          'colour': tfds.features.ClassLabel(
            names=[x.en for x in things.COLOURS]
          ),
          'texture': tfds.features.ClassLabel(names=things.TEXTURES),
          'words': tfds.features.Sequence(tfds.features.Text()),
          # Four corners in pixels, clockwise from the upper left of the word.
          'quads': tfds.features.Tensor(shape=(None, 4, 2), dtype=np.float32),
        }
      ),
      homepage='https://github.com/googlefonts/noto-emoji',
      license='Sprites: Apache-2.0 (Noto Emoji, Google)',
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Everything is drawn here.
    config = self.builder_config
    return {
      name: self._generate_examples(name, getattr(config, name))
      for name in ('train', 'test', 'combos')
      if getattr(config, name)
    }

  def _generate_examples(self, split, count):
    config = self.builder_config
    for number in range(count):
      rng = random.Random(f'scenes-{config.seed}-{split}-{number}')
      drawing = compose.compose(rng, config.style, combos=split == 'combos')
      scene_id = f'scenes/{split}/{number:06d}'
      yield scene_id, to_record(scene_id, drawing)
      self._on_scene(split, drawing)


def to_record(scene_id: str, drawing: compose.Drawing) -> dict:
  """The record of a drawing, as the builder's features take it."""
  encoded = io.BytesIO()
  # Fast, and small on the flat areas that scenes are made of.
  drawing.picture.save(
    encoded, 'PNG', compress_level=1, compress_type=zlib.Z_RLE
  )
  objects, texts = drawing.objects, drawing.texts
  return {
    'id': scene_id,
    'image': encoded.getvalue(),
    'things': [x.thing for x in objects],
    'boxes': np.array([x.box for x in objects], np.int32).reshape(-1, 4),
    'colour': drawing.colour,
    'texture': drawing.texture,
    'words': [x.word for x in texts],
    'quads': np.array([x.quad for x in texts], np.float32).reshape(-1, 4, 2),
  }
