"""Which choices of sampling and evaluation do not go together; see `builders.agreement`."""

from ml_collections import FrozenConfigDict

from builders.rules_of_students import CONSISTENCY
from models.preconditioning import ENERGY

ONE_LEVEL = ('langevin', 'mala')  # methods that ask for the score at sampling.eps alone


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


def _points_have_no_levels(config: FrozenConfigDict) -> str:
  samples = config.eval.bpd_importance_samples
  if samples == 1 or not config.data.dim:
    return ''
  return (
    f'config.eval.bpd_importance_samples = {samples} draws noise between the levels of images, and '
    f'config.data.dim = {config.data.dim} has points: set it to 1'
  )


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


def _tasks_are_for_models_of_all_images(config: FrozenConfigDict) -> str:
  choice, condition = config.sampling, config.data.condition
  if choice.condition and not condition:
    return (
      f'config.sampling.condition = {choice.condition} is for a model that was trained with '
      'config.data.condition; for a model of images alone there is config.sampling.task'
    )
  if choice.task and condition:
    return (
      f'config.sampling.task = {choice.task} is for models of images alone, and this one has '
      f'config.data.condition = {condition}: config.sampling.condition names what to draw for'
    )
  return ''


RULES = (
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
  _points_have_no_levels,
  _guidance_needs_both_scores,
  _a_scale_has_its_guide,
  _something_moves,
  _a_step_is_random_or_not,
  _churn_has_its_levels,
  _tasks_suit_their_sampler,
  _tasks_are_for_models_of_all_images,
)
