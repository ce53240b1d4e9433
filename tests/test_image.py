import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax import image
from qwenvl_jax.errors import DataError


def _encode(picture, kind='PNG', **options):
  stream = io.BytesIO()
  picture.save(stream, kind, **options)
  return stream.getvalue()


def _gradient(mode='RGB', size=(64, 48)):
  x = np.linspace(0, 255, size[0], dtype=np.uint8)
  return Image.fromarray(np.tile(x, (size[1], 1))).convert(mode)


def test_squashes_with_pillows_bicubic():
  picture = _gradient()
  pixels = image.pixels(_encode(picture), 28)
  expected = picture.resize((28, 28), Image.Resampling.BICUBIC)
  assert pixels.dtype == np.uint8 and pixels.shape == (28, 28, 3)
  np.testing.assert_array_equal(pixels, np.asarray(expected))


@pytest.mark.parametrize('mode', ['L', '1', 'P', 'CMYK', 'YCbCr', 'LAB', 'HSV'])
def test_every_mode_becomes_rgb(mode):
  picture = _gradient().convert(mode) if mode != 'LAB' else None
  if picture is None:
    picture = Image.new('LAB', (9, 9))
  assert image.load(picture).mode == 'RGB'


def test_cmyk_jpeg_looks_alike():
  cmyk = image.load(_encode(_gradient('CMYK'), 'JPEG', quality=95))
  rgb = np.asarray(_gradient(), np.float32)
  assert np.abs(np.asarray(cmyk) - rgb).mean() < 8


def test_sixteen_bits_scale_to_eight():
  deep = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(8, 0)
  pixels = np.asarray(image.load(_encode(Image.fromarray(deep))))
  assert pixels[0, 0, 0] == 0 and pixels[0, -1, 0] == 255
  assert abs(int(pixels[0, 32, 0]) - 128) <= 2
  # A dark picture stays dark: the scale is the format's, not the content's.
  dark = image.load(_encode(Image.fromarray(deep // 100)))
  assert np.asarray(dark).max() <= 3


def test_wide_integers_and_floats_scale_by_their_maximum():
  values = np.array([[0, 500, 1000]])
  for dtype in (np.int32, np.float32):
    picture = Image.fromarray(values.astype(dtype))
    assert np.asarray(image.load(picture))[0, :, 0].tolist() == [0, 128, 255]
  small = Image.fromarray(np.array([[0, 7, 200]], np.int32))
  assert np.asarray(image.load(small))[0, :, 0].tolist() == [0, 7, 200]
  broken = Image.fromarray(np.array([[np.nan, np.inf, 1]], np.float32))
  assert image.load(broken).mode == 'RGB'


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'PA'])
def test_transparent_pixels_are_white(mode):
  colour = (0,) * len(Image.new(mode, (1, 1)).getbands())
  picture = Image.new(mode, (4, 4), colour)
  assert np.asarray(image.load(picture)).min() == 255


def test_transparent_colour_of_a_palette_is_white():
  picture = Image.new('P', (4, 4), 0)
  picture.putpalette([255, 0, 0, 0, 0, 255])
  picture.putpixel((1, 0), 1)
  pixels = np.asarray(image.load(_encode(picture, transparency=0)))
  assert pixels[0, 0].tolist() == [255, 255, 255]
  assert pixels[0, 1].tolist() == [0, 0, 255]


def test_exif_orientation_is_applied():
  picture = Image.new('RGB', (40, 20), 'black')
  picture.paste('white', (0, 0, 20, 20))
  exif = Image.Exif()
  exif[0x0112] = 6  # Turn clockwise by 90 degrees to see it upright.
  loaded = image.load(_encode(picture, 'JPEG', exif=exif))
  assert loaded.size == (20, 40)
  assert np.asarray(loaded)[5, 10].min() > 200
  assert np.asarray(loaded)[35, 10].max() < 50


@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
def test_damaged_exif_does_not_hide_the_picture():
  encoded = _encode(_gradient(), 'JPEG', exif=b'Exif\0\0II*\0\xff\xff\xff\x7f')
  assert image.load(encoded).size == (64, 48)


def test_first_frame_of_an_animation():
  frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')]
  encoded = _encode(
    frames[0], 'GIF', save_all=True, append_images=frames[1:], duration=50
  )
  assert np.asarray(image.load(encoded))[0, 0].tolist() == [255, 0, 0]


def _bomb(side):
  """A PNG that says it is huge and is a few bytes."""

  def chunk(name, data):
    check = struct.pack('>I', zlib.crc32(name + data))
    return struct.pack('>I', len(data)) + name + data + check

  header = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', header)
    + chunk(b'IDAT', zlib.compress(b'\0' * 100))
    + chunk(b'IEND', b'')
  )


@pytest.mark.parametrize('side', [9_300, 60_000])
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_huge_pictures_are_refused_unopened(side):
  with pytest.raises(DataError, match=r'a/record: .*80,000,000.*smaller'):
    image.load(_bomb(side), 'a/record')


@pytest.mark.parametrize(
  'broken',
  [
    b'',
    b'not a picture',
    _encode(_gradient())[:90],
    _encode(_gradient(), 'JPEG')[:400],
    _encode(_gradient())[:-30],
    _bomb(100),
  ],
)
def test_broken_pictures_name_the_record(broken):
  with pytest.raises(DataError, match='a/record: not a readable picture'):
    image.load(broken, 'a/record')


def test_files_are_named(tmp_path):
  with pytest.raises(DataError, match='nowhere.png: no such file'):
    image.load(tmp_path / 'nowhere.png')
  with pytest.raises(DataError, match='is a folder'):
    image.load(str(tmp_path))
  (tmp_path / 'text.png').write_text('words')
  with pytest.raises(DataError, match='text.png: not a readable picture'):
    image.load(str(tmp_path / 'text.png'))
  (tmp_path / 'good.png').write_bytes(_encode(_gradient()))
  assert image.load(str(tmp_path / 'good.png')).size == (64, 48)


def test_arrays_are_checked():
  array = np.zeros((4, 5, 3), np.uint8)
  assert image.load(array).size == (5, 4)
  for wrong in (array.astype(np.float32), array[..., 0]):
    with pytest.raises(DataError, match='r1: an array of'):
      image.load(wrong, 'r1')


def test_only_regular_files_are_opened(tmp_path):
  os.mkfifo(tmp_path / 'pipe.png')
  for path in (tmp_path / 'pipe.png', '/dev/zero'):
    with pytest.raises(DataError, match='is no regular file'):
      image.load(path)


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'TIFF', 'WEBP', 'AVIF', 'GIF'])
def test_damaged_pictures_are_bad_records_whatever_fails(kind):
  """Pillow's readers raise RuntimeError, struct.error and others."""
  exif = Image.Exif()
  exif[0x0112] = 6
  options = {} if kind == 'GIF' else {'exif': exif}
  data = _encode(_gradient(), kind, **options)
  outcomes = set()
  for seed in range(150):
    rng = random.Random(seed)
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 3, 20))):
      damaged[rng.randrange(min(len(data), 400))] = rng.randrange(256)
    try:
      outcomes.add(image.load(bytes(damaged), 'r').mode)
      assert 1 <= image.stored_orientation(bytes(damaged)) <= 8
    except DataError:
      outcomes.add('refused')
  assert outcomes == {'RGB', 'refused'}
