"""What the configs have in common: defaults, networks, and the settings of the three SDEs.

Values are those of the released code (https://github.com/yang-song/score_sde), where it has the
field. The comments are the text of docs/fields.md. `python -m configs` lists all configs.
"""

from typing import Any

from ml_collections import ConfigDict

from runtime.errors import UserError

Changes = dict[str, Any]  # dotted fields, and the values to set

# What `model` holds beside the noise scales: the fields of each network.
_UNET = {'nf': 128, 'ch_mult': (1, 2, 2, 2), 'attn_resolutions': (16,), 'nonlinearity': 'swish'}
_UNET |= {'resamp_with_conv': True, 'conditional': True, 'dropout': 0.1}
_UNET |= {'normalization': 'GroupNorm'}
_UNET |= {'remat': False}  # compute blocks again for gradients, for less memory
_NCSNPP = _UNET | {
  'name': 'ncsnpp',
  'num_res_blocks': 4,
  'resblock_type': 'biggan',
  'embedding_type': 'positional',
  'fourier_scale': 16.0,
  'fir': True,
  'fir_kernel': (1.0, 3.0, 3.0, 1.0),
  'progressive': 'none',
  'progressive_input': 'residual',
  'progressive_combine': 'sum',
  'skip_rescale': True,
  'init_scale': 0.0,
}
_DDPM = _UNET | {'name': 'ddpm', 'num_res_blocks': 2}
_PYRAMIDS = {'progressive': 'output_skip', 'progressive_input': 'input_skip', 'dropout': 0.0}
_REFINENET = {'nf': 128, 'nonlinearity': 'elu', 'normalization': 'InstanceNorm++'}
_REFINENET |= {'interpolation': 'bilinear'}
_MLP = {'name': 'mlp', 'nf': 64, 'num_layers': 3, 'nonlinearity': 'swish', 'conditional': True}
_MLP |= {'embedding_type': 'fourier', 'fourier_scale': 0.2}
_DIT = {'name': 'dit', 'patch_size': 2, 'conditional': True, 'embedding_type': 'positional'}
_DIT |= {'fourier_scale': 16.0, 'dropout': 0.0, 'remat': False}
_DIT |= {'flash_attention': False}  # by cuDNN while training, on NVIDIA GPUs, in bfloat16
NETWORKS = {
  'ddpm': _DDPM,
  'ddpm_256': _DDPM | {'ch_mult': (1, 1, 2, 2, 4, 4), 'dropout': 0.0},
  'ddpmpp': _NCSNPP | {'fir': False, 'progressive_input': 'none'},
  'ncsnpp': _NCSNPP,
  'ncsnpp_256': _NCSNPP | _PYRAMIDS | {'num_res_blocks': 2, 'ch_mult': (1, 1, 2, 2, 2, 2, 2)},
  'ncsnpp_1024': _NCSNPP
  | _PYRAMIDS
  | {'nf': 16, 'num_res_blocks': 1, 'ch_mult': (1, 2, 4, 8, 16, 32, 32, 32)},
  'ncsn': _REFINENET | {'name': 'ncsn'},
  'ncsnv2_64': _REFINENET | {'name': 'ncsnv2_64'},
  'ncsnv2_128': _REFINENET | {'name': 'ncsnv2_128'},
  'ncsnv2_256': _REFINENET | {'name': 'ncsnv2_256'},
  'mlp': _MLP,
  # The sizes of Peebles & Xie 2022 (https://arxiv.org/abs/2212.09748), Table 1.
  'dit_s': _DIT | {'nf': 384, 'num_layers': 12, 'num_heads': 6},
  'dit_b': _DIT | {'nf': 768, 'num_layers': 12, 'num_heads': 12},
  'dit_l': _DIT | {'nf': 1024, 'num_layers': 24, 'num_heads': 16},
  'dit_xl': _DIT | {'nf': 1152, 'num_layers': 28, 'num_heads': 16},
  # Not of the paper: 1.3 billion parameters; widths of layers and heads are multiples of 128, which
  # is what TPUs multiply at a time.
  'dit_1b': _DIT | {'nf': 1536, 'num_layers': 30, 'num_heads': 12},
}

_ANNEALED = ('ncsn', 'ncsnv2_64', 'ncsnv2_128', 'ncsnv2_256')


def _default() -> ConfigDict:
  config = ConfigDict()
  config.seed = 42  # of parameters, batches, training and sampling: all randomness

  config.data = data = ConfigDict()  # the images
  data.dataset = 'CIFAR10'  # digits, folder, CIFAR10, FFHQ, ... (docs/data.md)
  data.image_size = 32  # side of the square that images become, in pixels
  data.num_channels = 3  # 1 grey, 3 colour; 2 and 4 with transparency
  data.path = ''  # an image folder, TFRecord files, or the archive that a dataset is made from
  data.tfds_dir = ''  # where prepared TFDS datasets lie; empty for TFDS's default
  data.category = ''  # of LSUN
  # What each image goes with, which the network is told: a folder of images of the same names, or
  # lowres:4 (any factor) or gray, the image itself; empty for nothing.
  data.condition = ''
  data.condition_channels = 0  # of the images in that folder; 0: data.num_channels
  # What follows is of images in files.

  data.fit = 'crop'  # of images that are not square: crop, pad or stretch
  data.background = 'white'  # colour behind what is transparent, and beside what is padded
  # Stored values shown as black and as white, in images of more than 8 bits. Both 0: as the files
  # tell, or else as the largest value of all of them says.
  data.black = 0.0
  data.white = 0.0  # see data.black
  data.max_pixels = 178_956_970  # of an image as it is decoded, a limit to memory
  data.held_out = ''  # folder in data.path of the split test; empty: the one named test, val, ...
  data.skip_damaged = False  # leave out images that cannot be read; all are read at the start
  data.dim = 0  # of points, data.points.DISTRIBUTIONS; 0 for images
  data.centered = False  # networks see [-1, 1]; else [0, 1]
  data.random_flip = True  # mirror images of training, each with probability 1/2
  # Probability of each transformation of training images that the network is told of: EDM's 0.12 or
  # 0.15, with random_flip off; 0 for none.
  data.augment_probability = 0.0
  data.uniform_dequantization = False  # add uniform noise of one level in training

  config.model = model = ConfigDict()  # the network, its noise and its output
  model.num_scales = 1000  # N, of the chain; levels of noise that VE and NCSN are trained on
  model.sigma_min = 0.01  # of vesde, its least noise
  model.sigma_max = 50.0  # of vesde and edm, their largest noise
  model.sigma_data = 0.5  # standard deviation of data, for the output and the weight edm
  model.beta_min = 0.1  # of vpsde and subvpsde, beta(0)
  model.beta_max = 20.0  # beta(1)
  model.scale_by_sigma = False  # divide the network's output by sigma
  model.ema_rate = 0.999  # what the moving average keeps of itself in a step
  model.ema_warmup = False  # let the rate grow as (1 + n) / (10 + n), for short runs
  model.output = ''  # score, scaled_score, noise, denoised, v, edm, flow, energy; '' is the SDE's
  model.num_classes = 0  # of the labels that the network takes; 0 for none
  model.dtype = 'float32'  # of the network: float32 or bfloat16; denoised and energy are float32
  # Of float32 products on GPUs (TF32, TF32, float32) and TPUs (1, 3 or 6 products of bfloat16), in
  # training and in samplers with steps of their own: default, high or highest.
  model.precision = 'default'

  config.training = training = ConfigDict()  # what is learned, how long, what is written down
  training.sde = 'vesde'  # vesde, vpsde or subvpsde; edm and flow are not in the released code
  training.objective = 'dsm'  # score matching: dsm, esm, ism, ssm or ssm_vr; cd for energies
  training.single_scale = False  # train at time eps alone, one level of noise
  training.continuous = True  # train at all times of the SDE; else on its chain of N
  training.reduce_mean = False  # the loss is the mean over dimensions; else half their sum
  training.likelihood_weighting = False  # the weight likelihood, g(t)^2
  # Of continuous times: uniform (''), log_normal in log(sigma / alpha), or likelihood, g^2/sigma^2.
  training.time_law = ''
  training.time_mean = -1.2  # of log_normal
  training.time_std = 1.2  # of log_normal
  training.stratified = False  # spread the times of a batch evenly over their law
  # How times are weighed: variance, likelihood, edm, flow, min_snr, soft_min_snr or sigmoid; '' is
  # variance, or likelihood with likelihood_weighting.
  training.weight = ''
  training.weight_gamma = 5.0  # of min_snr and soft_min_snr
  training.weight_bias = 2.0  # of sigmoid
  training.learned_weight = False  # learn u(sigma) of EDM2 beside the network: loss / e^u + u
  # Which noise goes with which data, of flow matching: independent, or optimal_transport, the order
  # of the noise in which it is nearest to the data.
  training.coupling = 'independent'
  training.coupling_batch = 0  # rows that optimal_transport orders together; 0: all of batch_size
  training.eps = 1e-5  # smallest time; the released code has it in losses.py
  training.label_dropout = 0.1  # share of the labels that a label-conditional model is not told
  training.batch_size = 128  # of all devices and processes together
  training.n_iters = 1_300_001  # steps of the optimiser
  training.n_jitted_steps = 5  # steps in one compiled program
  training.grad_accum = 1  # parts of a batch, one after another, for less memory
  training.fsdp = 1  # devices that share the large arrays of the state, for less memory of each
  training.skip_nonfinite = False  # leave out steps whose loss or gradient is not finite
  training.log_freq = 50  # steps from one line of metrics to the next
  training.eval_freq = 100  # steps from one held-out loss to the next
  training.snapshot_freq = 50_000  # steps from one kept checkpoint to the next
  training.snapshot_freq_for_preemption = 10_000  # of those that the next one replaces
  training.keep_snapshots = 0  # the newest that are kept, each with all of the state; 0 for all
  training.wandb = ''  # project of Weights & Biases that metrics also go to
  training.snapshot_sampling = True  # draw samples at each snapshot
  training.snapshot_samples = 64  # in the grid of each snapshot, classes in turn
  # Snapshots from one to the next whose samples are compared with data, as eval.features says; 0:
  # never. The best is named.
  training.fid_freq = 0
  training.fid_samples = 10_000  # that are compared, of all devices together

  config.optim = optim = ConfigDict()  # the optimiser and its learning rate
  optim.optimizer = 'Adam'  # Adam, AdamW or RAdam
  optim.lr = 2e-4  # learning rate after the warm-up
  optim.beta1 = 0.9  # decay of the first moment
  optim.eps = 1e-8  # in the denominator of Adam
  optim.weight_decay = 0.0  # decoupled, as AdamW has it
  optim.warmup = 5000  # in which the rate grows linearly from 0
  optim.decay = 'constant'  # after the warm-up: constant, cosine, linear or inverse_sqrt
  optim.decay_until = 0  # where cosine and linear end, training.n_iters if 0; t_ref of inverse_sqrt
  optim.unit = 'steps'  # that warmup and decay_until are counted in: steps or images
  optim.grad_clip = 1.0  # norm that gradients are clipped at; 0 or below: they are not clipped

  config.ema = ema = ConfigDict()  # averages in place of model.ema_rate, and beside it
  ema.half_life = 0.0  # of the first average, in images; 0: by model.ema_rate and model.ema_warmup
  ema.ramp_up = 0.05  # the half-life is at most this share of the images seen; 0: no such bound
  ema.sigma_rels = ()  # of further averages, by power functions: their widths, such as (0.05, 0.1)
  ema.sigma_rel = 0.075  # of the average that --mode ema makes of the snapshots of those
  ema.sweep = ()  # widths that --mode ema compares instead, by what config.eval measures
  ema.use = 0  # which one evaluation and sampling read: 0 the first, 1 the first of ema.sigma_rels

  config.ebm = ebm = ConfigDict()  # the objective cd, contrastive divergence
  ebm.n_steps = 10  # of Langevin dynamics, from a sample of the replay buffer
  ebm.step_size = 0.01  # of that dynamics
  ebm.buffer_size = 10_000  # samples, of all devices together
  ebm.restart = 0.05  # share of them that begin anew from the prior
  ebm.regularization = 0.01  # of the squared energies

  config.distill = distill = ConfigDict()  # --mode distill, which makes few steps of many
  distill.method = ''  # progressive, or a consistency model by cd, ct, ict or ect; '': neither
  # Steps of progressive, halved until end_steps are left; of the grids of ct and ict, which grow.
  distill.start_steps = 1024
  distill.end_steps = 4  # of progressive, those of its sampler; of ct and ict, at the end
  # training.n_iters of the stages of progressive with 4 steps and fewer; 0: as of the others.
  distill.late_iters = 0
  distill.num_steps = 18  # times of the grid of cd
  distill.grid = 'edm'  # of the times of progressive, as sampling.grid
  distill.rho = 7.0  # of the edm grid, for all methods
  distill.solver = 'heun'  # of cd, by which the teacher takes a step: heun or euler
  distill.distance = ''  # l1, l2, linf or pseudo_huber; '': l2 for cd and ct, else the last
  distill.huber_c = 0.0  # of pseudo_huber; 0 is 0.00054 sqrt(numbers of an image)
  # How times are weighed: uniform, snr, snrp1, truncated_snr or inverse_gap; '' is the method's.
  distill.weight = ''
  distill.target_rate = 0.0  # of cd, ct: that of the average that is the target; 0: no average
  distill.doublings = 8  # of ect: how often the gap between its two times shrinks
  distill.gap_base = 2.0  # of ect: by how much it shrinks each time
  distill.gap_k = 8.0  # of ect: how much shorter the gap is where t is small
  distill.gap_b = 1.0  # of ect: up to which t that is small

  config.classifier = classifier = ConfigDict()  # a classifier of noisy images
  classifier.num_classes = 0  # those of the dataset
  classifier.blocks_per_group = 4  # this and the next make a WRN-28-10, the paper's (Appendix I.1)
  classifier.channel_multiplier = 10  # see classifier.blocks_per_group
  classifier.batch_size = 128  # of all devices and processes together
  classifier.n_iters = 100_000  # steps of the optimiser
  classifier.lr = 3e-4  # learning rate after the warm-up
  classifier.weight_decay = 0.05  # decoupled, as AdamW has it
  classifier.warmup = 1000  # steps in which the rate grows linearly from 0

  config.sampling = sampling = ConfigDict()  # how samples are drawn
  sampling.method = 'pc'  # the sampler (docs/sampling.md)
  sampling.predictor = 'reverse_diffusion'  # of pc: or euler_maruyama, ancestral_sampling, none
  sampling.corrector = 'langevin'  # of pc: or ald, none
  sampling.snr = 0.16  # signal-to-noise ratio of a corrector's step, r of Algorithm 4
  sampling.n_steps_each = 1  # steps of the corrector at each time
  sampling.noise_removal = True  # end in clean data, by Tweedie's formula
  sampling.probability_flow = False  # of pc: the predictor follows the ODE, not the SDE
  # Times in the grid; 0: model.num_scales, the steps of progressive, one of consistency.
  sampling.num_steps = 0
  # Of consistency: times after the first, T, such as (0.8,), falling; empty: num_steps of the grid.
  sampling.consistency_times = ()
  sampling.eps = 1e-5  # last time; the released code has it in run_lib.py
  sampling.grid = ''  # uniform, quadratic, log_snr, edm or cosine; empty for the method's own
  sampling.rho = 7.0  # of the edm grid
  sampling.order = 2  # of dpm_solver++ (3 is UniP-3, not dpm_solver++_3m), unip, deis and unipc
  sampling.eta = 0.0  # of ddim, dpm_solver++ and dpm_solver++_3m: 0 for the ODE to 1 for the SDE
  sampling.s_churn = 0.0  # of euler and heun: how much noise is added on the way
  sampling.s_tmin = 0.0  # noise is added at s_tmin <= sigma / alpha <= s_tmax alone
  sampling.s_tmax = 1e9  # see sampling.s_tmin
  sampling.s_noise = 1.0  # standard deviation of that noise, over what the SDE asks for
  sampling.step_size = 0.01  # of langevin and mala
  sampling.ode_solver = 'dopri5'  # of the method ode
  sampling.rtol = 1e-5  # tolerances of the method ode, relative
  sampling.atol = 1e-5  # and absolute, in units of what the network sees
  sampling.sde_rtol = 0.05  # of adaptive_sde
  sampling.sde_atol = 1 / 256  # one level of the data's range
  sampling.uint8 = 'truncate'  # pixels to whole numbers: truncate or round
  sampling.guidance_scale = 1.0  # of classes: 0 ignores them, 1 is p(x | y), more is more typical
  # The workdir of a weaker run of the same data that samples are led away from, or
  # WORKDIR/checkpoints/STEP; for --mode sample and eval. Losses and likelihoods are of the model.
  sampling.guide = ''
  sampling.guide_scale = 1.0  # of the difference between model and guide; 1 is the model alone
  sampling.guide_ema = -1  # which average of the guide, as ema.use; -1: as its own config says
  # Guidance counts at guidance_low < sigma / alpha <= guidance_high; elsewhere its scale is 1.
  sampling.guidance_low = 0.0
  sampling.guidance_high = 1e9  # see sampling.guidance_low
  # What follows is for --mode sample.

  sampling.num_samples = 16  # for a task, of each input; with data.condition, of each condition
  sampling.labels = ()  # classes, by number or name, over and over; empty for all in turn
  # A folder of images to draw samples for, num_samples each, by a model with data.condition; empty
  # for num_conditions of the held-out ones.
  sampling.condition = ''
  sampling.num_conditions = 8  # spread evenly over the held-out split
  sampling.task = ''  # inpaint, colorize, superres or deblur; empty for samples of everything
  sampling.input = ''  # an image of a task, or a folder of images
  # Of inpaint, an image of two values: the brighter, or what is opaque, is known.
  sampling.mask = ''
  sampling.factor = 4  # of superres
  sampling.blur_std = 1.0  # of deblur, in pixels
  sampling.conditioning = 'constraint'  # on a task's input; or posterior, slower and more faithful
  sampling.noise_std = 0.0  # of the noise in a task's input, pixels being 0 to 1; for posterior
  sampling.trajectory = False  # also picture how noise became the first samples

  config.eval = evaluation = ConfigDict()  # what is measured
  evaluation.begin_ckpt = 1  # checkpoints are numbered in units of training.snapshot_freq
  evaluation.end_ckpt = 26  # the last one
  evaluation.best = False  # take the checkpoint that training.fid_freq found to be the best instead
  evaluation.batch_size = 1024  # images in a round of evaluation or sampling, of all devices
  evaluation.enable_loss = True  # the held-out loss
  evaluation.enable_bpd = False  # bits/dim by the probability flow
  evaluation.num_probes = 1  # of its divergence, for each image and repeat
  evaluation.enable_bound = False  # an upper bound on bits/dim, without an ODE
  evaluation.bound_times = 100  # that it asks the score for, in ten independent draws
  evaluation.bound_form = 'dsm'  # dsm, or ssm with a derivative along a probe
  evaluation.bpd_dataset = 'test'  # split of those images: test or train
  evaluation.bpd_repeats = 5  # of the dequantisation; the released code has it in run_lib.py
  evaluation.bpd_dequantization = 'uniform'  # or variational: noise fitted to each checkpoint
  evaluation.bpd_dequantization_steps = 1000  # of that fit, batches of batch_size
  evaluation.bpd_importance_samples = 1  # of it, whose densities are averaged: a tighter bound
  evaluation.enable_sampling = False  # samples, and their distance from the data
  evaluation.num_samples = 50_000  # of all processes together; the released code: of each
  evaluation.wait = False  # for checkpoints up to end_ckpt that training has still to write
  evaluation.features = 'inception'  # samples are compared by: inception or pixels; empty: not
  evaluation.inception_path = ''  # file of Inception's weights; empty to download them once
  evaluation.stats_split = 'train'  # that samples are compared with: train or test
  evaluation.stats_path = ''  # file of --mode stats; empty for assets/stats/<its name>
  return config


def saved(values: dict[str, Any], path: object) -> ConfigDict:
  """A config that was saved at `path`, perhaps before it had all fields: those have their defaults.

  Raises:
    UserError: if it was changed to what is no config.
  """
  config = _default()
  try:
    name = values['model']['name']
    network = next(fields for fields in NETWORKS.values() if fields['name'] == name)
    config.model.update(network)
    config.update(values)
  except (TypeError, ValueError, LookupError, AttributeError, StopIteration) as error:
    reason = ' '.join(str(error).split()) or 'model.name is not that of a network'
    raise UserError(f'{path} does not fit: {reason}') from None
  return config


def ve(network: str) -> ConfigDict:
  """The settings of the VE SDE, with a network from `NETWORKS`."""
  config = _default()
  config.model.update(NETWORKS[network])
  config.model.scale_by_sigma = network != 'ncsn'
  if network.startswith('ncsnpp'):
    config.model.embedding_type = 'fourier'
  if network in _ANNEALED:
    # Trained on a chain, and sampled by annealed Langevin dynamics alone.
    config.training.continuous = False
    config.optim.lr = 1e-3 if network == 'ncsn' else 1e-4
    config.optim.warmup = 0
    config.optim.grad_clip = -1.0
    config.sampling.predictor = 'none'
    config.sampling.corrector = 'ald'
  return config


def vp(network: str) -> ConfigDict:
  """The settings of the VP SDE, with a network from `NETWORKS`."""
  config = _default()
  config.model.update(NETWORKS[network])
  config.model.ema_rate = 0.9999
  config.training.sde = 'vpsde'
  config.training.reduce_mean = True
  config.data.centered = True
  config.sampling.predictor = 'euler_maruyama'
  config.sampling.corrector = 'none'
  config.sampling.eps = 1e-3
  config.sampling.sde_atol = 2 / 256
  return config


def subvp(network: str) -> ConfigDict:
  """The settings of the sub-VP SDE, with a network from `NETWORKS`."""
  config = vp(network)
  config.training.sde = 'subvpsde'
  return config


def edm(network: str) -> ConfigDict:
  """The settings of EDM (https://arxiv.org/abs/2206.00364), with a network from `NETWORKS`."""
  config = _default()
  config.model.update(NETWORKS[network])
  if network.startswith('ncsnpp'):
    config.model.embedding_type = 'fourier'
  config.model.sigma_max = 80.0
  config.data.centered = True
  config.training.sde = 'edm'
  config.training.time_law = 'log_normal'
  config.training.weight = 'edm'
  config.training.eps = 0.002
  config.optim.grad_clip = -1.0
  config.sampling.method = 'heun'
  config.sampling.num_steps = 18
  config.sampling.eps = 0.002
  config.sampling.sde_atol = 2 / 256
  return config


def flow(network: str) -> ConfigDict:
  """Flow matching on straight paths, with a network from `NETWORKS`.

  Times are logit-normal (https://arxiv.org/abs/2403.03206), the optimiser is that of `vp`.
  """
  config = vp(network)
  config.training.sde = 'flow'
  config.training.time_law = 'log_normal'
  config.training.time_mean = 0.0
  config.training.time_std = 1.0
  config.training.weight = 'flow'
  config.training.eps = 1e-3
  config.sampling.method = 'flow_heun'
  config.sampling.num_steps = 25
  return config


SDES = {'ve': ve, 'vp': vp, 'subvp': subvp, 'edm': edm, 'flow': flow}
