"""Latent reasoning in JAX: language models that think in continuous vectors.

`backbone` holds the decoder, `rollout` the one loop in which every model thinks and writes, `thoughts` the sources of
thoughts, `methods` one file per published method, `tasks` one file per task.
"""

__version__ = "0.1.0"
