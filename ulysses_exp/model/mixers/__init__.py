"""Layers that mix tokens and are not attention (convolutions, linear recurrences): over slices, document by document.

In transformers (5.23) such a layer is: projections of each token for itself, a short causal convolution, one function
that scans the sequence, and again norm, gate and projection of each token. Convolution and scan are globals of the
modeling file, so they alone are replaced, for the instances of one model (`binding`); no code of a model is copied.
"""

import ulysses_exp.model.attention  # noqa: F401 - its registration imports from here: whoever comes here first starts there
