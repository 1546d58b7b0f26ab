"""Sanity checks on a model before its robustness is believed: seconds on one batch.

After Athalye et al. 2018 (arXiv 1802.00420, section 3.1), Carlini et al. 2019 (arXiv 1902.06705) and Pintor et al. 2022
(arXiv 2106.09947). `preflight` looks at the model, `probes` attack it.
"""

from robustkit.evaluation.checks.batch import EXAMPLES as EXAMPLES
from robustkit.evaluation.checks.before_attack import preflight as preflight
from robustkit.evaluation.checks.by_attack import probes as probes
