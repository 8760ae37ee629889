"""How samples are drawn beyond the paper's own samplers: time grids, solvers, Langevin, the ODE.

Imports `sde_lib` and `runtime`.
"""
