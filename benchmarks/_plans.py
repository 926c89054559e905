"""The plans that are measured."""

from typing import get_args

from gradfilter.grads._microbatch import Plan

PLANS = tuple(plan for plan in get_args(Plan) if plan != "auto")
"""A plan that microbatch_grads learns is measured from then on."""
