"""The network of DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239)."""

from models.ncsnpp import NCSNpp


def DDPM(
  *,
  nf: int,
  ch_mult: tuple[int, ...],
  num_res_blocks: int,
  attn_resolutions: tuple[int, ...],
  nonlinearity: str = 'swish',
  dropout: float = 0.0,
  conditional: bool = True,
  resamp_with_conv: bool = True,
  dtype: str = 'float32',
  num_classes: int = 0,
  num_augment_labels: int = 0,
  remat: bool = False,
) -> NCSNpp:
  """DDPM's U-Net: NCSN++ without its improvements, and 32 groups in every GroupNorm."""
  return NCSNpp(
    nf=nf,
    ch_mult=ch_mult,
    num_res_blocks=num_res_blocks,
    attn_resolutions=attn_resolutions,
    nonlinearity=nonlinearity,
    dropout=dropout,
    conditional=conditional,
    embedding_type='positional',
    resblock_type='ddpm',
    resamp_with_conv=resamp_with_conv,
    fir_kernel=None,
    skip_rescale=False,
    init_scale=0.0,
    min_group_size=1,
    dtype=dtype,
    num_classes=num_classes,
    num_augment_labels=num_augment_labels,
    remat=remat,
  )
