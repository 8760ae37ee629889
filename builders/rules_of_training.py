"""Which choices of the network and of its training do not go together; see `builders.agreement`."""

from ml_collections import FrozenConfigDict

from builders.networks import AUGMENTED, CONDITIONED
from data import conditions

# What the output of a network stands for, where the config does not say.
USUAL_OUTPUTS = {
  'vesde': 'score',
  'vpsde': 'noise',
  'subvpsde': 'noise',
  'edm': 'edm',
  'flow': 'flow',
}


def _energies_have_no_classes(config: FrozenConfigDict) -> str:
  if config.training.objective != 'cd' or not config.model.num_classes:
    return ''
  return (
    f'config.model.num_classes = {config.model.num_classes} does not go with '
    'config.training.objective = cd, which tells the network no classes; set it to 0'
  )


def _exact_traces_are_for_points(config: FrozenConfigDict) -> str:
  if config.training.objective != 'ism' or config.data.dim:
    return ''
  return (
    'config.training.objective = ism is for points: it differentiates once for each number of an '
    'image; ssm and ssm_vr estimate the same'
  )


def _some_labels_are_told(config: FrozenConfigDict) -> str:
  if not config.model.num_classes or config.training.label_dropout < 1:
    return ''
  return (
    'config.training.label_dropout = 1 tells a model of '
    f'config.model.num_classes = {config.model.num_classes} no label: set it below 1, or no classes'
  )


def _augmentation_is_told(config: FrozenConfigDict) -> str:
  probability, model = config.data.augment_probability, config.model
  if not probability:
    return ''
  field = f'config.data.augment_probability = {probability}'
  if config.data.dim:
    return f'{field} is for images, and config.data.dim = {config.data.dim}'
  if config.training.objective == 'cd':
    return (
      f'{field} does not go with config.training.objective = cd, whose samples are compared with '
      'images as they are; set it to 0'
    )
  if model.name in AUGMENTED and model.conditional:
    return ''
  return (
    f'{field} needs a network that can be told what was done to an image: config.model.name = '
    'ncsnpp, ddpm or dit, with config.model.conditional'
  )


def _conditions_suit_images(config: FrozenConfigDict) -> str:
  data = config.data
  field = f'config.data.condition = {data.condition}'
  if not data.condition:
    channels = data.condition_channels
    return f'config.data.condition_channels = {channels} needs a condition' if channels else ''
  if data.dim:
    return f'{field} is for images, and config.data.dim = {data.dim}'
  if data.condition == conditions.GRAY:
    if data.num_channels != 3:
      return f'{field} is for colours, config.data.num_channels = 3; got {data.num_channels}'
  elif found := conditions.LOW_RESOLUTION.fullmatch(data.condition):
    factor = int(found[1])
    if factor < 2 or data.image_size % factor:
      return (
        f'{field}: its factor must be at least 2 and divide config.data.image_size = '
        f'{data.image_size}'
      )
  elif data.dataset.lower() != 'folder':
    return (
      f'{field} is a folder of images of the same names as those of config.data.dataset = folder, '
      f'and that is {data.dataset}: take that, or lowres:N, such as lowres:4, or gray'
    )
  elif data.condition_channels > 4:
    return f'config.data.condition_channels = {data.condition_channels} must be 0 to 4'
  else:
    return ''
  if data.condition_channels:
    return f'config.data.condition_channels must be 0 for {field}, which says how many there are'
  return ''


def _conditions_are_told(config: FrozenConfigDict) -> str:
  field, model = f'config.data.condition = {config.data.condition}', config.model
  if not config.data.condition:
    return ''
  if model.name not in CONDITIONED:
    return f'{field} needs config.model.name = {", ".join(CONDITIONED)}; got {model.name}'
  if config.training.objective == 'cd':
    return (
      f'{field} does not go with config.training.objective = cd, whose samples have no conditions'
    )
  return ''


def _flash_attention_has_backward_derivatives_alone(config: FrozenConfigDict) -> str:
  model, objective = config.model, config.training.objective
  if not model.get('flash_attention'):
    return ''
  if model.dtype != 'bfloat16':
    return (
      'config.model.flash_attention is for config.model.dtype = bfloat16, and that is '
      f'{model.dtype}'
    )
  forward = objective in ('ism', 'ssm', 'ssm_vr') or model.output == 'energy'
  if not forward and objective != 'cd':
    return ''
  return (
    'config.model.flash_attention has no second or forward derivatives, which '
    f'config.training.objective = {objective} with config.model.output = {model.output!r} takes'
  )


def _unets_have_features_enough(config: FrozenConfigDict) -> str:
  if config.model.name not in ('ncsnpp', 'ddpm') or config.model.nf >= 4:
    return ''
  return f'config.model.nf = {config.model.nf} must be at least 4 for {config.model.name}'


def _perceptrons_take_fourier_features(config: FrozenConfigDict) -> str:
  if config.model.name != 'mlp' or config.model.embedding_type == 'fourier':
    return ''
  return (
    'config.model.name = mlp needs config.model.embedding_type = fourier; got '
    f'{config.model.embedding_type}'
  )


def _a_filter_has_a_sum(config: FrozenConfigDict) -> str:
  if not config.model.get('fir') or sum(config.model.fir_kernel) > 0:
    return ''
  return (
    f'config.model.fir_kernel = {tuple(config.model.fir_kernel)} must not be all 0: it is divided '
    'by its sum; config.model.fir = False resamples without it'
  )


def _ncsn_has_a_chain(config: FrozenConfigDict) -> str:
  if config.model.name != 'ncsn':
    return ''
  if config.training.continuous:
    return (
      'config.model.name = ncsn knows only the noise scales of a chain: set '
      'config.training.continuous = False'
    )
  if config.training.sde in ('vesde', 'vpsde'):
    return ''
  return (
    'config.model.name = ncsn knows only the noise scales of a chain, SMLD or DDPM: set '
    f'config.training.sde to vesde or vpsde; got {config.training.sde}'
  )


def _times_are_weighed_once(config: FrozenConfigDict) -> str:
  training = config.training
  if not training.likelihood_weighting or training.weight in ('', 'likelihood'):
    return ''
  return (
    f'config.training.weight = {training.weight} and config.training.likelihood_weighting = True '
    'are two weights: set one of them'
  )


def _rates_of_noise_are_of_an_sde(config: FrozenConfigDict) -> str:
  training = config.training
  by_rate = training.likelihood_weighting or training.weight in ('likelihood', 'sigmoid')
  if not by_rate or training.continuous:
    return ''
  field = f'weight = {training.weight}' if training.weight else 'likelihood_weighting'
  return f'config.training.{field} needs config.training.continuous'


def _laws_are_of_all_times(config: FrozenConfigDict) -> str:
  training = config.training
  if not training.time_law or (training.continuous and not training.single_scale):
    return ''
  return (
    f'config.training.time_law = {training.time_law} needs config.training.continuous, without '
    'config.training.single_scale: the others have times of their own'
  )


def _strata_are_of_several_times(config: FrozenConfigDict) -> str:
  if not (config.training.stratified and config.training.single_scale):
    return ''
  return (
    'config.training.stratified spreads times, and config.training.single_scale has one: set one '
    'of them to False'
  )


def _later_sdes_have_no_chain(config: FrozenConfigDict) -> str:
  training = config.training
  if training.sde not in ('edm', 'flow') or training.continuous:
    return ''
  return f'config.training.sde = {training.sde} has no chain: set config.training.continuous = True'


def _edm_is_for_data_around_zero(config: FrozenConfigDict) -> str:
  output = config.model.output or USUAL_OUTPUTS[config.training.sde]
  if output != 'edm' or config.data.centered:
    return ''
  return 'the output edm is for data around 0: set config.data.centered = True'


def _learned_weights_are_of_denoising(config: FrozenConfigDict) -> str:
  if not config.training.learned_weight:
    return ''
  if config.training.objective != 'dsm':
    return (
      'config.training.learned_weight needs config.training.objective = dsm, whose loss of a noise '
      f'level is above 0 whatever the network is; that of {config.training.objective} is not'
    )
  if config.distill.method:
    return (
      'config.training.learned_weight weighs the loss of a score, and that of '
      f'config.distill.method = {config.distill.method} is another: set it to False'
    )
  return ''


def _noise_is_paired_for_flow_matching(config: FrozenConfigDict) -> str:
  training = config.training
  if training.coupling == 'independent':
    return ''
  what = f'config.training.coupling = {training.coupling}'
  if training.sde != 'flow':
    return (
      f'{what} is for config.training.sde = flow, whose paths it makes straighter; those of '
      f'{training.sde} are curved by their noise scales'
    )
  if training.objective != 'dsm':
    return (
      f'{what} needs config.training.objective = dsm, which learns the velocity of the flow; '
      f'{training.objective} learns the score, which then is something else'
    )
  if config.distill.method:
    return (
      f'{what} is not for config.distill.method = {config.distill.method}: set it to independent'
    )
  if config.model.num_classes:
    return (
      f'{what} is not for config.model.num_classes = {config.model.num_classes}: the noise of a '
      'class would no longer be normal, and samples of it begin with noise that is'
    )
  if config.data.condition:
    return (
      f'{what} is not for config.data.condition = {config.data.condition}: the noise of images of '
      'one condition would no longer be normal, and samples begin with noise that is'
    )
  if config.data.augment_probability:
    return (
      f'{what} is not for config.data.augment_probability = {config.data.augment_probability}: the '
      'noise of images as they are would no longer be normal, and samples begin with noise that is'
    )
  return ''


RULES = (
  _energies_have_no_classes,
  _exact_traces_are_for_points,
  _some_labels_are_told,
  _augmentation_is_told,
  _conditions_suit_images,
  _conditions_are_told,
  _flash_attention_has_backward_derivatives_alone,
  _unets_have_features_enough,
  _perceptrons_take_fourier_features,
  _a_filter_has_a_sum,
  _ncsn_has_a_chain,
  _times_are_weighed_once,
  _rates_of_noise_are_of_an_sde,
  _laws_are_of_all_times,
  _strata_are_of_several_times,
  _later_sdes_have_no_chain,
  _edm_is_for_data_around_zero,
  _learned_weights_are_of_denoising,
  _noise_is_paired_for_flow_matching,
)
