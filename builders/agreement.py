"""Which choices of a config do not go together, each with what to do instead.

What is refused here would train or draw nonsense, or end in a traceback later: a network would be
asked for what it was never trained on, or nothing would move. What one value may be is in
`configs.ranges` and in the tables of `builders.values`.
"""

from collections.abc import Callable

from ml_collections import FrozenConfigDict

from builders import rules_of_sampling, rules_of_students, rules_of_training
from runtime.errors import UserError

# What is wrong with a config, in a line; empty if it is right.
Rule = Callable[[FrozenConfigDict], str]

RULES: tuple[Rule, ...] = (
  *rules_of_training.RULES,
  *rules_of_students.RULES,
  *rules_of_sampling.RULES,
)


def check(config: FrozenConfigDict) -> None:
  """Raises UserError for the first rule that a config breaks."""
  for rule in RULES:
    if wrong := rule(config):
      raise UserError(wrong)
