"""Images of any depth, shape and size become what one sees in them."""

import io
from pathlib import Path
import struct
import subprocess
import sys
import zlib

import numpy as np
from PIL import Image
import pytest

from data import deep, geometry
from data.decoding import Decoder
from data.sources import load
from runtime.errors import UserError


def picture(bits, channels=1, shape=(8, 8)):
  """A ramp over that many bits, and the same in the high 8 of them."""
  ramp = np.linspace(0, 2**bits - 1, shape[0] * shape[1]).round().astype(np.int64).reshape(shape)
  values = np.stack([ramp if i % 2 == 0 else ramp[::-1] for i in range(channels)], -1)
  return values, (values >> (bits - 8)).astype(np.uint8)


def png(values, significant=b'', interlace=0):
  """16 bits a channel, which Pillow does not write: grey, grey and alpha, RGB, RGBA."""
  height, width, channels = values.shape
  kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
  rows = values.astype('>u2')
  raw = b''.join(b'\0' + row.tobytes() for row in rows)

  def chunk(name, data):
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))

  header = struct.pack('>IIBBBBB', width, height, 16, kind, 0, 0, interlace)
  told = chunk(b'sBIT', significant) if significant else b''
  body = chunk(b'IHDR', header) + told + chunk(b'IDAT', zlib.compress(raw)) + chunk(b'IEND', b'')
  return b'\x89PNG\r\n\x1a\n' + body


def tiff(values, order='<', bits=16, tags=()):
  """RGB of 16 bits a channel, or grey."""
  height, width, channels = values.shape
  data = values.astype(f'{order}u2').tobytes()
  entries = [
    (256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1),
    (262, 3, 2 if channels == 3 else 1), (273, 4, 8), (277, 3, channels), (278, 4, height),
    (279, 4, len(data)), *tags,
  ]  # fmt: skip
  end = 8 + len(data)
  extra = end + 2 + 12 * len(entries) + 4
  directory, outside = struct.pack(f'{order}H', len(entries)), b''
  for tag, kind, value in sorted(entries):
    if tag == 258 and channels == 3:
      where = struct.pack(f'{order}I', extra)
      outside = struct.pack(f'{order}3H', bits, bits, bits)
      directory += struct.pack(f'{order}HHI', tag, kind, 3) + where
    else:
      code = {3: 'H2x', 4: 'I'}[kind]
      directory += struct.pack(f'{order}HHI', tag, kind, 1) + struct.pack(f'{order}{code}', value)
  head = (b'II' if order == '<' else b'MM') + struct.pack(f'{order}HI', 42, end)
  return head + data + directory + bytes(4) + outside


def write(folder, files):
  for name, data in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, bytes):
      (folder / name).write_bytes(data)
    else:
      Image.fromarray(data).save(folder / name)


def source(folder, size=8, channels=1, **decoder):
  options = {'image_size': size, 'num_channels': channels, 'path': str(folder)}
  return load('folder', 'train', **options, decoder=Decoder(channels, **decoder))


@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
@pytest.mark.parametrize('kind', ['uint16', 'int32', 'float', 'rgb', 'tiff', 'big_tiff', 'alpha'])
def test_bits_in_larger_files_are_seen(tmp_path, caplog, bits, kind):
  """Whatever holds them; a second, dark image of the folder keeps its place beside the first."""
  channels = {'rgb': 3, 'tiff': 3, 'big_tiff': 3, 'alpha': 2}.get(kind, 1)
  values, shown = picture(bits, channels)
  encode = {
    'uint16': lambda v: v[..., 0].astype(np.uint16),
    'int32': lambda v: v[..., 0].astype(np.int32),
    'float': lambda v: v[..., 0].astype(np.float32),
    'rgb': png, 'alpha': png, 'tiff': tiff, 'big_tiff': lambda v: tiff(v, '>'),
  }[kind]  # fmt: skip
  suffix = 'png' if kind in ('uint16', 'rgb', 'alpha') else 'tif'
  if kind == 'alpha':
    values = np.dstack([values[..., 0], np.full((8, 8), 65535)])
    shown = np.dstack([shown[..., 0], np.full((8, 8), 255, np.uint8)])
  dark = values // 8 if kind != 'alpha' else values // [8, 1]
  write(tmp_path, {f'a.{suffix}': encode(values), f'b.{suffix}': encode(dark)})
  got = source(tmp_path, channels=channels)
  np.testing.assert_array_equal(got[0], shown)
  assert abs(got[1][..., 0].astype(int) - shown[..., 0] // 8).max() <= 1
  assert ('--config.data.white=' in caplog.text) == (bits < 16)


@pytest.mark.parametrize(
  ('values', 'expected'),
  [
    (np.float32([[0, 0.25], [0.5, 1]]), [[0, 64], [128, 255]]),
    (np.float32([[0, 0.001], [0.002, 0.003]]), [[0, 85], [170, 255]]),
    (np.float32([[-1, -0.5], [0, 1]]), [[0, 64], [128, 255]]),
    (np.float32([[-1000, 0], [1000, 3000]]), [[0, 64], [128, 255]]),
    (np.int32([[-1000, 0], [1000, 3000]]), [[0, 64], [128, 255]]),
    (np.int32([[0, 25000], [50000, 100000]]), [[0, 64], [128, 255]]),
    (np.int32([[0, 1], [1, 0]]), [[0, 255], [255, 0]]),
    (np.uint16([[0, 1], [2, 3]]), [[0, 85], [170, 255]]),
    (np.float32([[0, 85], [170, 255]]), [[0, 85], [170, 255]]),
  ],
)
def test_other_ranges(tmp_path, values, expected):
  write(tmp_path, {'a.tif': values})
  np.testing.assert_allclose(source(tmp_path, 2)[0][..., 0], expected, atol=1)


def test_what_files_tell_is_believed(tmp_path, caplog):
  """Twelve significant bits, whether the samples are spread over 16, as PNG has it, or not."""
  values, shown = picture(12)
  half = values // 2
  for name, tells in (
    ('low', {'a.png': png(half, b'\x0c')}),
    ('spread', {'a.png': png(half << 4, b'\x0c'), 'b.png': png(values << 4, b'\x0c')}),
    ('tag', {'a.tif': tiff(half, tags=[(281, 3, 4095)])}),
    ('pgm', {'a.pgm': b'P5 8 8 4095\n' + half.astype('>u2').tobytes()}),
  ):
    write(tmp_path / name, tells)
    got = source(tmp_path / name)[0]
    assert abs(got.astype(int) - shown // 2).max() <= 1, name
  assert (
    '4095' in caplog.text and caplog.text.count('do not tell') == 1
  )  # of the first, which could
  caplog.clear()
  write(tmp_path / 'fixed', {'a.png': half[..., 0].astype(np.uint16)})
  fixed = source(tmp_path / 'fixed', span=deep.Span(0, 4095))
  assert abs(fixed[0].astype(int) - shown // 2).max() <= 1 and not caplog.text


def test_the_range_is_of_both_splits_and_of_images_that_are_looked_at_once(tmp_path, monkeypatch):
  values, shown = picture(12)
  bright, dark = values[..., 0].astype(np.uint16), (values[..., 0] // 16).astype(np.uint16)
  write(tmp_path, {'train/a.png': dark, 'train/b.png': dark // 2, 'test/c.png': bright})
  options = {'image_size': 8, 'num_channels': 1, 'path': str(tmp_path)}
  got = load('folder', 'train', **options)[0]
  assert abs(got.astype(int) - shown // 16).max() <= 1
  looks = []
  monkeypatch.setattr(deep, 'LOOKED_AT', 1)
  monkeypatch.setattr(deep, 'spread', lambda n, most: looks.append(n) or [0])
  write(tmp_path / 'rare', {'a.png': shown[..., 0], 'b.png': bright, 'c.png': bright})
  rare = source(tmp_path / 'rare')
  for i in (1, 2):
    np.testing.assert_array_equal(rare[i], shown)
  assert looks == [3]


def test_turned_images_of_16_bits(tmp_path):
  values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(values).save(tmp_path / 'a.png', exif=exif)
  np.testing.assert_array_equal(source(tmp_path)[0][..., 0], np.rot90(values >> 8, -1))


# Shapes


@pytest.mark.parametrize('shape', [(8, 8), (8, 24), (24, 8), (5, 15), (1, 3), (30, 90)])
def test_fits(shape):
  image = Image.fromarray(np.full((*shape, 3), (10, 200, 90), np.uint8))
  for fit, covered in (('crop', 64), ('stretch', 64), ('pad', 64 * min(shape) / max(shape))):
    pixels = Decoder(3, fit=fit, background='#ff0000').pixels(image, 8)
    is_image = (pixels == (10, 200, 90)).all(-1)
    assert abs(is_image.sum() - covered) <= 8 and (fit != 'pad' or is_image.sum() % 8 == 0)
    np.testing.assert_array_equal(
      pixels[~is_image], np.broadcast_to((255, 0, 0), (64 - is_image.sum(), 3))
    )
  rows = np.uint8(np.linspace(0, 250, 24)[None].repeat(8, 0))
  wide = Image.fromarray(rows)
  np.testing.assert_array_equal(Decoder(1).pixels(wide, 8)[..., 0], rows[:, 8:16])
  middle = Decoder(1, fit='pad', background='black').pixels(wide, 24)[..., 0]
  np.testing.assert_array_equal(middle[8:16], rows)
  assert not middle[:8].any() and not middle[16:].any()


def test_channels_and_what_is_transparent():
  rgba = np.zeros((4, 4, 4), np.uint8)
  rgba[:2], rgba[2:] = (200, 100, 0, 255), (7, 8, 9, 0)
  grey = Image.fromarray(rgba).convert('RGB').convert('L').getpixel((0, 0))
  image = Image.fromarray(rgba)
  blue = Decoder(3, background='blue').pixels(image, 4)
  assert blue[0, 0].tolist() == [200, 100, 0] and blue[3, 3].tolist() == [0, 0, 255]
  assert Decoder(3).pixels(image, 4)[3, 3].tolist() == [255] * 3
  assert Decoder(1, background='#808080').pixels(image, 4)[[0, 3], 0, 0].tolist() == [grey, 128]
  np.testing.assert_array_equal(Decoder(4).pixels(image, 4), rgba)
  assert Decoder(2).pixels(image, 4)[0, 0].tolist() == [grey, 255]
  assert Decoder(2).pixels(image, 4)[3, 3, 1] == 0
  small = Decoder(4).pixels(image, 2)[0, 0]  # the hidden colour does not bleed
  assert abs(small[:3].astype(int) - [200, 100, 0]).max() <= 1 and 128 < small[3] < 255
  for opaque in ('L', 'RGB', 'P', '1', 'CMYK'):
    whole = Image.new('RGB', (4, 4), 'white').convert(opaque)
    assert (Decoder(4).pixels(whole, 4) == 255).all() and (Decoder(2).pixels(whole, 4) == 255).all()
  padded = Decoder(4, fit='pad').pixels(image.crop((0, 0, 4, 2)), 4)
  assert padded[0, 0, 3] == 0 and padded[1, 0].tolist() == [200, 100, 0, 255]


def test_mistakes():
  with pytest.raises(UserError, match="background='whit' is no colour"):
    Decoder(3, background='whit')
  with pytest.raises(UserError, match=r"data\.fit 'cop' does not exist; .*did you mean 'crop'"):
    Decoder(3, fit='cop')
  with pytest.raises(UserError, match='fit = pad is for folders'):
    load('FFHQ', 'train', image_size=8, num_channels=3, path='x', decoder=Decoder(fit='pad'))


# Size


@pytest.mark.parametrize('size', [(2000, 1), (1, 2000), (3, 1900), (500, 20)])
def test_long_images_are_those_of_the_whole_resized(size):
  image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (*size[::-1], 3), np.uint8))
  place = geometry.cropped(image.size, 16)
  whole = image.resize((place.width, place.height), Image.Resampling.BILINEAR)
  expected = whole.crop((place.left, place.top, place.left + 16, place.top + 16))
  got = geometry.placed(image, place, 16)
  assert abs(np.asarray(got).astype(int) - np.asarray(expected)).max() <= 1


def test_long_images_take_little_memory():
  """All of this one, resized, would be 1,024,000 x 512 pixels, 2 GB."""
  code = """if True:
    from PIL import Image
    from data.decoding import Decoder
    image = Image.new('RGB', (2000, 1), 'red')
    for fit in ('crop', 'pad', 'stretch'):
      assert (Decoder(3, fit=fit).pixels(image, 512)[255, 9] == (255, 0, 0)).all(), fit
    print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])
  """
  root = Path(geometry.__file__).parent.parent
  told = subprocess.run([sys.executable, '-c', code], cwd=root, check=True, capture_output=True)
  assert int(told.stdout) < 300_000  # kB


def test_large_jpegs_are_decoded_small_and_others_name_the_field(monkeypatch):
  monkeypatch.setattr('data.decoding._REDUCE_ABOVE', 1000)
  ramp = np.uint8(np.linspace(0, 255, 256))[None].repeat(128, 0)
  data = io.BytesIO()
  Image.fromarray(ramp).save(data, 'JPEG', quality=95)
  image = Image.open(data)
  decoder = Decoder(1, fit='stretch', max_pixels=64 * 32)
  got = decoder.pixels(image, 16)[8, :, 0].astype(int)
  assert image.size == (64, 32)
  assert abs(got - np.linspace(7.5, 247.5, 16)).max() <= 3
  plain = io.BytesIO()
  Image.fromarray(ramp).save(plain, 'PNG')
  with pytest.raises(
    ValueError, match=r'256x128 pixels are more than config\.data\.max_pixels = 2048'
  ):
    decoder.pixels(Image.open(plain), 16)
  assert Decoder(1, max_pixels=2**15).pixels(Image.open(plain), 16).shape == (16, 16, 1)
