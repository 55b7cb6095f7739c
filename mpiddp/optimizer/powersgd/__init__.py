"""PowerSGD: what stands for a gradient while it travels is the product of two thin matrices.

T. Vogels, S. P. Karimireddy and M. Jaggi, PowerSGD: practical low-rank gradient compression for distributed
optimization, NeurIPS 2019 (arXiv 1905.13727). Of a gradient M of n x m, and for a rank r:

    M += error                            what earlier steps left out of this rank's gradients
    P = mean over the ranks of M Q        n x r, exchanged; Q is that of the step before: a power iteration
    P = an orthonormal basis of P
    Q = mean over the ranks of M^T P      m x r, exchanged
    result = P Q^T                        the same on every rank
    error = M - result

All P of a bucket are one exchange, all Q another, and what is not compressed a third. P's leave during backward, as
buckets do; Q's when it has ended. Costs 6nmr operations and some passes over the gradient in place of bytes; memory:
a second gradient in float32.
"""

from .choice import check_powersgd, ways_of
from .memory import Remembering

__all__ = ["Remembering", "check_powersgd", "ways_of"]
