"""Where data come from: images, folders, TensorFlow Datasets, points; batches of them.

Imports `sde_lib` (the score of points is known) and `runtime`.
"""
