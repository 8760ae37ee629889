"""Which choices of `--mode distill` do not go together; see `builders.agreement`."""

from ml_collections import FrozenConfigDict

from builders.rules_of_training import USUAL_OUTPUTS
from models.preconditioning import ENERGY
from training import progressive

CONSISTENCY = ('cd', 'ct', 'ict', 'ect')  # methods that make a consistency model
DISTILLATIONS = ('progressive', *CONSISTENCY)  # of --mode distill


def _students_learn_at_all_times(config: FrozenConfigDict) -> str:
  method, training = config.distill.method, config.training
  if not method or (training.continuous and not training.single_scale):
    return ''
  return (
    f'config.distill.method = {method} learns at all levels of noise: set '
    'config.training.continuous = True and config.training.single_scale = False'
  )


def _students_have_losses_of_their_own(config: FrozenConfigDict) -> str:
  method, objective = config.distill.method, config.training.objective
  if not method or objective == 'dsm':
    return ''
  return (
    f'config.training.objective = {objective} does not go with config.distill.method = {method}, '
    'which has a loss of its own: leave it at dsm'
  )


def _students_see_images_as_they_are(config: FrozenConfigDict) -> str:
  method, probability = config.distill.method, config.data.augment_probability
  if not method or not probability:
    return ''
  return (
    f'config.data.augment_probability = {probability} does not go with config.distill.method = '
    f'{method}, which learns from images as they are; set it to 0, whatever it was for the teacher'
  )


def _steps_are_halved(config: FrozenConfigDict) -> str:
  choice = config.distill
  ratio, rest = divmod(choice.start_steps, choice.end_steps)
  a_power_of_2 = rest == 0 and ratio.bit_count() == 1
  if choice.method != 'progressive' or (a_power_of_2 and ratio > 1):
    return ''
  return (
    f'config.distill.start_steps = {choice.start_steps} must be '
    f'config.distill.end_steps = {choice.end_steps} times 2, 4, 8 or so on: each stage halves them'
  )


def _denoised_values_are_known_without_signal(config: FrozenConfigDict) -> str:
  output = config.model.output or USUAL_OUTPUTS[config.training.sde]
  if config.distill.method != 'progressive' or output in progressive.OUTPUTS:
    return ''
  return (
    f'the output {output} of a network says nothing of the data where only noise is left, which '
    'config.distill.method = progressive needs: train a teacher with config.model.output = v, '
    f'or one of {", ".join(progressive.OUTPUTS)}'
  )


def _students_are_measured_by_their_samples(config: FrozenConfigDict) -> str:
  method, wanted = config.distill.method, config.eval
  if method and wanted.enable_bpd:
    return (
      f'config.eval.enable_bpd asks for a likelihood, which a model of config.distill.method = '
      f'{method} does not have: set it to False'
    )
  if method == 'progressive' and wanted.enable_loss:
    return (
      'config.eval.enable_loss: the loss of config.distill.method = progressive needs the teacher; '
      'set it to False, metrics.jsonl has the held-out loss of training'
    )
  return ''


def _jumps_are_learned(config: FrozenConfigDict) -> str:
  if config.distill.method not in CONSISTENCY or config.model.output != ENERGY:
    return ''
  return (
    f'config.model.output = {ENERGY} does not go with config.distill.method = '
    f'{config.distill.method}: an energy has a gradient, not a jump; take edm, v, flow or noise'
  )


RULES = (
  _students_learn_at_all_times,
  _students_have_losses_of_their_own,
  _students_see_images_as_they_are,
  _steps_are_halved,
  _denoised_values_are_known_without_signal,
  _students_are_measured_by_their_samples,
  _jumps_are_learned,
)
