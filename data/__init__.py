"""Where data come from: images, folders, TensorFlow Datasets, points; what networks see of them.

Imports `sde_lib` (the score of points is known), `workdir` (pictures) and `runtime`.
"""
