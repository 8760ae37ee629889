"""Which choices of a config do not go together, each with what to do instead.

What is refused here would train or draw nonsense, or end in a traceback later: a network would be
asked for what it was never trained on, or nothing would move. What one value may be is in
`configs.ranges` and in the tables of `builders.setup`.
"""

from collections.abc import Callable

from ml_collections import FrozenConfigDict

from builders.networks import AUGMENTED
from models.preconditioning import ENERGY
from runtime.errors import UserError
from training import progressive

# What is wrong with a config, in a line; empty if it is right.
Rule = Callable[[FrozenConfigDict], str]

# What the output of a network stands for, where the config does not say.
USUAL_OUTPUTS = {
  'vesde': 'score',
  'vpsde': 'noise',
  'subvpsde': 'noise',
  'edm': 'edm',
  'flow': 'flow',
}
CONSISTENCY = ('cd', 'ct', 'ict', 'ect')  # of them, what makes a consistency model
DISTILLATIONS = ('progressive', *CONSISTENCY)  # of --mode distill
ONE_LEVEL = ('langevin', 'mala')  # methods that ask for the score at sampling.eps alone


def check(config: FrozenConfigDict) -> None:
  """Raises UserError for the first rule that a config breaks."""
  for rule in RULES:
    if wrong := rule(config):
      raise UserError(wrong)


# What is trained.


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
  if config.data.augment_probability:
    return (
      f'{what} is not for config.data.augment_probability = {config.data.augment_probability}: the '
      'noise of images as they are would no longer be normal, and samples begin with noise that is'
    )
  return ''


# What is distilled.


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


# What is drawn.


def _consistency_models_jump(config: FrozenConfigDict) -> str:
  wanted, method = config.sampling.method, config.distill.method
  if wanted == 'consistency' and method not in CONSISTENCY:
    return (
      'config.sampling.method = consistency is for consistency models, which '
      f'config.distill.method = {", ".join(CONSISTENCY)} make; got {method!r}'
    )
  if wanted != 'consistency' and method in CONSISTENCY:
    return (
      f'config.sampling.method = {wanted} asks for a score, and config.distill.method = {method} '
      'makes a consistency model, which has none: choose consistency'
    )
  return ''


def _jumps_are_not_guided(config: FrozenConfigDict) -> str:
  choice, classes = config.sampling, config.model.num_classes
  if choice.method != 'consistency':
    return ''
  if choice.conditioning == 'posterior' and choice.task:
    return (
      'config.sampling.conditioning = posterior guides a score, and a consistency model has none: '
      'set it to constraint'
    )
  guided = (classes and choice.guidance_scale != 1) or (choice.labels and not classes)
  if guided or choice.guide:
    return (
      'config.sampling.method = consistency cannot be guided, by classes, a classifier or '
      'config.sampling.guide: a consistency model has no score; set guidance_scale to 1, and '
      'labels only for a model that is told them'
    )
  return ''


def _times_of_jumps_are_told_once(config: FrozenConfigDict) -> str:
  choice, n = config.sampling, 1 + len(config.sampling.consistency_times)
  if choice.method != 'consistency' or n == 1 or choice.num_steps in (0, n):
    return ''
  return (
    f'config.sampling.num_steps = {choice.num_steps} and consistency_times = '
    f'{tuple(choice.consistency_times)}, which make {n} steps with the first from T, are two '
    'answers: set num_steps to 0'
  )


def _what_is_used_is_kept(config: FrozenConfigDict) -> str:
  kept = 1 + len(config.ema.sigma_rels)
  if config.ema.use < kept:
    return ''
  return f'config.ema.use must be below {kept}, the number of averages kept; got {config.ema.use}'


def _metropolis_tests_need_energies(config: FrozenConfigDict) -> str:
  if config.sampling.method != 'mala' or config.model.output == ENERGY:
    return ''
  return 'config.sampling.method = mala needs config.model.output = energy'


def _metropolis_tests_need_densities(config: FrozenConfigDict) -> str:
  choice, classes = config.sampling, config.model.num_classes
  guided = choice.guidance_scale != 1 if classes else choice.labels
  guided = guided or choice.guide
  if choice.method != 'mala' or not (choice.task or guided):
    return ''
  return (
    'config.sampling.method = mala knows no density of guided samples, nor of what a task leaves '
    'open; choose langevin'
  )


def _one_level_is_sampled_at_one_level(config: FrozenConfigDict) -> str:
  sampling, training = config.sampling, config.training
  if training.single_scale and sampling.method not in ONE_LEVEL:
    return (
      f'config.sampling.method = {sampling.method} asks for all levels of noise, and '
      'config.training.single_scale trains one: choose langevin, or mala for energies'
    )
  if training.single_scale and sampling.eps != training.eps:
    return (
      f'config.sampling.eps = {sampling.eps} must be config.training.eps = {training.eps}, the '
      'only time that is trained with config.training.single_scale'
    )
  if sampling.method in ONE_LEVEL and not training.single_scale:
    return (
      f'config.sampling.method = {sampling.method} is for config.training.single_scale: at one '
      'level of noise of many it does not come from noise to data; choose pc, for example'
    )
  return ''


def _paired_noise_leaves_no_score(config: FrozenConfigDict) -> str:
  choice, training = config.sampling, config.training
  if training.coupling == 'independent':
    return ''
  what = f'config.training.coupling = {training.coupling} trains no score'
  for field in ('task', 'labels', 'guide'):
    if choice[field]:
      return (
        f'{what}, which config.sampling.{field} = {choice[field]} needs: leave that out, or train '
        'with independent'
      )
  if config.eval.enable_bound:
    return f'{what}, which config.eval.enable_bound needs: enable_bpd asks for the flow alone'
  if _follows_the_flow(choice):
    return ''
  return (
    f'{what}, which this config.sampling.method = {choice.method} needs: choose one of the '
    'probability flow, such as ode, flow_heun or unipc, with eta = 0 and s_churn = 0'
  )


def _follows_the_flow(choice: FrozenConfigDict) -> bool:
  """Whether a sampler asks of the network for nothing but the probability flow."""
  if choice.method == 'pc':
    return choice.probability_flow and choice.corrector == 'none'
  if choice.method in ('adaptive_sde', *ONE_LEVEL):
    return False
  of_noise = dict.fromkeys(('ddim', 'dpm_solver++', 'dpm_solver++_3m'), 'eta')
  of_noise |= dict.fromkeys(('euler', 'heun'), 's_churn')
  return choice.method not in of_noise or choice[of_noise[choice.method]] == 0


def _likelihoods_need_all_levels(config: FrozenConfigDict) -> str:
  asked = [name for name in ('enable_bpd', 'enable_bound') if config.eval[name]]
  if not (asked and config.training.single_scale):
    return ''
  return (
    f'config.eval.{asked[0]} asks for all levels of noise, and config.training.single_scale trains '
    'one: set one of them to False'
  )


def _times_of_a_bound_are_in_ten_draws(config: FrozenConfigDict) -> str:
  times = config.eval.bound_times
  return f'config.eval.bound_times = {times} must be a multiple of 10' if times % 10 else ''


def _guidance_needs_both_scores(config: FrozenConfigDict) -> str:
  guided = config.model.num_classes and config.sampling.guidance_scale != 1
  if not guided or config.training.label_dropout > 0:
    return ''
  return (
    f'config.sampling.guidance_scale = {config.sampling.guidance_scale} needs the score of all '
    'classes together, which config.training.label_dropout = 0 does not train: set the first to 1 '
    'or the second above 0'
  )


def _a_scale_has_its_guide(config: FrozenConfigDict) -> str:
  choice = config.sampling
  if choice.guide or choice.guide_scale == 1:
    return ''
  return (
    f'config.sampling.guide_scale = {choice.guide_scale} needs a weaker model: set '
    'config.sampling.guide to its workdir, or the scale to 1'
  )


def _something_moves(config: FrozenConfigDict) -> str:
  choice = config.sampling
  if (choice.method, choice.predictor, choice.corrector) != ('pc', 'none', 'none'):
    return ''
  return 'config.sampling.predictor and corrector are both none: samples would stay noise'


def _a_step_is_random_or_not(config: FrozenConfigDict) -> str:
  choice = config.sampling
  ancestral = choice.method == 'pc' and choice.predictor == 'ancestral_sampling'
  if not (ancestral and choice.probability_flow):
    return ''
  return 'config.sampling.probability_flow does not go with ancestral_sampling'


def _churn_has_its_levels(config: FrozenConfigDict) -> str:
  choice = config.sampling
  if not choice.s_churn or choice.s_tmin <= choice.s_tmax:
    return ''
  return (
    f'config.sampling.s_tmin = {choice.s_tmin} must not be above s_tmax = {choice.s_tmax}: between '
    'them s_churn adds noise'
  )


def _tasks_suit_their_sampler(config: FrozenConfigDict) -> str:
  choice = config.sampling
  if not choice.task:
    return ''
  if choice.method == 'ode' and choice.conditioning == 'constraint':
    return (
      'config.sampling.method = ode takes no constraint; choose another, or '
      'config.sampling.conditioning = posterior'
    )
  if choice.noise_std > 0 and choice.conditioning != 'posterior':
    return (
      f'config.sampling.noise_std = {choice.noise_std} needs config.sampling.conditioning = '
      f'posterior; {choice.conditioning} takes what is known as it is'
    )
  return ''


RULES: tuple[Rule, ...] = (
  _energies_have_no_classes,
  _exact_traces_are_for_points,
  _some_labels_are_told,
  _augmentation_is_told,
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
  _students_learn_at_all_times,
  _students_have_losses_of_their_own,
  _students_see_images_as_they_are,
  _steps_are_halved,
  _denoised_values_are_known_without_signal,
  _students_are_measured_by_their_samples,
  _jumps_are_learned,
  _what_is_used_is_kept,
  _consistency_models_jump,
  _jumps_are_not_guided,
  _times_of_jumps_are_told_once,
  _metropolis_tests_need_energies,
  _metropolis_tests_need_densities,
  _one_level_is_sampled_at_one_level,
  _paired_noise_leaves_no_score,
  _likelihoods_need_all_levels,
  _times_of_a_bound_are_in_ten_draws,
  _guidance_needs_both_scores,
  _a_scale_has_its_guide,
  _something_moves,
  _a_step_is_random_or_not,
  _churn_has_its_levels,
  _tasks_suit_their_sampler,
)
