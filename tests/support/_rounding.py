"""Error bounds of sums, from the precision and the width alone."""

import torch


def rounding(terms, dtype=torch.float32):
    """Return the relative error bound of a sum of so many products, in any order.

    γ_n = n u / (1 − n u) with the unit roundoff u, of Σ |a_i b_i|: what holds for every kernel,
    whichever width its vectors have and whether it multiplies and adds at once.

    References:
        Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed. 2002, section 3.1
    """
    unit = torch.finfo(dtype).eps / 2
    return terms * unit / (1 - terms * unit)


def assert_within(found, expected, bound):
    """Assert that no entry is farther away than its bound."""
    distance = (found.double() - expected.double()).abs()
    worst = (distance / bound).nan_to_num(0.0, posinf=torch.inf).max()
    assert (distance <= bound).all(), f"{worst:.2f} times what rounding may do"
