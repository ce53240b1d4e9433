import base64
import io
import struct
import zlib

import pytest
from PIL import Image

from qwenvl_jax.serve import pictures as pictures_lib
from qwenvl_jax.serve.limits import ApiError, Limits

SIDE = 12


def open_pictures(urls, limits):
  return pictures_lib.open_pictures(urls, limits, SIDE)


def url(data):
  return f'data:;base64,{base64.b64encode(data).decode()}'


def encoded(picture, form='PNG', **settings):
  buffer = io.BytesIO()
  picture.save(buffer, form, **settings)
  return buffer.getvalue()


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'P', 'L', 'LA', '1', 'I;16'])
def test_pictures_of_all_modes_are_rgb(mode):
  data = encoded(Image.new(mode, (3, 2)))
  (found,) = open_pictures([url(data)], Limits())
  assert found.size == (3, 2)
  assert (found.pixels.shape, found.pixels.dtype) == ((SIDE, SIDE, 3), 'uint8')


def test_odd_ones():
  cmyk = encoded(Image.new('CMYK', (5, 4)), 'JPEG')
  frames = [Image.new('RGB', (4, 4), color) for color in ('red', 'blue')]
  moving = encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])
  turned = Image.Exif()
  turned[0x0112] = 6
  turned = encoded(Image.new('RGB', (8, 2)), 'JPEG', exif=turned)
  dot = encoded(Image.new('RGB', (1, 1)))
  found = open_pictures([url(x) for x in (cmyk, moving, turned, dot)], Limits())
  assert [x.size for x in found] == [(5, 4), (4, 4), (2, 8), (1, 1)]
  # The first frame.
  assert found[1].pixels[0, 0, 0] > 200


def bomb(width, height):
  """A PNG of few bytes that says it is large."""

  def chunk(kind, data):
    code = struct.pack('>I', zlib.crc32(kind + data))
    return struct.pack('>I', len(data)) + kind + data + code

  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', header)
    + chunk(b'IDAT', zlib.compress(b'\0' * 1000))
    + chunk(b'IEND', b'')
  )


def test_large_pictures_are_refused_by_their_header(monkeypatch):
  monkeypatch.setattr(
    Image.Image, 'load', lambda self: pytest.fail('decoded'), raising=False
  )
  for size in (60_000, 60_000), (2**31 - 1, 2**31 - 1), (9000, 9000):
    with pytest.raises(ApiError, match='pixels together'):
      open_pictures([url(bomb(*size))], Limits())


def test_a_jpeg_of_a_thousand_scans_is_not_decoded(monkeypatch):
  data = encoded(Image.new('L', (16, 16), 99), 'JPEG')
  assert open_pictures([url(data)], Limits())
  scan = data[data.index(b'\xff\xda') : -2]
  monkeypatch.setattr(
    Image.Image, 'load', lambda self: pytest.fail('decoded'), raising=False
  )
  with pytest.raises(ApiError, match='not a readable'):
    open_pictures([url(data[:-2] + scan * 1000 + data[-2:])], Limits())


def test_budgets_are_of_all_pictures_together():
  small = url(encoded(Image.new('RGB', (10, 10))))
  limits = Limits(images=3, image_pixels=250)
  assert len(open_pictures([small] * 2, limits)) == 2
  with pytest.raises(ApiError, match='picture 3: .* 250 pixels'):
    open_pictures([small] * 3, limits)
  with pytest.raises(ApiError, match='4 pictures are more than the 3'):
    open_pictures([small] * 4, limits)


@pytest.mark.parametrize(
  'data',
  [
    b'',
    b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n',
    encoded(Image.new('RGB', (4, 4)), 'TIFF'),
    encoded(Image.new('RGB', (4, 4)), 'PPM'),
    encoded(Image.new('RGB', (40, 40)), 'JPEG')[:200],
    bomb(40, 40),
  ],
  ids=['nothing', 'svg', 'eps', 'tiff', 'ppm', 'cut', 'short'],
)
def test_what_is_no_picture(data):
  with pytest.raises(ApiError, match='picture 1 is not a readable') as caught:
    open_pictures([url(data)], Limits())
  # Nothing of Pillow's words, which have addresses in them.
  assert '0x' not in str(caught.value)
