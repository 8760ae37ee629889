"""What the chapters share: trained models, and drawing."""

import importlib

import jax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
import numpy as np

from builders.setup import Setup
from main import default_workdir
from models.score import ModelScore
import run_lib
from sde_lib import ScoreFn


def trained(path: str, variant: str = '') -> tuple[Setup, ModelScore]:
  """The model of a config, from its workdir under runs/, where it is trained if it is not yet."""
  workdir = default_workdir(path, variant)
  module = importlib.import_module(path.removesuffix('.py').replace('/', '.'))
  config = module.get_config(*([variant] if variant else []))
  config.training.snapshot_sampling = False
  run_lib.train(config, workdir)  # returns at once if there is nothing to do
  setup, params = run_lib.load(workdir)
  return setup, setup.model.bind(params)


def panels(n: int, size: float = 3.2, rows: int = 1) -> tuple[Figure, np.ndarray]:
  """A figure of rows of n panels."""
  figure, axes = plt.subplots(
    rows, n, figsize=(n * size, rows * size), squeeze=False, layout='constrained'
  )
  return figure, axes if rows > 1 else axes[0]


def plane(extent: float, n: int) -> np.ndarray:
  """Points [n^2, 2] of a square grid, row by row from below."""
  line = np.linspace(-extent, extent, n)
  x, y = np.meshgrid(line, line)
  return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32)


def at_eps(setup: Setup, points: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """Points with the smallest time, as a score function takes them."""
  return jnp.asarray(points), jnp.full(len(points), setup.config.training.eps)


def shade(ax: Axes, values: np.ndarray, extent: float, title: str, cmap: str = 'Blues') -> None:
  """A picture of values [n^2] over `plane`."""
  n = round(len(values) ** 0.5)
  box = (-extent, extent, -extent, extent)
  ax.imshow(np.reshape(values, (n, n)), origin='lower', extent=box, cmap=cmap)
  frame(ax, extent, title)


def arrows(ax: Axes, score_fn: ScoreFn, t: float, extent: float, n: int = 21) -> None:
  """Directions of a score at time t, as long as the square root of its norm."""
  points = plane(0.95 * extent, n)
  score = np.asarray(score_fn(jnp.asarray(points), jnp.full(len(points), t)))
  norm = np.linalg.norm(score, axis=1, keepdims=True)
  score = score / np.sqrt(np.maximum(norm, 1e-9))
  ax.quiver(*points.T, *score.T, color='0.25', width=0.004)


def scatter(ax: Axes, x: np.ndarray, extent: float, title: str) -> None:
  """Points [N, 2]."""
  ax.scatter(*np.asarray(x)[:, :2].T, s=1, alpha=0.5, linewidths=0, color='tab:blue')
  frame(ax, extent, title)


def frame(ax: Axes, extent: float, title: str) -> None:
  """A square without ticks."""
  ax.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[], aspect='equal')
  ax.set_title(title, fontsize=9)


def show_images(ax: Axes, x: jax.Array, columns: int, title: str) -> None:
  """Images [N, H, W, 1] in [-1, 1], row by row."""
  n, h, w, _ = x.shape
  tiles = np.pad(np.asarray(x).reshape(n // columns, columns, h, w), ((0, 0),) * 2 + ((1, 1),) * 2)
  ax.imshow(
    np.concatenate(np.concatenate(tiles, axis=1), axis=1), cmap='gray', vmin=-1, vmax=1,
    interpolation='bicubic',
  )  # fmt: skip
  ax.set(xticks=[], yticks=[])
  ax.set_title(title, fontsize=9)
