"""Optimisers, and how the learning rate changes while they run."""

from collections.abc import Callable
import dataclasses

from jax import Array
import jax.numpy as jnp
import optax

Decay = Callable[[Array, float, float], Array]  # (steps, begin, end or reference) -> share of lr


def _cosine(step: Array, begin: float, end: float) -> Array:
  return 0.5 * (1 + jnp.cos(jnp.pi * _progress(step, begin, end)))


def _linear(step: Array, begin: float, end: float) -> Array:
  return 1 - _progress(step, begin, end)


def _progress(step: Array, begin: float, end: float) -> Array:
  return jnp.clip((step - begin) / max(end - begin, 1.0), 0.0, 1.0)


def _inverse_sqrt(step: Array, begin: float, end: float) -> Array:
  """1 / sqrt(max(t / t_ref, 1)) (EDM2, https://arxiv.org/abs/2312.02696, Eq. 67)."""
  del begin
  return 1 / jnp.sqrt(jnp.maximum(step / end, 1.0))


# By name; 'constant' has none.
DECAYS: dict[str, Decay] = {'cosine': _cosine, 'linear': _linear, 'inverse_sqrt': _inverse_sqrt}


@dataclasses.dataclass(frozen=True)
class LearningRate:
  """The learning rate of each step: warm-up, and then a decay.

  Attributes:
    peak: after the warm-up, before the decay.
    warmup: steps over which it grows linearly from 0.
    decay: 'constant' or a key of `DECAYS`.
    until: the step where cosine and linear decay are at 0; or t_ref, where that of the inverse
      square root begins.
  """

  peak: float
  warmup: float = 0
  decay: str = 'constant'
  until: float = 0

  def schedule(self) -> optax.Schedule:
    """(step) -> learning rate, from step 0 on."""
    if self.decay == 'constant':
      warming = optax.linear_schedule(0.0, self.peak, self.warmup)
      return warming if self.warmup else optax.constant_schedule(self.peak)
    decay = DECAYS[self.decay]

    def rate(step: Array) -> Array:
      warmed = jnp.minimum(step / self.warmup, 1.0) if self.warmup else 1.0
      return self.peak * warmed * decay(step, self.warmup, self.until)

    return rate


def adam(
  lr: LearningRate, *, beta1: float, eps: float, weight_decay: float, grad_clip: float
) -> optax.GradientTransformation:
  """Adam as in the released code, whose weight decay is decoupled: AdamW.

  The global gradient norm is clipped at `grad_clip`, if that is above 0. The tree of its state
  depends on no number and no decay, so that they can be changed while a run goes on.
  """
  tx = optax.adamw(lr.schedule(), b1=beta1, b2=0.999, eps=eps, weight_decay=weight_decay)
  return optax.chain(_clip(grad_clip), tx)


def radam(
  lr: LearningRate, *, beta1: float, eps: float, weight_decay: float, grad_clip: float
) -> optax.GradientTransformation:
  """Rectified Adam (Liu et al. 2019, https://arxiv.org/abs/1908.03265), in all else as `adam`."""
  return optax.chain(
    _clip(grad_clip),
    optax.scale_by_radam(b1=beta1, b2=0.999, eps=eps),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(lr.schedule()),
  )


def _clip(grad_clip: float) -> optax.GradientTransformation:
  return optax.clip_by_global_norm(grad_clip) if grad_clip > 0 else optax.identity()


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  'Adam': adam,
  'AdamW': adam,
  'RAdam': radam,
}
