"""Shapes as types: what the arrays of public signatures are, in jaxtyping's notation.

An axis is a letter: b the rows of a batch, *d what a row of data is made of, be it an image or a
point. A letter is one length throughout a signature: (x: Data, t: PerRow) -> Data says that the
result has the shape of x, and t a number for each row of x. In use these are annotations alone; the
tests check them at run time (tests/conftest.py).
"""

from typing import TypedDict

from jax import Array
from jaxtyping import Float, Int, PRNGKeyArray
import numpy as np

Key = PRNGKeyArray  # of random numbers
Data = Float[Array, 'b *d']
PerRow = Float[Array, ' b']  # a number for each row of data: a time, a loss, a log-density
PerRowExpanded = Float[Array, 'b *ones']  # the same, by `sde_lib.expand`
StepPerRow = Int[Array, ' b']  # of a chain
Labels = Int[Array, ' b']

# Of networks.
Images = Float[Array, 'b h w c']
Condition = Float[Array, 'b h w k']  # images that a network is told beside the noisy ones
Maps = Float[Array, 'b _ _ _']  # feature maps whose size is not that of the others
Features = Float[Array, 'b f']  # numbers for each row, such as an embedding of its time


class Told(TypedDict, total=False):
  """What a network is told beside x and its time, each by the name of the argument that takes it.

  It is a pytree, and passed on whole, `**told`. What is not there is not told.
  """

  labels: Labels  # the class of each row
  augment_labels: Features  # what augmentation did to it
  condition: Condition  # the image that it goes with, in [-1, 1]; no noise is added to it


# Of elementwise functions, which take one number, those of a time grid, or those of a batch.
Times = Float[Array, '*b']
PerTime = Float[Array, '*b']  # alpha, sigma and the like at these times
Steps = Int[Array, '*b']  # of a chain
HostTimes = Float[np.ndarray, ' n']  # of a grid, in float64, before JAX has them
Time = Float[Array, '']  # one, of a whole batch
PerStep = Float[Array, ' N']  # a number for each step of a chain
