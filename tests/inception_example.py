"""Random weights of Inception in the PyTorch file's form, images, and features of two data sets.

Run as a program, it computes with torch-fidelity what `golden/inception.npz` holds of them.
"""

from pathlib import Path
import sys
import types

import numpy as np

from evaluation import inception_weights

GOLDEN = Path(__file__).parent / 'golden' / 'inception.npz'
SIZES = ((8, 8), (40, 24), (300, 320))


def weights() -> dict[str, np.ndarray]:
  """State dict of torch-fidelity's network, at a scale that activations keep through it."""
  rng, content = np.random.default_rng(0), {}
  for name, shape in sorted(inception_weights.shapes().items()):
    path, kind = name.rsplit('/', 1)
    path = path.replace('/', '.')
    if path == 'fc':
      value = rng.standard_normal(shape).astype(np.float32)
      content[f'fc.{"weight" if kind == "kernel" else "bias"}'] = value.T.copy()
    elif kind == 'kernel':
      height, width, n_in, n_out = shape
      value = rng.standard_normal((n_out, n_in, height, width), np.float32)
      value *= np.float32(np.sqrt(2 / (height * width * n_in)))
      content[f'{path}.conv.weight'] = value
      content[f'{path}.bn.weight'] = rng.uniform(0.8, 1.2, n_out).astype(np.float32)
      content[f'{path}.bn.bias'] = rng.uniform(-0.2, 0.2, n_out).astype(np.float32)
      content[f'{path}.bn.running_mean'] = rng.uniform(-0.2, 0.2, n_out).astype(np.float32)
      content[f'{path}.bn.running_var'] = rng.uniform(0.8, 1.2, n_out).astype(np.float32)
  return content


def images(height: int, width: int, n: int = 1) -> np.ndarray:
  """Smooth colours with noise, uint8 [n, height, width, 3]."""
  rng = np.random.default_rng(height * width)
  y, x = np.mgrid[:height, :width][..., None] / max(height, width)
  phase = rng.uniform(0, 6, (n, 1, 1, 3))
  waves = np.sin(6 * x + phase) * np.cos(4 * y - phase)
  noise = rng.uniform(-0.3, 0.3, (n, height, width, 3))
  return np.clip(128 + 90 * (waves + noise), 0, 255).astype(np.uint8)


class _Stub(types.ModuleType):
  """torch-fidelity imports torchvision, which its Inception does not use."""

  def __getattr__(self, name: str) -> type:
    if name.startswith('__'):
      raise AttributeError(name)
    return type(name, (), {})


def torch_fidelity():
  """The module torch_fidelity; ImportError where it or PyTorch is not installed."""
  try:
    import torchvision  # noqa: F401
  except ImportError:
    sys.modules['torchvision'] = _Stub('torchvision')
    for name in ('datasets', 'models', 'transforms', 'transforms.functional'):
      stub = sys.modules[f'torchvision.{name}'] = _Stub(name)
      parent = sys.modules[f'torchvision.{name}'.rpartition('.')[0]]
      setattr(parent, name.rpartition('.')[2], stub)
  import torch_fidelity

  return torch_fidelity


def features() -> tuple[np.ndarray, np.ndarray]:
  """Of samples [1500, 24] and of data [1200, 24], alike and yet different."""
  rng = np.random.default_rng(1)
  mix = rng.standard_normal((24, 24)) / 5
  samples, data = rng.standard_normal((1500, 24)), rng.standard_normal((1200, 24))
  return tuple(x.astype(np.float32) for x in (samples @ mix + 0.05, (1.05 * data) @ mix))


def of_torch_fidelity(folder: Path) -> dict[str, np.ndarray]:
  """What torch-fidelity makes of the images and of the features; a folder for the weights."""
  torch_fidelity()
  import torch
  from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
  from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
  from torch_fidelity.interpolate_compat_tensorflow import (
    interpolate_bilinear_2d_like_tensorflow1x as resize,
  )

  path, found = folder / 'weights.pth', {}
  torch.save({name: torch.from_numpy(value) for name, value in weights().items()}, path)
  names = ['2048', 'logits_unbiased']
  net = FeatureExtractorInceptionV3('example', names, feature_extractor_weights_path=str(path))
  for height, width in SIZES:
    x = torch.from_numpy(images(height, width)).permute(0, 3, 1, 2)
    pool_3, logits = net(x)
    small = resize(x.float(), size=(7, 7), align_corners=False)
    large = resize(x.float()[:, :, :9, :9], size=(20, 20), align_corners=False)
    values = {'pool_3': pool_3, 'logits': logits}
    values |= {'small': small.permute(0, 2, 3, 1), 'large': large.permute(0, 2, 3, 1)}
    found |= {f'{height}x{width} {name}': value.numpy() for name, value in values.items()}
  samples, data = (torch.from_numpy(x) for x in features())
  of_samples, of_data = (metric_fid.fid_features_to_statistics(x.double()) for x in (samples, data))
  quiet = {'verbose': False}
  found |= metric_fid.fid_statistics_to_metric(of_samples, of_data, verbose=False)
  found |= metric_isc.isc_features_to_metric(samples, shuffle=False)
  found |= metric_kid.kid_features_to_metric(samples.double(), data.double(), **quiet)
  found |= metric_prc.prc_features_to_metric(samples, data, **quiet)
  return {name: np.asarray(value) for name, value in found.items()}


if __name__ == '__main__':
  np.savez_compressed(GOLDEN, **of_torch_fidelity(Path(sys.argv[1])))
