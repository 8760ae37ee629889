"""The optimiser."""

import optax


def adam(
  *, lr: float, beta1: float, eps: float, weight_decay: float, warmup: int, grad_clip: float
) -> optax.GradientTransformation:
  """Adam as in the released code.

  The learning rate grows linearly from 0 over `warmup` steps; the global gradient norm is clipped
  at `grad_clip`, if that is above 0; weight decay is decoupled. The tree of its state depends on
  none of them, so that they can be changed while a run goes on.
  """
  clip = optax.clip_by_global_norm(grad_clip) if grad_clip > 0 else optax.identity()
  schedule = optax.linear_schedule(0.0, lr, warmup) if warmup else optax.constant_schedule(lr)
  return optax.chain(
    clip, optax.adamw(schedule, b1=beta1, b2=0.999, eps=eps, weight_decay=weight_decay)
  )
