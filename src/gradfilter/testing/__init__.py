"""Test a transform of your own: the laws that hold for every transform of this package."""

from gradfilter.testing._check_laws import check_laws as check_laws
